# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole or absent, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..data import atomic_write
from .config import TrainConfig

FILE = "checkpoint.pt"
_FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or is not one of this run."""


def save(path: Path, config: dict[str, Any], fingerprint: str, state: dict[str, Any]) -> None:
    """Write `state`, of tensors and plain values only, with the run that it belongs to."""
    record = {"format": _FORMAT, "config": config, "fingerprint": fingerprint, "state": state}
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save(record, file)


def load(path: Path, config: TrainConfig, fingerprint: str) -> dict[str, Any]:
    """The state that `save` was given. No code in the file is run.

    Raises:
        CheckpointError: truncated, corrupt, or of a run with another configuration or other images.
    """
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
        version, saved, images = record["format"], record["config"], record["fingerprint"]
        state = record["state"]
    except Exception as error:  # zip, pickle and key errors alike: what is read is not what was written
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: truncated or corrupt, or no checkpoint of this program ({reason}); "
            "restore it from a copy, or start again with --overwrite"
        ) from error
    if version != _FORMAT:
        raise CheckpointError(f"{path}: got format {version}, accepted is {_FORMAT}")
    differences = config.differences(saved)
    if not differences and images != fingerprint:
        differences = ["the images or labels are not the same"]
    if differences:
        raise CheckpointError(f"{path}: a checkpoint of another run: {'; '.join(differences)}")
    return state
