# SPDX-License-Identifier: Apache-2.0
"""Automatic mixed precision: `autocast`, and a `GradScaler` for float16.

    python examples/mixed_precision.py                      # bfloat16; on CPUs without instructions for it slower than float32
    python examples/mixed_precision.py --dtype float16      # on a GPU

Gradients are pruned in the dtype that autocast gives the convolution. Thresholds follow the scale of the loss, which takes
nothing from the caller; an Inf or NaN passes through, and the scaler skips the step as it would.
"""

import argparse

import torch
import torch.nn.functional as F

import sparsebwd
from sparsebwd import models

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
parser.add_argument("--model", default="resnet18", choices=models.names())
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--steps", type=int, default=10)
options = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = getattr(torch, options.dtype)
images = torch.randn(options.batch_size, 3, 32, 32).to(device, memory_format=torch.channels_last)
labels = torch.randint(10, (options.batch_size,), device=device)

model = models.create(options.model, num_classes=10).to(device, memory_format=torch.channels_last)
sparsebwd.convert(model, percentile=90)
optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

with sparsebwd.DensityMonitor(model) as monitor:
    for step in range(options.steps):
        optimiser.zero_grad()
        with torch.autocast(device, dtype):  # forward only: backward takes the same dtypes
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        print(f"step {step + 1}: loss {loss.item():.3f}")

print(monitor)
