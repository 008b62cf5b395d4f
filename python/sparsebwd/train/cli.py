# SPDX-License-Identifier: Apache-2.0
"""The command line of `python -m sparsebwd.train`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from rich.console import Console

from .. import data, models
from ..backends import registered_backends
from ..commands import Parser, check_environment, describe, one_line_errors
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


def main(arguments: Sequence[str] | None = None, prog: str = "python -m sparsebwd.train") -> int:
    """Parse the arguments and train. Returns the exit status: 0, 1 if training failed, 128 and its number if a signal
    ended it.

    Raises:
        SystemExit: with status 2 and a message where an argument or a file is refused.
    """
    with one_line_errors():
        parser = _parser(prog)
        options = parser.parse_args(arguments)
        parser.set_defaults(**{**(_DEMO if options.demo else {}), **RECIPES.get(options.recipe, {})})
        options = parser.parse_args(arguments)
        names = {field.name for field in fields(TrainConfig)}
        with ExitStack() as stack:
            try:
                check_environment()
                config = TrainConfig(**{name: value for name, value in vars(options).items() if name in names})
                if options.distributed and not launched():
                    raise ValueError(
                        "distributed: start the processes with torchrun --nproc-per-node N -m sparsebwd.train ..."
                    )
                world = stack.enter_context(join(config.device))
            except (ValueError, RuntimeError) as error:
                parser.error(describe(error))
            if world.device.type == "cpu":
                keep_memory()  # for both sides
            # Not before: while processes wait for each other to join, no handler would be called.
            signals = stack.enter_context(Signals().handled())
            return _run(parser, options, config, world, signals)


def _run(
    parser: argparse.ArgumentParser, options: argparse.Namespace, config: TrainConfig, world: World, signals: Signals
) -> int:
    asked = {"d": config.density, "v": config.variance, "noise": config.noise, "p": config.percentile}
    kind = next((f"{letter}{value}" for letter, value in asked.items() if value is not None), "pnone")
    kind = "dense" if config.dense else kind
    folder = Path(options.output or f"runs/{config.model}-{config.data}-{kind}")
    reporter = Reporter(Console(quiet=world.rank > 0))
    with ExitStack() as stack:
        try:
            try:
                stack.enter_context(_claimed(folder, world))
                trainer = _prepare(config, folder, options, world, reporter, signals)
            except ValueError as error:
                parser.error(describe(error))
            except OSError as error:
                if not error.filename:
                    raise
                parser.error(describe(error))
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
    if options.demo:
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
    options: argparse.Namespace,
    world: World,
    reporter: Reporter,
    signals: Signals,
) -> Trainer:
    """Everything up to the first step; what the user got wrong shows here."""
    found = [name for name in _FILES if os.path.lexists(folder / name)]
    if found and not options.overwrite and not (options.resume and checkpoint.FILE in found):
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
    if options.resume:
        if trainer.resume():
            reporter.say(f"resumed after step {trainer.steps_done} from {folder / checkpoint.FILE}")
        else:
            reporter.warn(f"there is no checkpoint in {folder} to resume: this run starts at the beginning")
    elif world.rank == 0:
        # Otherwise a later --resume could take up the run that this one replaces.
        (folder / checkpoint.FILE).unlink(missing_ok=True)
    return trainer


def _parser(prog: str = "python -m sparsebwd.train") -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        usage="%(prog)s [--model NAME] [--data NAME] [options]",
        description="Train a convolutional network with pruned activation gradients and sparse backward convolutions. "
        "The defaults are the settings of Ye et al. (2019) for CIFAR.",
    )

    def value(name: str, metavar: str, text: str, kind=str, *aliases: str) -> None:
        """An option with the default of the configuration's field of that name."""
        default = getattr(TrainConfig, name, None)
        shown = text if default is None else f"{text} (default: {default})"
        group.add_argument(_flag(name), *aliases, type=kind, default=default, metavar=metavar, help=shown)

    def switch(name: str, text: str, both: bool = False) -> None:
        action = argparse.BooleanOptionalAction if both else "store_true"
        group.add_argument(_flag(name), action=action, default=getattr(TrainConfig, name, False), help=text)

    group = parser.add_argument_group("what to train")
    switch("demo", "a short run beside its dense twin, on a schedule to match; other options still count")
    value("recipe", "NAME", f"{', '.join(RECIPES)}: options by name; other options still count")
    value("model", "NAME", ", ".join(models.names()))
    value("form", "NAME", "of the network: cifar, for 32x32 images, imagenet, for 224x224, or auto, by --image-size")
    value("width", "N", "channels of the first layer, all others in proportion (default: 64, MobileNet 32)", int)
    value("data", "NAME", ", ".join(data.names()))
    value("data_dir", "DIR", "where the data set's files are")
    value("cache_dir", "DIR", "where decoded images are kept (default: ~/.cache/sparsebwd)")
    value("image_size", "PIXELS", "height and width of the images", int)
    value("train_subset", "N", "train on N images only", int)
    value("test_subset", "N", "test on N images only", int)
    switch("augment", "random crops and mirror images (default: on)", both=True)
    value("crop", "NAME", "padded, as is usual for CIFAR; resized, as for ImageNet; auto: by the size of the images")
    switch("stream", "decode images for each batch, not once for all (default: where that takes over 8 GiB)", both=True)
    value("workers", "N", "processes that decode, where images are streamed (default: 1, or up to 8 beside a GPU)", int)
    switch("skip_unreadable", "leave out images that cannot be read, instead of ending")
    switch("dense", "train the dense model only")
    switch("compare", "train the dense twin too, from the same weights, step by step in turns")

    group = parser.add_argument_group("sparsity")
    value("percentile", "P", "in [50, 100), or none: skip exact zeros only", _percentile)
    value("density", "D", "instead of a percentile: the fraction of elements kept, in (0, 1]", float)
    value("variance", "V", "instead of a percentile: the variance that pruning adds to each gradient, of its norm squared", float)
    value("noise", "R", "instead of a percentile: the noise that pruning adds to weight gradients, of that of minibatches", float)
    value("granularity", "NAME", "what is kept or dropped as a whole: element, row (64 channels of a pixel), row:32, sample, channel")
    value("importance", "NAME", "image: each image has a threshold of its own, by the norm of its input; none; or auto, image with noise")
    value("placement", "WHERE", "prune the gradient of the output (Conv-BN-ReLU), of the input (Conv-ReLU), or auto")
    value("sigma_estimator", "NAME", "corrected, or as_printed in the paper")
    value("threshold", "NAME", "exact; sampled, of a part of each gradient; or predicted from the last few")
    value("backend", "NAME", ", ".join(("auto", *registered_backends())))
    value("exclude", "LAYER,...", "layers that stay dense, with all below them: names, or patterns such as *.shortcut*")
    value("layer_percentile", "LAYER=P,...", "percentiles of single layers, by names or patterns")
    value("percentile_warmup", "EPOCHS", "in which percentiles rise from 50, which prunes nothing", int)
    value("where", "NAME", "everywhere, as in the paper, or faster: only where sparse kernels can gain something")

    group = parser.add_argument_group("optimisation")
    value("epochs", "N", "length of the run", int)
    value("max_steps", "N", "stop after N steps", int)
    value("batch_size", "N", "images per step, over all processes", int)
    value("accumulate", "N", "compute the batch in N parts, which need less memory", int)
    value("learning_rate", "RATE", "at the start (default: 0.05 for AlexNet, 0.1 for the others)", float, "--lr")
    value("momentum", "M", "of SGD", float)
    value("weight_decay", "W", "of SGD", float)
    value("schedule", "NAME", f"of the learning rate: {', '.join(SCHEDULES)}; all but step end at 0")
    value("label_smoothing", "S", "share of each label that is spread over all classes", float)
    value("decay_epochs", "N", "step schedule: epochs at each rate", int)
    value("decay_factor", "F", "step schedule: from each rate to the next", float)
    value("warmup_steps", "N", "steps in which the rate rises to its start", int)
    value("seed", "SEED", "of weights, batches and pruning", int)

    group = parser.add_argument_group("machine")
    value("device", "NAME", "auto, cpu or cuda")
    value("threads", "N", "CPU threads (default: as PyTorch chooses)", int)
    value("dtype", "NAME", "float32, or bfloat16 by autocast")
    switch("channels_last", "memory format of images and weights (default: on)", both=True)
    switch("compile", "by torch.compile")
    switch("sync_bn", "BatchNorm by the statistics of all processes together")
    switch("distributed", "insist on torchrun; without this it is used where it started the process")

    group = parser.add_argument_group("output")
    value("output", "DIR", "logs and checkpoint (default: runs/MODEL-DATA-pP, or -dense)")
    switch("resume", "go on from the checkpoint in DIR, to the same bits as without a stop")
    switch("overwrite", "replace the run in DIR")
    value("checkpoint_steps", "N", "a checkpoint every N steps, besides those after each epoch", int)
    switch("tensorboard", "scalars and histograms of gradients for TensorBoard, in DIR/tensorboard")
    value("measure_every", "N", "record densities and convolution times every N steps", int)
    return parser


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _percentile(text: str) -> float | None:
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, accepted are numbers in [50, 100) and none") from error
