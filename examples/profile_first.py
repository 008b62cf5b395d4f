# SPDX-License-Identifier: Apache-2.0
"""Before a long run: what each layer would gain, and whether a step gains enough; then train sparse, or dense as before.

    python examples/profile_first.py

Put your own model and data in place of `model` and `batch`. Gradients of the first steps are not those of the hundredth: give it
a model that has been trained for a while, or more steps before.
"""

import argparse

import torch
import torch.nn.functional as F

import sparsebwd
from sparsebwd import models

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="resnet18", choices=models.names())
parser.add_argument("--percentile", type=float, default=90)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--before", type=int, default=5, help="dense steps before it is profiled")
parser.add_argument("--steps", type=int, default=10, help="after that")
parser.add_argument("--rounds", type=int, default=7, help="steps of each kind that are profiled")
parser.add_argument("--least", type=float, default=1.05, help="how much faster a step has to be to train sparse")
parser.add_argument("--alternatives", action=argparse.BooleanOptionalAction, default=True, help="see what else would gain")
options = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cpu":
    sparsebwd.keep_memory()
model = models.create(options.model, num_classes=10).to(device, memory_format=torch.channels_last)
optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(options.batch_size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    return images, torch.randint(10, (options.batch_size,), device=device)


def train_step() -> float:
    images, labels = batch()
    optimiser.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimiser.step()
    return loss.item()


for _ in range(options.before):
    train_step()

found = sparsebwd.profile(
    model,
    batch(),
    optimizer=optimiser,
    percentile=options.percentile,
    steps=options.rounds,
    alternatives=options.alternatives,
)
print(found, "\n")  # nothing of the model has changed

schedule = None
if found.speedup >= options.least:
    sparsebwd.convert(model, options.percentile)
    schedule = sparsebwd.PercentileSchedule(model, warmup=max(1, options.steps // 2))  # from dense, along half a cosine
    print(f"a step is {found.speedup:.2f}x as fast: training with pruned gradients")
else:
    print(f"a step is {found.speedup:.2f}x as fast: training stays dense")
for step in range(options.steps):
    loss = train_step()
    if schedule:
        schedule.step()
    print(f"step {step + 1}: loss {loss:.3f}")
