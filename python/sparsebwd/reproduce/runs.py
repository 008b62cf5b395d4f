# SPDX-License-Identifier: Apache-2.0
"""The runs of a sweep, and what is known of each from its directory."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from ..train import checkpoint, log
from ..train.config import TrainConfig
from ..train.recipes import RECIPES
from . import timing
from .paper import DENSE

OUTPUT_FILE = "output.txt"
"""What the training command printed."""
FAILED_FILE = "not-finite.json"
"""There where the loss, or a weight, became infinite or no number: the run ends there each time."""

_SHORT = {"paper-cifar": "paper", "paper-imagenet": "paper"}
_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "imagenet": 1_281_167, "digits": 1_540}


@dataclass(frozen=True)
class Run:
    """One run: its name, that of its directory, and its options."""

    name: str
    config: TrainConfig
    folder: Path

    def arguments(self) -> list[str]:
        """Of the training command."""
        base = RECIPES.get(self.config.recipe, {})
        result = []
        for field in fields(self.config):
            value = getattr(self.config, field.name)
            if value == base.get(field.name, field.default):
                continue
            flag = field.name.replace("_", "-")
            if isinstance(value, bool):
                result.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                result += [f"--{flag}", "none" if value is None else str(value)]
        return [*result, "--output", str(self.folder)]

    def log(self) -> dict[str, Any] | None:
        return read_json(self.folder / log.JSON_FILE)

    @property
    def other(self) -> str | None:
        """How what is in the directory differs from this run; None where it does not."""
        record = self.log()
        if record is None:
            return None
        saved = record["config"]
        differences = self.config.differences(saved)
        for name in ("epochs", "max_steps"):
            if saved.get(name) != getattr(self.config, name) and not any(f"{name} is" in text for text in differences):
                differences.append(f"{name} is {saved.get(name)!r} there and {getattr(self.config, name)!r} here")
        return "; ".join(text.replace("in the checkpoint", "there") for text in differences) or None

    def done(self) -> bool:
        """Whether nothing is left to train: the run is at its end, or it cannot get there."""
        if (self.folder / FAILED_FILE).exists():
            return True
        record = self.log()
        return record is not None and record.get("summary") is not None

    def timed(self) -> bool:
        """Whether its times were measured, or there is nothing to measure."""
        return self.config.dense or (self.folder / timing.FILE).exists() or (self.folder / FAILED_FILE).exists()

    def has_checkpoint(self) -> bool:
        return (self.folder / checkpoint.FILE).exists()

    def images(self) -> int:
        """Training images: known from the log, or expected."""
        record = self.log()
        if record is not None:
            return record["data"]["train_images"]
        data = data_name(self.name)
        return min(_IMAGES.get(data, _IMAGES["cifar10"]), self.config.train_subset or 10**9)

    def steps(self) -> int:
        """Of the whole run."""
        return self.config.total_steps(max(1, self.images() // self.config.batch_size))

    def steps_done(self) -> int:
        """By the last line of the file of all steps."""
        try:
            with open(self.folder / log.STEPS_FILE, "rb") as file:
                file.seek(max(0, file.seek(0, 2) - 200))
                lines = file.read().splitlines()
        except OSError:
            return 0
        numbers = [int(line.partition(b",")[0]) for line in lines[1:] if line.partition(b",")[0].isdigit()]
        return max(numbers, default=0)


def data_name(name: str) -> str:
    """The data set in the name of a run."""
    return name.split("-")[1]


def plan(
    output: Path,
    models: Sequence[str],
    kinds: Sequence[str],
    seeds: Iterable[int],
    estimators: Sequence[str],
    recipe: str,
    data_set: str,
    also: dict[str, Any],
    **options: Any,
) -> list[Run]:
    """All combinations, in an order in which the first runs tell most: seed by seed.

    Args:
        kinds: percentiles as text, "none" and "dense".
        data_set: names the runs; options["data"] is what the training command reads it from.
        also: options that appear in the names, unless they change no result.
        options: of `TrainConfig`; those that are None are left to the recipe.

    Raises:
        ValueError: an option is out of range, see `TrainConfig`.
    """
    runs: dict[str, Run] = {}
    options = {name: value for name, value in options.items() if value is not None}
    for seed, model, kind, estimator in product(seeds, models, kinds, estimators):
        dense = kind == DENSE
        given = {**options, "model": model, "seed": seed, "dense": dense}
        if not dense:
            given["percentile"] = None if kind == "none" else float(kind)
        if kind not in (DENSE, "none"):  # nothing is estimated
            given["sigma_estimator"] = estimator
        config = TrainConfig.from_recipe(recipe, **given)
        wanted = {name: value for name, value in also.items() if not (dense and name in _SPARSITY)}
        name = f"{_name(config, data_set, kind)}{_differing(config, wanted)}-s{seed}"
        runs[name] = Run(name, replace(config, **wanted), output / name)
    return list(runs.values())


_SPARSITY = ("placement", "sigma_estimator", "threshold", "backend", "where")


def _differing(config: TrainConfig, also: dict[str, Any]) -> str:
    """What of `also` changes a result, for the name."""
    parts = [
        f"-{name}={value}"
        for name, value in also.items()
        if config.differences(asdict(replace(config, **{name: value})))
    ]
    return "".join(part.replace("/", "_") for part in parts)


def _name(config: TrainConfig, data_set: str, kind: str) -> str:
    recipe = RECIPES[config.recipe]
    parts = [config.model, data_set]
    parts += [f"w{config.width}"] if config.width is not None else []
    parts += [_SHORT.get(config.recipe, config.recipe)]
    parts += [f"e{config.epochs}"] if config.epochs != recipe.get("epochs", TrainConfig.epochs) else []
    parts += [f"n{config.train_subset}"] if config.train_subset is not None else []
    parts += [f"b{config.batch_size}"] if config.batch_size != recipe.get("batch_size", TrainConfig.batch_size) else []
    parts += [kind if kind == DENSE else f"p{kind}"]
    parts += ["printed"] if config.sigma_estimator == "as_printed" else []
    return "-".join(parts)


def parse_also(texts: Iterable[str]) -> dict[str, Any]:
    """KEY=VALUE, for options of the training command by name.

    Raises:
        ValueError: unknown, or not of the option's type.
    """
    kinds = typing.get_type_hints(TrainConfig)
    result = {}
    for text in texts:
        key, equals, value = text.partition("=")
        name = key.replace("-", "_")
        if not equals or name not in kinds:
            raise ValueError(
                f"also: got {text!r}; accepted: KEY=VALUE with an option of sparsebwd.train, as threshold=predicted"
            )
        result[name] = _value(text, kinds[name], value)
    return result


def _value(text: str, kind: Any, value: str) -> Any:
    kinds = typing.get_args(kind) or (kind,)
    if type(None) in kinds and value.lower() == "none":
        return None
    if bool in kinds:
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise ValueError(f"also: got {text!r}; accepted: true or false")
    for number in (int, float):
        if number in kinds:
            try:
                return number(value)
            except ValueError:
                raise ValueError(f"also: got {text!r}; accepted: a number") from None
    return value


def read_json(path: Path) -> dict[str, Any] | None:
    """None where it is not there, or is no such file."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
