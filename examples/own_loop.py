# SPDX-License-Identifier: Apache-2.0
"""A training loop of your own: two lines more, and everything else stays as it is.

    python examples/own_loop.py
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

import sparsebwd
from sparsebwd import models


def digits() -> TensorDataset:
    """1797 images of handwritten digits, 3x32x32 in [0, 1], with their labels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return TensorDataset(F.interpolate(images, 32).expand(-1, 3, -1, -1), torch.tensor(labels))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--steps", type=int, help="at most so many steps an epoch")
parser.add_argument("--model", default="resnet18", choices=models.names())
options = parser.parse_args()

torch.manual_seed(0)
train, test = random_split(digits(), [1540, 257])
device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cpu":
    sparsebwd.keep_memory()  # each step then reuses the memory of the one before

model = models.create(options.model, num_classes=10).to(device, memory_format=torch.channels_last)
sparsebwd.convert(model, percentile=90)  # after the model is where it will be trained
optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

for epoch in range(options.epochs):
    model.train()
    for step, (images, labels) in enumerate(DataLoader(train, batch_size=32, shuffle=True)):
        if step == options.steps:
            break
        images = images.to(device, memory_format=torch.channels_last)
        loss = F.cross_entropy(model(images), labels.to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    model.eval()  # nothing is pruned here
    with torch.no_grad():
        right = sum(
            int((model(images.to(device)).argmax(1) == labels.to(device)).sum())
            for images, labels in DataLoader(test, batch_size=128)
        )
    print(f"epoch {epoch + 1}: training loss {loss.item():.3f}, test accuracy {right / len(test):.1%}")

# Checkpoints load into models that were never converted, and the other way round.
models.create(options.model, num_classes=10).load_state_dict(model.state_dict())
