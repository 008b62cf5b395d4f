# SPDX-License-Identifier: Apache-2.0
"""Files of gradients that were captured from a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsebwd.data.records import load_record, save_record
from sparsebwd.problem import ConvProblem

_FORMAT = "sparsebwd-gradients-1"


@dataclass(frozen=True)
class Captured:
    """The gradient of one convolution's output in one training step.

    layer: name of the module, as "stages.0.0.conv1".
    problem: the convolution, batch included.
    step: training steps that were finished before the one that it is of.
    needs_grad_input: whether training computes AGB; False for the first layer of a network.
    grad_output: (N, K, P, Q), as it reached the convolution, before it was pruned.
    """

    layer: str
    problem: ConvProblem
    step: int
    needs_grad_input: bool
    grad_output: Tensor

    def __post_init__(self) -> None:
        got = tuple(self.grad_output.shape)
        if got != self.problem.output_size:
            raise ValueError(
                f"grad_output: got shape {got}; accepted: {self.problem.output_size}, the output of {self.problem}"
            )


@dataclass(frozen=True)
class GradientFile:
    """Gradients, and the training run that they are from.

    model, data: names as `python -m sparsebwd.train` takes them.
    percentile: at which the run pruned; None if it did not.
    placement: which gradients it pruned, "output" or "input"; "input+output" where layers differ. With "input",
        `grad_output` has the zeros that a rectifier left, and the convolutions consume it as it is.
    """

    model: str
    data: str
    percentile: float | None
    placement: str
    gradients: tuple[Captured, ...]


def save(path: Path, captured: GradientFile) -> None:
    """Write the file, whole or not at all. Raises OSError if that fails."""
    record = vars(captured) | {
        "format": _FORMAT,
        "gradients": [vars(found) | {"problem": str(found.problem)} for found in captured.gradients],
    }
    save_record(path, record)


def load(path: Path) -> GradientFile:
    """What `save` was given, verified bit by bit. No code in the file is run.

    Raises:
        ValueError: there is no such file, or it is truncated, corrupt or another kind of file.
    """
    try:
        record: dict[str, Any] = load_record(path)
        if record.pop("format") != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT}")
        gradients = tuple(
            Captured(**found | {"problem": ConvProblem.parse(found["problem"])}) for found in record.pop("gradients")
        )
        return GradientFile(**record, gradients=gradients)
    except OSError as error:
        raise ValueError(f"gradients: {path}: {error.strerror or error}") from error
    except Exception as error:  # zip, pickle, key and type errors alike: what is read is not what was written
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"gradients: {path} is truncated or corrupt, or was not written by `python -m sparsebwd.bench capture` "
            f"({reason})"
        ) from error
