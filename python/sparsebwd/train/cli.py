# SPDX-License-Identifier: Apache-2.0
"""The command line of `python -m sparsebwd.train`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from rich.console import Console

from .. import data, models
from ..backends import registered_backends
from . import checkpoint
from .config import DTYPES, SCHEDULES, TrainConfig
from .report import Reporter
from .trainer import Trainer, TrainingError
from .world import World, join, launched

# A few minutes on two cores: three epochs of digits, with a schedule that is over by then.
_DEMO = {
    "compare": True,
    "epochs": 3,
    "batch_size": 32,
    "learning_rate": 0.05,
    "schedule": "cosine",
    "warmup_steps": 10,
    "measure_every": 5,
    "output": "runs/demo",
    "overwrite": True,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and train. Returns the exit status: 0, 1 if training failed, 130 if interrupted.

    Raises:
        SystemExit: with status 2 and a message where an argument or a file is refused.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.demo:
        parser.set_defaults(**_DEMO)
        options = parser.parse_args(arguments)
    names = {field.name for field in fields(TrainConfig)}
    try:
        config = TrainConfig(**{name: value for name, value in vars(options).items() if name in names})
    except ValueError as error:
        parser.error(str(error))
    if options.distributed and not launched():
        parser.error("distributed: start the processes with torchrun --nproc-per-node N -m sparsebwd.train ...")
    folder = Path(options.output or f"runs/{config.model}-{config.data}-p{config.percentile or 'none'}")
    with join(config.device) as world:
        reporter = Reporter(Console(quiet=world.rank > 0))
        try:
            trainer = _prepare(config, folder, options, world, reporter)
        except ValueError as error:
            parser.error(str(error))
        except OSError as error:
            parser.error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        try:
            summary = trainer.fit()
        except (TrainingError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
            return 130
        reporter.summary(summary, folder)
        if options.demo:
            reporter.demo(summary)
    return 0


def _prepare(config: TrainConfig, folder: Path, options: argparse.Namespace, world: World, reporter: Reporter) -> Trainer:
    """Everything up to the first step; what the user got wrong shows here."""
    if (folder / checkpoint.FILE).exists() and not options.resume and not options.overwrite:
        raise ValueError(
            f"output: {folder} holds a run already: continue it with --resume, replace it with --overwrite, "
            "or name another folder"
        )
    with world.one_first():
        images = data.load(
            config.data, data_dir=config.data_dir, cache_dir=config.cache_dir, image_size=config.image_size
        )
    trainer = Trainer(config, images, folder, world, reporter)
    about = trainer.data.description
    pruning = "no pruning" if config.percentile is None else f"percentile {config.percentile:g}"
    reporter.say(
        f"{config.model} ({trainer.parameters / 1e6:.2f} million parameters), {pruning}"
        f"{', and its dense twin' if config.compare else ''}, on {world.device.type}"
        + (f", threads: {torch.get_num_threads()}" if world.device.type == "cpu" else "")
        + (f", processes: {world.size}" if world.size > 1 else "")
    )
    reporter.say(
        f"{about['name']}: {about['train_images']} training and {about['test_images']} test images of "
        f"{about['image_size']}x{about['image_size']} pixels, {about['classes']} classes; "
        f"{config.batch_size} images a step"
    )
    if options.resume:
        if trainer.resume():
            reporter.say(f"resumed after step {trainer.steps_done} from {folder / checkpoint.FILE}")
        else:
            reporter.warn(f"there is no checkpoint in {folder} to resume: this run starts at the beginning")
    return trainer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparsebwd.train",
        usage="%(prog)s [--model NAME] [--data NAME] [--percentile P] [--compare] [options]",
        description="Train a convolutional network with pruned activation gradients and sparse backward convolutions. "
        "The defaults are the settings of Ye et al. (2019) for CIFAR.",
    )
    default = TrainConfig()
    flag = argparse.BooleanOptionalAction

    group = parser.add_argument_group("what to train")
    group.add_argument("--demo", action="store_true", help="a short run beside its dense twin; other options still count")
    group.add_argument("--model", default=default.model, metavar="NAME", help=", ".join(models.names()))
    group.add_argument("--data", default=default.data, metavar="NAME", help=", ".join(data.names()))
    group.add_argument("--data-dir", metavar="DIR", help="where the data set's files are")
    group.add_argument("--cache-dir", metavar="DIR", help="where decoded images are kept (default: ~/.cache/sparsebwd)")
    group.add_argument("--image-size", type=int, default=default.image_size, metavar="PIXELS")
    group.add_argument("--train-subset", type=int, metavar="N", help="train on N images only")
    group.add_argument("--test-subset", type=int, metavar="N", help="test on N images only")
    group.add_argument("--augment", action=flag, default=default.augment, help="random crops and mirror images")
    group.add_argument("--compare", action="store_true", help="train the dense twin too, step by step in turns")

    group = parser.add_argument_group("sparsity")
    group.add_argument(
        "--percentile",
        type=_percentile,
        default=default.percentile,
        metavar="P",
        help=f"in [50, 100), or none: skip exact zeros only (default: {default.percentile:g})",
    )
    group.add_argument("--placement", default=default.placement, help="auto, output (Conv-BN-ReLU) or input (Conv-ReLU)")
    group.add_argument("--sigma-estimator", default=default.sigma_estimator, help="corrected or as_printed")
    group.add_argument("--backend", default=default.backend, help=", ".join(("auto", *registered_backends())))

    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, default=default.epochs, metavar="N", help=f"default: {default.epochs}")
    group.add_argument("--max-steps", type=int, metavar="N", help="stop after N steps")
    group.add_argument("--batch-size", type=int, default=default.batch_size, metavar="N", help="images per step")
    group.add_argument("--learning-rate", "--lr", type=float, metavar="RATE", help="0.05 for AlexNet, 0.1 for the others")
    group.add_argument("--momentum", type=float, default=default.momentum)
    group.add_argument("--weight-decay", type=float, default=default.weight_decay)
    group.add_argument("--schedule", default=default.schedule, help=" or ".join(SCHEDULES))
    group.add_argument("--decay-epochs", type=int, default=default.decay_epochs, metavar="N", help="epochs per rate")
    group.add_argument("--decay-factor", type=float, default=default.decay_factor)
    group.add_argument("--warmup-steps", type=int, default=default.warmup_steps, metavar="N")
    group.add_argument("--seed", type=int, default=default.seed)

    group = parser.add_argument_group("machine")
    group.add_argument("--device", default=default.device, help="auto, cpu or cuda")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: as PyTorch chooses)")
    group.add_argument("--dtype", default=default.dtype, help=f"{' or '.join(DTYPES)} (by autocast)")
    group.add_argument("--channels-last", action=flag, default=default.channels_last)
    group.add_argument(
        "--distributed", action="store_true", help="insist on torchrun; without this it is used where it is found"
    )

    group = parser.add_argument_group("output")
    group.add_argument("--output", metavar="DIR", help="logs and checkpoint (default: runs/MODEL-DATA-pP)")
    group.add_argument("--resume", action="store_true", help="continue from the checkpoint in DIR, bit by bit")
    group.add_argument("--overwrite", action="store_true", help="replace the run in DIR")
    group.add_argument("--checkpoint-steps", type=int, metavar="N", help="a checkpoint every N steps, not only epochs")
    group.add_argument(
        "--measure-every",
        type=int,
        default=default.measure_every,
        metavar="N",
        help=f"record densities every N steps (default: {default.measure_every})",
    )
    return parser


def _percentile(text: str) -> float | None:
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, accepted are numbers in [50, 100) and none") from error
