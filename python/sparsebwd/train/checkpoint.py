# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole or absent, verified bit by bit, and refused where they do not fit.

A state is checked against that of the run which takes it up, before anything of it is used: the same names, dtypes and
shapes, finite numbers, a step within the run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import shown
from ..data.records import RecordError, load_record, save_record
from .config import TrainConfig
from .measure import EpochTally, speedups

FILE = "checkpoint.pt"
_FORMAT = 2
_KEYS = ("format", "config", "fingerprint", "state")
_MOST = sys.float_info.max
_ONE = 1.001  # of means, which are rounded
_SHARES = ("train_accuracy", "test_accuracy", "density")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or is not one of this run."""


class _Wrong(ValueError):
    """What is wrong with the contents, and where."""


def save(path: Path, config: dict[str, Any], fingerprint: str, state: dict[str, Any]) -> None:
    """Write `state`, of tensors and plain values only, with the run that it belongs to.

    Raises:
        OSError: it cannot be written; the checkpoint that was there before is as it was.
    """
    save_record(path, {"format": _FORMAT, "config": config, "fingerprint": fingerprint, "state": state})


def load(
    path: Path,
    config: TrainConfig,
    fingerprint: str,
    like: dict[str, Any],
    parameters: Mapping[str, Mapping[str, Tensor]],
    steps_per_epoch: int,
    controllers: Mapping[str, Callable[[Any], None]] | None = None,
) -> dict[str, Any]:
    """The state that `save` was given. No code in the file is run.

    Args:
        like: the state of this run at its beginning.
        parameters: those of each twin, by name.
        steps_per_epoch: of this run.
        controllers: of twins that have a NoiseController, what checks a state of it.

    Raises:
        CheckpointError: truncated, corrupt, of another format, with wrong contents, or of a run with another
            configuration or other images.
        OSError: the file cannot be read.
    """
    try:
        record = load_record(path)
    except RecordError as error:
        raise CheckpointError(f"{path}: {error}; restore it from a copy, or start again with --overwrite") from error
    try:
        _check_keys("checkpoint", record, _KEYS)
        _check_type("format", record["format"], int)
        if record["format"] != _FORMAT:
            raise CheckpointError(f"{path}: got format {shown(record['format'])}, accepted is {_FORMAT}")
        _check_plain("config", record["config"])
        _check_type("fingerprint", record["fingerprint"], str)
        differences = config.differences(record["config"])
        if not differences and record["fingerprint"] != fingerprint:
            differences = ["the images or labels are not the same"]
        if differences:
            raise CheckpointError(f"{path}: a checkpoint of another run: {'; '.join(differences)}")
        _check_state(record["state"], like, parameters, config, steps_per_epoch, controllers or {})
    except _Wrong as error:
        raise CheckpointError(
            f"{path}: its contents are wrong: {error}; restore it from a copy, or start again with --overwrite"
        ) from None
    return record["state"]


# Beyond, squares overflow float32: with such weights, statistics or gradients no run learns anything.
_LARGEST = math.sqrt(torch.finfo(torch.float32).max)


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError naming the first that is not finite, or absurdly large."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        largest = float(tensor.detach().abs().max())  # NaN if one is
        if not math.isfinite(largest):
            raise _Wrong(f"{name} is not finite")
        if largest > _LARGEST:
            raise _Wrong(f"{name} has {largest:.3g}; accepted are magnitudes up to {_LARGEST:.3g}")


def _check_state(
    state: Any,
    like: dict[str, Any],
    parameters: Mapping[str, Mapping[str, Tensor]],
    config: TrainConfig,
    steps_per_epoch: int,
    controllers: Mapping[str, Callable[[Any], None]],
) -> None:
    _check_keys("state", state, like)
    _check_plain("environment", state["environment"])
    step = state["step"]
    _check_type("step", step, int)
    total_steps = config.total_steps(steps_per_epoch)
    if not 0 <= step <= total_steps:
        raise _Wrong(f"got step {shown(step)}, but this run has {total_steps} steps (epochs, max_steps)")
    _check_keys("twins", state["twins"], like["twins"])
    for name, twin in state["twins"].items():
        expected = like["twins"][name]
        _check_keys(name, twin, expected)
        _check_tensors(f"{name}.model", twin["model"], expected["model"])
        _check_tensors(f"{name}.sigma_histories", twin["sigma_histories"], expected["sigma_histories"])
        # Those of the beginning are empty.
        momenta = parameters[name] if step and config.momentum else {}
        _check_tensors(f"{name}.momenta", twin["momenta"], momenta)
        _check_tally(f"{name}.tally", twin["tally"])
        if "noise" in expected:
            try:
                controllers[name](twin["noise"])
            except (TypeError, ValueError) as error:
                raise _Wrong(f"{name}.noise: {error}") from None
    _check_history(state["history"], step, steps_per_epoch, like["twins"])


def _check_tensors(where: str, got: Any, expected: Mapping[str, Tensor]) -> None:
    _check_keys(where, got, expected)
    for name, like in expected.items():
        tensor = got[name]
        _check_type(f"{where}.{name}", tensor, Tensor)
        for quantity in ("layout", "dtype", "shape"):
            found, wanted = getattr(tensor, quantity), getattr(like, quantity)
            if found != wanted:
                raise _Wrong(f"{where}.{name}: got {quantity} {_plain(found)}, this run has {_plain(wanted)}")
        require_finite({f"{where}.{name}": tensor})
        # Integers are counts, and bits of positive floats.
        if (name.endswith("running_var") or not tensor.is_floating_point()) and (tensor < 0).any():
            raise _Wrong(f"{where}.{name} is negative")
        if name.endswith("sigma_history"):
            require_finite({f"{where}.{name}": tensor[1:].view(torch.float32)})  # behind the count


def _check_tally(where: str, tally: Any) -> None:
    like = asdict(EpochTally())
    _check_keys(where, tally, like)
    for name, empty in like.items():
        at, value = f"{where}.{name}", tally[name]
        if name == "layers":
            _check_layers(at, value, _check_sum)
        elif isinstance(empty, list):
            _check_numbers(at, value)
        else:
            _check_number(at, value)
    if tally["correct"] > tally["images"]:
        raise _Wrong(f"{where}.correct: got {tally['correct']} of {tally['images']} images")


def _check_sum(where: str, got: Any) -> None:
    """[sum, count] of a quantity of layers."""
    _check_numbers(where, got, 2)
    total, count = got
    _check_type(where, count, int)
    if count < 1 or where.endswith(".density") and total > _ONE * count:
        raise _Wrong(f"{where}: got the sum {total} of {count} values")


def _check_history(history: Any, step: int, steps_per_epoch: int, twins: Iterable[str]) -> None:
    """An entry for each epoch that is complete, and one of the last step if it was the end of a shorter run."""
    _check_type("history", history, list)
    row_like = {**EpochTally().row(), "test_loss": None, "test_accuracy": None}
    for index, entry in enumerate(history):
        at = f"history[{index}]"
        _check_keys(at, entry, ("epoch", "global_step", "complete", "learning_rate", "variants", "speedup"))
        ended = (index + 1) * steps_per_epoch  # if it is complete
        expected = {"epoch": index + 1, "global_step": min(ended, step), "complete": ended <= step}
        for key, value in expected.items():
            _check_type(f"{at}.{key}", entry[key], type(value))
            if entry[key] != value:
                raise _Wrong(f"{at}.{key}: got {shown(entry[key])}, in a state of step {step} accepted is {value}")
        _check_number(f"{at}.learning_rate", entry["learning_rate"])
        _check_keys(f"{at}.variants", entry["variants"], twins)
        for name, row in entry["variants"].items():
            _check_keys(f"{at}.{name}", row, row_like)
            for key, value in row.items():
                if key == "layers":
                    _check_layers(f"{at}.{name}.layers", value, _check_number)
                elif value is not None:
                    # The loss of a test may be infinite, or NaN: it is only reported.
                    _check_number(f"{at}.{name}.{key}", value, finite=key != "test_loss")
                    if key in _SHARES and value > _ONE:
                        raise _Wrong(f"{at}.{name}.{key}: got {value}, accepted are numbers from 0 to 1")
        _check_keys(f"{at}.speedup", entry["speedup"], speedups({}))
        for key, value in entry["speedup"].items():
            if value is not None:
                _check_number(f"{at}.speedup.{key}", value)
    # A state may be that of the last step of an epoch before its end was noted.
    complete, more = divmod(step, steps_per_epoch)
    least = complete - (not more and complete > 0)
    if not least <= len(history) <= complete + (more > 0):
        raise _Wrong(f"history: got {len(history)} epochs in a state of step {step}, accepted are {least} to {complete + (more > 0)}")


def _check_layers(where: str, layers: Any, check) -> None:
    """A dictionary of layers, in each one of quantities."""
    _check_type(where, layers, dict)
    for name, quantities in layers.items():
        _check_type(f"{where}.{name}", quantities, dict)
        for quantity, value in quantities.items():
            check(f"{where}.{name}.{quantity}", value)


def _check_keys(where: str, got: Any, expected: Iterable[str]) -> None:
    _check_type(where, got, dict)
    missing = [str(key) for key in expected if key not in got]
    unknown = [str(key) for key in got if key not in set(expected)]
    if missing or unknown:
        found = [f"lacks {', '.join(missing[:3])}"] if missing else []
        found += [f"has {', '.join(unknown[:3])}, which this run has not"] if unknown else []
        raise _Wrong(f"{where} {' and '.join(found)}")


def _check_type(where: str, got: Any, accepted: type) -> None:
    if not isinstance(got, accepted) or (accepted is int and isinstance(got, bool)):
        raise _Wrong(f"{where}: got {type(got).__name__}, accepted is {accepted.__name__}")


def _check_plain(where: str, got: Any) -> None:
    """A dictionary of what can be compared and shown."""
    _check_type(where, got, dict)
    for name, value in got.items():
        _check_type(f"{where}: a name", name, str)
        if value is not None and not isinstance(value, str | int | float):
            raise _Wrong(f"{where}.{name}: got {type(value).__name__}, accepted are strings, numbers and None")


def _check_number(where: str, got: Any, finite: bool = True) -> None:
    """All that is measured is positive, or 0."""
    number = isinstance(got, float | int) and not isinstance(got, bool)
    if not number or got < 0 or finite and not got <= _MOST:
        text = shown(got) if number else type(got).__name__
        raise _Wrong(f"{where}: got {text}, accepted are {'finite ' if finite else ''}numbers from 0")


def _check_numbers(where: str, got: Any, length: int | None = None) -> None:
    _check_type(where, got, list)
    if length is not None and len(got) != length:
        raise _Wrong(f"{where}: got {len(got)} numbers, accepted are {length}")
    for value in got:
        _check_number(where, value)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, torch.Size) else value
