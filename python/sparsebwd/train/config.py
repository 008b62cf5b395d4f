# SPDX-License-Identifier: Apache-2.0
"""What a training run is. The defaults are the settings of Ye et al. (2019) for CIFAR."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from .. import data, models
from ..arguments import MOST, as_float, as_int, check_flag, shown
from ..backends import get_backend
from ..commands import MOST_SEED, check_seed, check_threads
from ..settings import DEFAULT, KNOBS, Pruning, check_percentile, parse_granularity
from .recipes import RECIPES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SCHEDULES = ("step", "cosine", "one-cycle")

LARGEST_CIFAR = 112
"""Height and width of the largest images, in pixels, that the form "auto" takes to the networks for 32x32 images."""
SMALLEST_IMAGENET = 64
"""Of the smallest that the networks for 224x224 images take: they divide them by 32."""

_MOST_WORKERS = 512
_LARGEST = torch.finfo(torch.float32).max  # of what is multiplied with weights and gradients

# A resumed run may change these: they do not alter what was computed up to the checkpoint. The length of the run
# is among them, unless the learning rate depends on it.
_FREE = {
    "recipe",  # a name for what the other options say
    "data_dir",
    "cache_dir",
    "workers",
    "skip_unreadable",
    "checkpoint_steps",
    "tensorboard",
    "measure_every",
    "threads",
    "device",
}
_LENGTH = {"epochs", "max_steps"}


@dataclass(frozen=True)
class TrainConfig:
    """All options of a run.

    recipe: one of `RECIPES` that the other options were taken from, see `from_recipe`; None: of none.
    form: of the network, "cifar" or "imagenet"; "auto" takes "imagenet" for images above 112 pixels.
    width: channels of the first layer, all others in proportion; None: as published.
    percentile: in [50, 100), or None: nothing is pruned, only exact zeros are skipped; density, variance, noise: instead of it,
        see `sparsebwd.Pruning`. With noise, a `sparsebwd.NoiseController` sets the thresholds.
    granularity: "element", "row", "row:32" and so on, "sample" or "channel".
    importance: "image" or "none", whether images have thresholds of their own, by their inputs; "auto": with noise they do.
    placement: "auto", "output" or "input"; backend, sigma_estimator, threshold, where: see `sparsebwd.convert`. Here all
        is pruned that the paper prunes, unless where is "faster".
    exclude: layers that stay dense, with all below them: names, or patterns of them, between commas.
    layer_percentile: percentiles of single layers, such as "stem.0=none,stages.3.*=95"; of several that fit, the last counts.
    percentile_warmup: epochs in which percentiles rise from 50, which prunes nothing, to what was asked for, by half a cosine;
        `sparsebwd.PercentileSchedule`.
    dense: train the dense model only, by PyTorch's own convolutions; all about sparsity counts for nothing.
    compare: train the dense twin too, from the same weights, on the same batches, in turns.
    batch_size: images per step, over all processes.
    accumulate: parts that the batch of a process is computed in, one after the other; their gradients are summed.
    learning_rate: None takes the paper's, 0.05 for AlexNet and 0.1 for the others.
    schedule: "step" multiplies the rate by `decay_factor` every `decay_epochs`; "cosine" takes it to 0 at the end;
        "one-cycle" takes it from 1/25 up to `learning_rate` in 30 % of the steps, and to 0 at the end.
    label_smoothing: share of each label that is spread over all classes, in [0, 1); in training only.
    warmup_steps: the rate rises linearly over so many steps.
    max_steps: stop after so many steps, also in mid-epoch.
    train_subset, test_subset: use so many images, spread over the data set.
    crop: random crops of training images, "padded", "resized" or "auto"; stream, skip_unreadable: see `sparsebwd.data.load`.
    workers: processes that decode images ahead where they are streamed; None: 1 on a CPU, up to 8 beside a GPU.
    checkpoint_steps: write a checkpoint every so many steps, besides those at the end of each epoch.
    tensorboard: write scalars and histograms for TensorBoard.
    measure_every: every so many steps, densities and convolution times are recorded instead of step times.
    dtype: "float32", or "bfloat16" for autocast.
    compile: run the models through torch.compile.
    sync_bn: BatchNorm by the statistics of the batches of all processes.
    device: "auto", "cpu" or "cuda".

    Raises:
        TypeError, ValueError: an option is of another type, or out of range; the message names it, what was got and what is
            accepted.
        RuntimeError: the backend cannot run here.
    """

    recipe: str | None = None
    model: str = "resnet18"
    form: str = "auto"
    width: int | None = None
    data: str = "digits"
    percentile: float | None = DEFAULT
    density: float | None = None
    variance: float | None = None
    noise: float | None = None
    granularity: str = "element"
    importance: str = "auto"
    placement: str = "auto"
    sigma_estimator: str = "corrected"
    threshold: str = "exact"
    backend: str = "auto"
    where: str = "everywhere"
    exclude: str | None = None
    layer_percentile: str | None = None
    percentile_warmup: int = 0
    dense: bool = False
    compare: bool = False
    epochs: int = 300
    max_steps: int | None = None
    batch_size: int = 128
    accumulate: int = 1
    learning_rate: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "step"
    decay_epochs: int = 100
    decay_factor: float = 0.1
    warmup_steps: int = 0
    label_smoothing: float = 0.0
    seed: int = 0
    augment: bool = True
    crop: str = "padded"
    image_size: int = 32
    train_subset: int | None = None
    test_subset: int | None = None
    dtype: str = "float32"
    channels_last: bool = True
    compile: bool = False
    sync_bn: bool = False
    device: str = "auto"
    threads: int | None = None
    data_dir: str | None = None
    cache_dir: str | None = None
    stream: bool | None = None
    workers: int | None = None
    skip_unreadable: bool = False
    checkpoint_steps: int | None = None
    tensorboard: bool = False
    measure_every: int = 10

    def __post_init__(self) -> None:
        for option in fields(self):
            if option.name not in KNOBS:  # which Pruning checks
                object.__setattr__(self, option.name, _typed(option.name, option.type, getattr(self, option.name)))
        if self.recipe is not None:
            _among("recipe", self.recipe, RECIPES)
        _among("model", self.model, models.names())
        _among("form", self.form, ("auto", *models.IMAGE_SIZE))
        _among("data", self.data, data.names())
        _among("crop", self.crop, ("auto", *data.CROPS))
        _among("schedule", self.schedule, SCHEDULES)
        _among("dtype", self.dtype, DTYPES)
        _among("device", self.device, ("auto", "cpu", "cuda"))
        placement = "output" if self.placement == "auto" else self.placement
        settings = (placement, self.sigma_estimator, self.threshold, self.backend, self.where)
        amount = (self.density, self.variance, parse_granularity(self.granularity), self.noise, self.importance)
        pruning = Pruning(self.percentile, *settings, *amount)
        for name in KNOBS:
            object.__setattr__(self, name, getattr(pruning, name))
        if self.backend != "auto" and (reason := get_backend(self.backend).available()):
            raise RuntimeError(f"backend: {self.backend!r} cannot run: {reason}")
        if self.noise is not None and self.batch_size < 2 * self.accumulate:
            raise ValueError(
                f"noise: got {self.noise} with {self.batch_size} images a step in {self.accumulate} parts; accepted: with two images "
                "or more in each, as it is measured between halves"
            )
        self.layer_percentiles()
        _between("percentile_warmup", self.percentile_warmup, 0, MOST)
        if self.percentile_warmup and self.percentile is None and not self.layer_percentile and not self.dense:
            raise ValueError(
                f"percentile_warmup: got {self.percentile_warmup} with {pruning.asked}; accepted: with a percentile"
            )
        for name in ("epochs", "batch_size", "accumulate", "decay_epochs", "image_size", "measure_every"):
            _between(name, getattr(self, name), 1, MOST)
        if self.form == "imagenet" and self.image_size < SMALLEST_IMAGENET:
            raise ValueError(
                f"form: got 'imagenet' with images of {self.image_size} pixels, which would shrink to nothing; accepted "
                f"are an --image-size from {SMALLEST_IMAGENET} (the papers take 224), or the form 'cifar'"
            )
        if self.dense and self.compare:
            raise ValueError(
                "dense: got it beside compare, which trains the dense model and the sparse one; accepted is one of them"
            )
        for name in ("width", "max_steps", "train_subset", "test_subset", "checkpoint_steps"):
            if getattr(self, name) is not None:
                _between(name, getattr(self, name), 1, MOST)
        if self.threads is not None:
            check_threads(self.threads)
        if self.workers is not None:
            _between("workers", self.workers, 0, _MOST_WORKERS)
        check_seed(self.seed)
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: got {self.label_smoothing}, accepted are numbers in [0, 1)")
        _between("warmup_steps", self.warmup_steps, 0, MOST)
        _between("weight_decay", self.weight_decay, 0, _LARGEST)
        if self.learning_rate is not None and not 0 < self.learning_rate <= _LARGEST:
            raise ValueError(
                f"learning_rate: got {self.learning_rate}, accepted are numbers above 0, up to {_LARGEST:.4g}"
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: got {self.momentum}, accepted are numbers in [0, 1)")
        if not 0 < self.decay_factor <= 1:
            raise ValueError(f"decay_factor: got {self.decay_factor}, accepted are numbers in (0, 1]")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: got 'cuda', but PyTorch sees no CUDA device here; accepted are auto, cpu")

    @classmethod
    def from_recipe(cls, recipe: str, **options: Any) -> TrainConfig:
        """The options of a recipe, but for those given.

        Raises:
            ValueError: unknown `recipe`, or as for the class.
        """
        _among("recipe", recipe, RECIPES)
        return cls(**{"recipe": recipe, **RECIPES[recipe], **options})

    @property
    def network_form(self) -> str:
        """ "cifar" or "imagenet"."""
        if self.form != "auto":
            return self.form
        return "imagenet" if self.image_size > LARGEST_CIFAR else "cifar"

    def excluded_layers(self) -> list[str]:
        """Names, or patterns of them."""
        return [name.strip() for name in self.exclude.split(",")] if self.exclude else []

    def layer_percentiles(self) -> list[tuple[str, float | None]]:
        """Names, or patterns of them, with the percentile of those layers."""
        pairs = []
        for item in self.layer_percentile.split(",") if self.layer_percentile else ():
            name, equals, percentile = item.strip().rpartition("=")
            try:
                pairs.append((name, None if percentile == "none" else check_percentile(float(percentile))))
            except ValueError:
                equals = ""
            if not equals or not name:
                raise ValueError(
                    f"layer_percentile: got {item!r}, accepted are a layer and its percentile, in [50, 100) or none, such "
                    "as features.3=95, with commas between several"
                )
        return pairs

    def load_images(self) -> data.ImageData:
        """The images that the run is trained and tested on. Raises as `sparsebwd.data.load` does."""
        return data.load(
            self.data,
            data_dir=self.data_dir,
            cache_dir=self.cache_dir,
            image_size=self.image_size,
            stream=self.stream,
            crop=self.crop,
            strict=not self.skip_unreadable,
        )

    def total_steps(self, steps_per_epoch: int) -> int:
        """Length of the run."""
        steps = self.epochs * steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def learning_rate_at(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of step `step`, counted from 0 over the whole run."""
        rate = self.learning_rate
        if rate is None:
            rate = 0.05 if self.model == "alexnet" else 0.1
        if self.schedule == "step":
            rate *= self.decay_factor ** (step // steps_per_epoch // self.decay_epochs)
        elif self.schedule == "cosine":
            rate *= _cosine(step / self.total_steps(steps_per_epoch))
        else:
            rate *= _one_cycle(step, self.total_steps(steps_per_epoch))
        return rate * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else rate

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """How the options of a checkpoint differ from these, where a resumed run must have the same."""
        free = _FREE | _LENGTH if self.schedule == "step" else _FREE
        mine = asdict(self)
        # An option younger than the checkpoint had what is its default now.
        saved = {**{field.name: field.default for field in fields(self)}, **saved}
        unknown = [
            f"{shown(name)[1:-1]} is {shown(saved[name])} in the checkpoint and unknown here" for name in saved if name not in mine
        ]
        return unknown + [
            f"{field.name} is {shown(saved[field.name])} in the checkpoint and {shown(mine[field.name])} here"
            for field in fields(self)
            if field.name not in free and saved[field.name] != mine[field.name]
        ]


def _cosine(progress: float) -> float:
    """From 1 at 0 to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def _one_cycle(step: int, steps: int) -> float:
    """The cycle of Smith and Topin (2018), as torch.optim.lr_scheduler.OneCycleLR: a share of the highest rate."""
    start, end, top = 1 / 25, 1 / 25 / 1e4, 0.3 * steps - 1
    if step <= top:
        return 1 + (start - 1) * _cosine(step / top)
    return end + (1 - end) * _cosine((step - top) / (steps - 1 - top))


def _typed(name: str, annotation: str, value: Any) -> Any:
    """`value` in the type that the option of this name has, plain, as checkpoints and logs hold it. Raises TypeError."""
    kind, _, optional = annotation.partition(" | ")
    if value is None and optional:
        return None
    if kind == "int":
        return as_int(value, name, most=MOST_SEED if name == "seed" else MOST)
    if kind == "bool":
        if value is None:
            raise TypeError(f"{name}: got None; accepted: True or False")
        return check_flag(value, name)
    if kind == "float":
        return as_float(value, name, f"a number{' or None' if optional else ''}")
    if name.endswith("_dir") and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise TypeError(f"{name}: got {shown(value)}; accepted: a string{' or None' if optional else ''}")
    return value


def _among(name: str, value: str, accepted) -> None:
    if value not in accepted:
        raise ValueError(f"{name}: got {shown(value)}, accepted are {', '.join(accepted)}")


def _between(name: str, value: float, lowest: int, highest: float) -> None:
    if not lowest <= value <= highest:
        raise ValueError(f"{name}: got {shown(value)}, accepted are numbers from {lowest} to {highest:.4g}")
