# SPDX-License-Identifier: Apache-2.0
"""Before a long run: how dense the gradients of each layer are, what runs sparse, and what a step gains by it.

    python examples/densities.py

Put your own model and a batch of your own data in place of `model`, `images` and `labels`. Densities of the first steps are
not those of the hundredth: give it a model that has been trained for a while, or more steps.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

import sparsebwd
from sparsebwd import models


def step_ms(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, optimiser: torch.optim.Optimizer) -> float:
    """Train one step; how many milliseconds it took."""
    start = time.perf_counter()
    optimiser.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimiser.step()
    if images.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="resnet18", choices=models.names())
parser.add_argument("--percentile", type=float, default=90)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--steps", type=int, default=10, help="of each, sparse and dense")
options = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cpu":
    sparsebwd.keep_memory()
images = torch.randn(options.batch_size, 3, 32, 32).to(device, memory_format=torch.channels_last)
labels = torch.randint(10, (options.batch_size,), device=device)
model = models.create(options.model, num_classes=10).to(device, memory_format=torch.channels_last)
optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

print(sparsebwd.conversion_report(sparsebwd.convert(model, options.percentile)), "\n")
step_ms(model, images, labels, optimiser)
with sparsebwd.DensityMonitor(model) as monitor:
    for _ in range(3):
        step_ms(model, images, labels, optimiser)
print(monitor, "\n")

times: dict[str, list[float]] = {"sparse": [], "dense": []}
for _ in range(options.steps):  # in turns, so that whatever else the machine does concerns both
    sparsebwd.convert(model, options.percentile)
    times["sparse"].append(step_ms(model, images, labels, optimiser))
    sparsebwd.revert(model)
    times["dense"].append(step_ms(model, images, labels, optimiser))
sparse, dense = map(statistics.median, times.values())
print(f"a step: {sparse:.1f} ms sparse, {dense:.1f} ms dense: {dense / sparse:.2f}x")
