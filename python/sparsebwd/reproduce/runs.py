# SPDX-License-Identifier: Apache-2.0
"""The runs of a sweep, and what is known of each from its directory."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from .. import opening
from ..arguments import shown
from ..commands import describe
from ..settings import KNOBS, Pruning
from ..train import checkpoint, log
from ..train.config import TrainConfig
from ..train.recipes import RECIPES
from . import timing
from .paper import DENSE

OUTPUT_FILE = "output.txt"
"""What the training command printed."""
FAILED_FILE = "not-finite.json"
"""There where the loss, or a weight, became infinite or no number: the run ends there each time."""

OF_SPARSE = {field.name for field in fields(Pruning)} & {field.name for field in fields(TrainConfig)}
OF_SPARSE |= {"exclude", "layer_percentile"}
"""Options that mean nothing to a dense run."""
LENGTH = ("epochs", "max_steps", "decay_epochs")
"""Options in which dense runs at equal time differ from others."""

_SHORT = {"paper-cifar": "paper", "paper-imagenet": "paper"}
_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "imagenet": 1_281_167, "digits": 1_540}


@dataclass(frozen=True)
class Run:
    """One run: its name, that of its directory, and its options."""

    name: str
    config: TrainConfig
    folder: Path
    data_set: str = ""  # the paper's name for it, where that is known

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
        return read_log(self.folder)

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
        """Whether nothing is left to train: this run, and no other, is at its end, or it cannot get there."""
        if self.other:
            return False
        return (self.folder / FAILED_FILE).exists() or (self.log() or {}).get("summary") is not None

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
        return min(_IMAGES.get(self.data_set, _IMAGES["cifar10"]), self.config.train_subset or 10**9)

    def steps(self) -> int:
        """Of the whole run."""
        return self.config.total_steps(max(1, self.images() // self.config.batch_size))

    def steps_done(self) -> int:
        """By the last line of the file of all steps."""
        try:
            with opening.open_regular(self.folder / log.STEPS_FILE) as file:
                file.seek(max(0, file.seek(0, 2) - 200))
                lines = file.read().splitlines()
        except OSError:
            return 0
        numbers = [int(line.partition(b",")[0]) for line in lines[1:] if line.partition(b",")[0].isdigit()]
        return max(numbers, default=0)


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
        kinds: percentiles as text, "none" and "dense". Percentiles are none where ``also`` says how much is pruned.
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
        if not dense and any(name in also for name in KNOBS[1:]):
            kind = ""
        given = {**options, "model": model, "seed": seed, "dense": dense}
        if not dense:
            given["percentile"] = float(kind) if kind not in ("", "none") else None
        if kind not in (DENSE, "none", ""):  # nothing is estimated
            given["sigma_estimator"] = estimator
        config = TrainConfig.from_recipe(recipe, **given)
        wanted = {name: value for name, value in also.items() if not (dense and name in OF_SPARSE)}
        name = f"{_name(config, data_set, kind)}{_differing(config, wanted)}-s{seed}"
        runs[name] = Run(name, replace(config, **wanted), output / name, data_set)
    return list(runs.values())


def found(output: Path) -> list[Run]:
    """What is in a folder, whoever made it, as far as it can be read; a run beside its dense twin is no run of a sweep."""
    result = []
    for path in sorted(output.glob(f"*/{log.JSON_FILE}")):
        with suppress(TypeError, ValueError, RuntimeError, KeyError):
            config = TrainConfig(**(read_json(path) or {})["config"])
            if not config.compare:
                result.append(Run(path.parent.name, config, path.parent))
    return result


def at_equal_time(planned: Sequence[Run]) -> list[Run]:
    """For each sparse run, the dense one of the same seed that is as long as it takes: fewer steps, by the median speed-up
    of a step over the seeds, and the schedule compressed to match. Those that are begun keep their length."""
    groups: dict[str, list[Run]] = {}
    for run in planned:
        if not run.config.dense:
            groups.setdefault(run.name.rpartition("-s")[0], []).append(run)
    result = []
    for group in groups.values():
        speedups = [speedup for run in group if (speedup := _step_speedup(run))]
        if speedups and median(speedups) > 1:  # otherwise the dense run takes no longer as it is
            result += [_at_equal_time(run, median(speedups)) for run in group]
    return result


def _step_speedup(run: Run) -> float | None:
    path = run.folder / timing.FILE
    entry = read_json(path)
    with reading(path):
        return entry["speedup"]["step"] if entry else None


def _at_equal_time(run: Run, speedup: float) -> Run:
    name = f"dense-as-{run.name}"
    folder = run.folder.with_name(name)
    ours = {name: getattr(TrainConfig, name) for name in OF_SPARSE}
    if begun := read_log(folder):
        length = {name: begun["config"][name] for name in LENGTH}
    elif run.config.schedule == "step":
        length = {name: max(1, round(getattr(run.config, name) / speedup)) for name in ("epochs", "decay_epochs")}
    else:
        length = {"max_steps": max(1, round(run.steps() / speedup))}
    return Run(name, replace(run.config, **{**ours, **length, "dense": True}), folder, run.data_set)


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
    parts += [kind] if kind == DENSE else [f"p{kind}"] if kind else []
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


class WrongContents(ValueError):
    """A file in the folder of a run that is not what this version writes. The message names it."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around the use of what a file, or files, in the folders of runs held. Raises WrongContents where they are of another form."""
    try:
        yield
    except WrongContents:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {describe(error)}"
        raise WrongContents(f"{path}: its contents are not what this version writes ({found}); move it away") from error


def read_log(folder: Path) -> dict[str, Any] | None:
    """The log of the run in a folder; None where there is none. Raises WrongContents if it is something else."""
    path = folder / log.JSON_FILE
    record = read_json(path)
    with reading(path):
        if record is not None:
            for name, kind in (("config", dict), ("data", dict), ("epochs", list)):
                if not isinstance(record[name], kind):
                    raise TypeError(f"{name} is {shown(record[name])}")
    return record


def read_json(path: Path) -> dict[str, Any] | None:
    """None where it is not there, or is no such file."""
    try:
        record = opening.read_json(path)
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
