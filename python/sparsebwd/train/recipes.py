# SPDX-License-Identifier: Apache-2.0
"""Named sets of options. What is given beside one counts."""

from __future__ import annotations

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    # Ye et al. (2019), section 4: as the defaults, which it keeps should they ever change.
    "paper-cifar": {
        "form": "cifar",
        "image_size": 32,
        "crop": "padded",
        "epochs": 300,
        "schedule": "step",
        "decay_epochs": 100,
        "decay_factor": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
    },
    "paper-imagenet": {
        "form": "imagenet",
        "image_size": 227,
        "crop": "resized",
        "epochs": 180,
        "schedule": "step",
        "decay_epochs": 45,
        "decay_factor": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
    },
    # For machines that cannot train for 300 epochs: ends with a rate near 0, however many epochs are given.
    "short": {
        "crop": "padded",
        "epochs": 15,
        "schedule": "one-cycle",
        "label_smoothing": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
    },
}
