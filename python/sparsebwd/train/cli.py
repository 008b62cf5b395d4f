# SPDX-License-Identifier: Apache-2.0
"""The command line of `python -m sparsebwd.train`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from .. import data, models
from ..backends import registered_backends
from ..commands import GroupedCommand, call, check_environment, describe, fail, new_app, one_line_errors
from ..data.files import remove_leftovers
from ..memory import keep_memory
from ..settings import Pruning
from . import checkpoint, log
from .config import LARGEST_CIFAR, SCHEDULES, TrainConfig
from .lock import LockedError, locked
from .recipes import RECIPES
from .report import Reporter
from .stop import Signals
from .trainer import Trainer, TrainingError
from .world import World, join, launched

_FILES = (checkpoint.FILE, log.CSV_FILE, log.JSON_FILE, log.STEPS_FILE)

_FORMS = {"cifar": "CIFAR", "imagenet": "ImageNet"}

# Under three minutes on two cores with AVX2, less with AVX-512: two epochs of digits, or as many steps on other images, with a
# schedule to match.
_DEMO = {
    "compare": True,
    "width": 48,
    "epochs": 2,
    "max_steps": 96,
    "test_subset": 500,
    "batch_size": 32,
    "learning_rate": 0.05,
    "schedule": "cosine",
    "warmup_steps": 10,
    "measure_every": 5,
    "output": "runs/demo",
    "overwrite": True,
}


app = new_app()


def _option(group: str, metavar: str | None, text: str, *names: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=text, rich_help_panel=group)


_what = partial(_option, "What to train")
_sparsity = partial(_option, "Sparsity")
_optimisation = partial(_option, "Optimisation")
_machine = partial(_option, "Machine")
_output = partial(_option, "Output")
_D = TrainConfig


@app.command(cls=GroupedCommand)
def command(
    context: typer.Context,
    demo: Annotated[bool, _what(None, "Run a short training beside its dense twin, on a schedule to match; other options still count.", "--demo")] = False,
    recipe: Annotated[str | None, _what("NAME", f"{', '.join(RECIPES)}: options by name; other options still count.")] = _D.recipe,
    model: Annotated[str, _what("NAME", f"{', '.join(models.names())}.")] = _D.model,
    form: Annotated[str, _what("NAME", "Of the network: cifar, for 32x32 images, imagenet, for 224x224, or auto, by --image-size.")] = _D.form,
    width: Annotated[int | None, _what("N", "Channels of the first layer, all others in proportion. Default: 64, MobileNet 32.")] = _D.width,
    data: Annotated[str, _what("NAME", f"{', '.join(data.names())}.")] = _D.data,
    data_dir: Annotated[str | None, _what("DIR", "Where the data set's files are.")] = _D.data_dir,
    cache_dir: Annotated[str | None, _what("DIR", "Where decoded images are kept. Default: ~/.cache/sparsebwd.")] = _D.cache_dir,
    image_size: Annotated[int, _what("PIXELS", "Height and width of the images.")] = _D.image_size,
    train_subset: Annotated[int | None, _what("N", "Train on N images only.")] = _D.train_subset,
    test_subset: Annotated[int | None, _what("N", "Test on N images only.")] = _D.test_subset,
    augment: Annotated[bool, _what(None, "Random crops and mirror images.", "--augment/--no-augment")] = _D.augment,
    crop: Annotated[str, _what("NAME", "padded, as is usual for CIFAR; resized, as for ImageNet; auto: by the size of the images.")] = _D.crop,
    stream: Annotated[bool | None, _what(None, "Decode images for each batch, not once for all. Default: where that takes over 8 GiB.", "--stream/--no-stream")] = _D.stream,
    workers: Annotated[int | None, _what("N", "Processes that decode, where images are streamed. Default: 1, or up to 8 beside a GPU.")] = _D.workers,
    skip_unreadable: Annotated[bool, _what(None, "Leave out images that cannot be read, instead of ending.", "--skip-unreadable")] = _D.skip_unreadable,
    dense: Annotated[bool, _what(None, "Train the dense model only.", "--dense")] = _D.dense,
    compare: Annotated[bool, _what(None, "Train the dense twin too, from the same weights, step by step in turns.", "--compare")] = _D.compare,
    percentile: Annotated[str, _sparsity("P", "In [50, 100), or none: skip exact zeros only.")] = f"{_D.percentile:g}",
    density: Annotated[float | None, _sparsity("D", "Instead of a percentile: the fraction of elements kept, in (0, 1].")] = _D.density,
    variance: Annotated[float | None, _sparsity("V", "Instead of a percentile: the variance that pruning adds to each gradient, of its norm squared.")] = _D.variance,
    noise: Annotated[float | None, _sparsity("R", "Instead of a percentile: the noise that pruning adds to weight gradients, of that of minibatches.")] = _D.noise,
    granularity: Annotated[str, _sparsity("NAME", "What is kept or dropped as a whole: element, row (64 channels of a pixel), row:32, sample, channel.")] = _D.granularity,
    importance: Annotated[str, _sparsity("NAME", "image: each image has a threshold of its own, by the norm of its input; none; or auto, image with noise.")] = _D.importance,
    placement: Annotated[str, _sparsity("WHERE", "Prune the gradient of the output (Conv-BN-ReLU), of the input (Conv-ReLU), or auto.")] = _D.placement,
    sigma_estimator: Annotated[str, _sparsity("NAME", "corrected, or as_printed in the paper.")] = _D.sigma_estimator,
    threshold: Annotated[str, _sparsity("NAME", "exact; sampled, of a part of each gradient; or predicted from the last few.")] = _D.threshold,
    backend: Annotated[str, _sparsity("NAME", f"{', '.join(('auto', *registered_backends()))}.")] = _D.backend,
    exclude: Annotated[str | None, _sparsity("LAYER,...", "Layers that stay dense, with all below them: names, or patterns such as *.shortcut*")] = _D.exclude,
    layer_percentile: Annotated[str | None, _sparsity("LAYER=P,...", "Percentiles of single layers, by names or patterns.")] = _D.layer_percentile,
    percentile_warmup: Annotated[int, _sparsity("EPOCHS", "In which percentiles rise from 50, which prunes nothing.")] = _D.percentile_warmup,
    where: Annotated[str, _sparsity("NAME", "everywhere, as in the paper, or faster: only where sparse kernels can gain something.")] = _D.where,
    epochs: Annotated[int, _optimisation("N", "Length of the run.")] = _D.epochs,
    max_steps: Annotated[int | None, _optimisation("N", "Stop after N steps.")] = _D.max_steps,
    batch_size: Annotated[int, _optimisation("N", "Images per step, over all processes.")] = _D.batch_size,
    accumulate: Annotated[int, _optimisation("N", "Compute the batch in N parts, which need less memory.")] = _D.accumulate,
    learning_rate: Annotated[float | None, _optimisation("RATE", "At the start. Default: 0.05 for AlexNet, 0.1 for the others.", "--learning-rate", "--lr")] = _D.learning_rate,
    momentum: Annotated[float, _optimisation("M", "Of SGD.")] = _D.momentum,
    weight_decay: Annotated[float, _optimisation("W", "Of SGD.")] = _D.weight_decay,
    schedule: Annotated[str, _optimisation("NAME", f"Of the learning rate: {', '.join(SCHEDULES)}; all but step end at 0.")] = _D.schedule,
    label_smoothing: Annotated[float, _optimisation("S", "Share of each label that is spread over all classes.")] = _D.label_smoothing,
    decay_epochs: Annotated[int, _optimisation("N", "Step schedule: epochs at each rate.")] = _D.decay_epochs,
    decay_factor: Annotated[float, _optimisation("F", "Step schedule: from each rate to the next.")] = _D.decay_factor,
    warmup_steps: Annotated[int, _optimisation("N", "Steps in which the rate rises to its start.")] = _D.warmup_steps,
    seed: Annotated[int, _optimisation("SEED", "Of weights, batches and pruning.")] = _D.seed,
    device: Annotated[str, _machine("NAME", "auto, cpu or cuda.")] = _D.device,
    threads: Annotated[int | None, _machine("N", "CPU threads. Default: as PyTorch chooses.")] = _D.threads,
    dtype: Annotated[str, _machine("NAME", "float32, or bfloat16 by autocast.")] = _D.dtype,
    channels_last: Annotated[bool, _machine(None, "Memory format of images and weights.", "--channels-last/--no-channels-last")] = _D.channels_last,
    compile: Annotated[bool, _machine(None, "By torch.compile.", "--compile")] = _D.compile,
    sync_bn: Annotated[bool, _machine(None, "BatchNorm by the statistics of all processes together.", "--sync-bn")] = _D.sync_bn,
    distributed: Annotated[bool, _machine(None, "Insist on torchrun; without this it is used where it started the process.", "--distributed")] = False,
    output: Annotated[str | None, _output("DIR", "Logs and checkpoint. Default: runs/MODEL-DATA-pP, or -dense.")] = None,
    resume: Annotated[bool, _output(None, "Go on from the checkpoint in DIR, to the same bits as without a stop.", "--resume")] = False,
    overwrite: Annotated[bool, _output(None, "Replace the run in DIR.", "--overwrite")] = False,
    checkpoint_steps: Annotated[int | None, _output("N", "A checkpoint every N steps, besides those after each epoch.")] = _D.checkpoint_steps,
    tensorboard: Annotated[bool, _output(None, "Scalars and histograms of gradients for TensorBoard, in DIR/tensorboard.", "--tensorboard")] = _D.tensorboard,
    measure_every: Annotated[int, _output("N", "Record densities and convolution times every N steps.")] = _D.measure_every,
) -> None:
    """Train a convolutional network with pruned activation gradients and sparse backward convolutions.

    The defaults are the settings of Ye et al. (2019) for CIFAR.
    """
    with one_line_errors():
        raise typer.Exit(_train(context))


def main(arguments: Sequence[str] | None = None, prog: str = "python -m sparsebwd.train") -> int:
    """Parse the arguments and train. Returns the exit status: 0, 1 if training failed, 128 and its number if a signal
    ended it.

    Raises:
        SystemExit: with status 2 and a message where an argument or a file is refused.
    """
    with one_line_errors():
        return call(app, arguments, prog)


def options_of(context: typer.Context) -> dict[str, Any]:
    """The options by the names of their parameters: those that were given, of the recipe, of the demonstration, or else the
    defaults."""
    given = {name: value for name, value in context.params.items() if context.get_parameter_source(name).name != "DEFAULT"}
    recipe = RECIPES.get(context.params["recipe"], {})
    usual = {**context.params, "percentile": TrainConfig.percentile}  # which gives way to a density, a variance or noise
    return {**usual, **(_DEMO if context.params["demo"] else {}), **recipe, **given}


def config_of(options: Mapping[str, Any]) -> TrainConfig:
    """Raises TypeError, ValueError, RuntimeError: see :class:`TrainConfig`."""
    names = {field.name for field in fields(TrainConfig)}
    config = {name: value for name, value in options.items() if name in names}
    return TrainConfig(**{**config, "percentile": _percentile(options["percentile"])})


def _train(context: typer.Context) -> int:
    options = options_of(context)
    with ExitStack() as stack:
        try:
            check_environment()
            config = config_of(options)
            if options["distributed"] and not launched():
                raise ValueError("distributed: start the processes with torchrun --nproc-per-node N -m sparsebwd.train ...")
            world = stack.enter_context(join(config.device))
        except (ValueError, RuntimeError) as error:
            fail(f"error: {describe(error)}", 2)
        if world.device.type == "cpu":
            keep_memory()  # for both sides
        # Not before: while processes wait for each other to join, no handler would be called.
        signals = stack.enter_context(Signals().handled())
        return _run(options, config, world, signals)


def _run(options: Mapping[str, Any], config: TrainConfig, world: World, signals: Signals) -> int:
    asked = {"d": config.density, "v": config.variance, "noise": config.noise, "p": config.percentile}
    kind = next((f"{letter}{value}" for letter, value in asked.items() if value is not None), "pnone")
    kind = "dense" if config.dense else kind
    folder = Path(options["output"] or f"runs/{config.model}-{config.data}-{kind}")
    reporter = Reporter(Console(quiet=world.rank > 0))
    with ExitStack() as stack:
        try:
            try:
                stack.enter_context(_claimed(folder, world))
                trainer = _prepare(config, folder, options, world, reporter, signals)
            except ValueError as error:
                fail(f"error: {describe(error)}", 2)
            except OSError as error:
                if not error.filename:
                    raise
                fail(f"error: {describe(error)}", 2)
            summary = trainer.fit()
        except (TrainingError, OSError) as error:
            if isinstance(error, OSError) and not error.filename:
                raise  # not of a file of the run
            print(f"error: {describe(error)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt as error:
            print(_ended(error, folder), file=sys.stderr)
            return getattr(error, "status", 130)
    reporter.summary(summary, folder)
    if options["demo"]:
        reporter.demo(summary)
    return 0


def _ended(error: KeyboardInterrupt, folder: Path) -> str:
    """What a signal did, and how to go on."""
    text = str(error) or "interrupted"
    if getattr(error, "saved", False):
        return f"{text}; the same command with --resume goes on from here"
    if (folder / checkpoint.FILE).is_file():
        return f"{text}; the same command with --resume goes on from the last checkpoint"
    return f"{text} before the first step"


@contextmanager
def _claimed(folder: Path, world: World) -> Iterator[None]:
    """The folder, locked by process 0 for all, without what killed runs left of the files of a run.

    Raises:
        ValueError: another run writes there.
    """
    with ExitStack() as stack:
        refused = None
        if world.rank == 0:
            try:
                stack.enter_context(locked(folder))
                remove_leftovers(folder, _FILES)
            except LockedError as error:
                refused = f"output: {error}: name another folder, or wait until it has ended"
            except OSError as error:
                refused = f"output: {describe(error)}"
        refused = world.broadcast(refused)
        if refused is not None:
            raise ValueError(refused)
        yield


def _prepare(
    config: TrainConfig,
    folder: Path,
    options: Mapping[str, Any],
    world: World,
    reporter: Reporter,
    signals: Signals,
) -> Trainer:
    """Everything up to the first step; what the user got wrong shows here."""
    found = [name for name in _FILES if os.path.lexists(folder / name)]
    if found and not options["overwrite"] and not (options["resume"] and checkpoint.FILE in found):
        resume = "continue it with --resume, " if checkpoint.FILE in found else ""
        raise ValueError(
            f"output: {folder} holds a run already ({', '.join(found)}): {resume}replace it with --overwrite, "
            "or name another folder"
        )
    with world.one_first():
        images = config.load_images()
    trainer = Trainer(config, images, folder, world, reporter, signals)
    about = trainer.data.description
    if config.dense:
        pruning = "dense"
    else:
        pruning = Pruning(config.percentile, density=config.density, variance=config.variance, noise=config.noise).asked
        pruning += f" of each {config.granularity}" if config.granularity != "element" else ""
        pruning += f" with importance {config.importance}" if config.importance != "auto" else ""
        pruning += f" with {config.threshold} thresholds" if config.threshold != "exact" else ""
    reporter.say(
        f"{config.model} in its {_FORMS[config.network_form]} form ({trainer.parameters / 1e6:.2f} million parameters), "
        f"{pruning}{', and its dense twin' if config.compare else ''}, on {world.device.type}"
        + (f", threads: {torch.get_num_threads()}" if world.device.type == "cpu" else "")
        + (f", processes: {world.size}" if world.size > 1 else "")
    )
    reporter.say(
        f"{about['name']}: {about['train_images']} training and {about['test_images']} test images of "
        f"{about['image_size']}x{about['image_size']} pixels, {about['classes']} classes; "
        f"{config.batch_size} images a step"
        + (f"; decoded as they are needed, workers: {trainer.workers}" if trainer.workers is not None else "")
    )
    size = config.image_size
    if config.network_form == "cifar" and size > LARGEST_CIFAR:
        reporter.warn(
            f"form: the first layers of the CIFAR form have no strides, and take {size}x{size} images "
            f"{(size / 32) ** 2:.0f} times as long as 32x32; --form imagenet is made for 224x224"
        )
    trainer.show_notes()
    if options["resume"]:
        if trainer.resume():
            reporter.say(f"resumed after step {trainer.steps_done} from {folder / checkpoint.FILE}")
        else:
            reporter.warn(f"there is no checkpoint in {folder} to resume: this run starts at the beginning")
    elif world.rank == 0:
        # Otherwise a later --resume could take up the run that this one replaces.
        (folder / checkpoint.FILE).unlink(missing_ok=True)
    return trainer


def _percentile(text: str | float | None) -> float | None:
    if not isinstance(text, str):
        return text
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"percentile: got {text!r}; accepted: numbers in [50, 100), and none") from None
