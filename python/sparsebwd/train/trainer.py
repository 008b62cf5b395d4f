# SPDX-License-Identifier: Apache-2.0
"""The training loop."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..data import Batches, DataError, ImageData, Normalize, available_cores, ordered_batches
from ..data.decode import ImageError
from ..monitor import DensityMonitor
from ..nn import SparseConv2d
from ..noise import NoiseController
from ..schedule import PercentileSchedule
from . import checkpoint
from .board import Board, Gradients, require_tensorboard
from .config import DTYPES, TrainConfig
from .log import RunLog, StepLog
from .measure import BackwardTimer, EpochTally, speedups, summarize
from .report import Reporter
from .stop import Signals, Stopped
from .twins import Twin, build_twins
from .world import World

_ADVICE = "try a lower --learning-rate, some --warmup-steps or a lower --percentile"

_COMPILED_CHANGES = 4  # of percentiles in a warm-up; each compiles the model again


class TrainingError(RuntimeError):
    """Training cannot go on."""


class Trainer:
    """Trains a sparse model, its dense twin (`config.dense`), or both step by step in turns (`config.compare`).

    Everything random in a step (the batch, dropout, the keys of the pruning) is a function of the seed, the step's
    number and the process's rank, so that a checkpoint needs no generator states and a run resumes at any step.

    Args:
        config: the run.
        data: its images.
        folder: where checkpoint and logs go, which nobody else may write to (see `lock`); None writes nothing.
        world: the processes; those of rank above 0 neither write nor print.
        reporter: what shows the progress.
        signals: those that end `fit` after the step in which they arrive; None: they do as elsewhere.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: ImageData,
        folder: Path | None,
        world: World,
        reporter: Reporter,
        signals: Signals | None = None,
    ) -> None:
        self.config, self.world, self.reporter = config, world, reporter
        self._signals = signals or Signals()
        self._stop = 0
        self.data = data.subset(config.train_subset, config.test_subset)
        if config.tensorboard:
            require_tensorboard()
        if config.accumulate > config.batch_size // world.size:
            raise ValueError(
                f"accumulate: got {config.accumulate}, accepted are 1 to {config.batch_size // world.size}, the images of a "
                "step" + (" of each process" if world.size > 1 else "")
            )
        if config.sync_bn and world.size == 1:
            reporter.warn("sync_bn: one process alone has nobody to share statistics with; start several with torchrun")
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._checkpoint = None if folder is None else folder / checkpoint.FILE
        self.workers = self._workers()
        self._batches = Batches(
            self.data.train_images,
            self.data.train_labels,
            config.batch_size,
            seed=config.seed,
            augment=config.augment,
            mirror=self.data.mirror,
            crop=self.data.crop,
            rank=world.rank,
            world_size=world.size,
            workers=self.workers or 0,
        )
        self._normalize = Normalize(*self.data.statistics, world.device, config.channels_last)
        self.twins = build_twins(config, len(self.data.classes), world, reporter.warn)
        for twin in self.twins:
            if any(isinstance(module, SparseConv2d) and module.noise is not None for module in twin.model.modules()):
                # Of the model as it is written: processes share measurements, not gradients.
                twin.controller = NoiseController(twin.model, partial(self._loss, twin.model), seed=config.seed)
        self._total_steps = config.total_steps(len(self._batches))
        warmup = config.percentile_warmup * len(self._batches)
        changes = _COMPILED_CHANGES if config.compile else None
        sparse = [twin.model for twin in self.twins if warmup and twin.sparse_layers]
        self._schedules = [PercentileSchedule(model, warmup, changes=changes) for model in sparse]
        self._environment = world.environment()
        self._step = 0
        self._history: list[dict[str, Any]] = []
        self._log = self._steps = self._board = None
        if folder is not None and world.rank == 0:
            header = {
                "config": asdict(config),
                "environment": self._environment,
                "data": self.data.description,
                "parameters": self.parameters,
            }
            self._log, self._steps = RunLog(folder, header), StepLog(folder)

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return sum(parameter.numel() for parameter in self.twins[0].model.parameters())

    @property
    def steps_done(self) -> int:
        """Steps since the start of the run, those before a resumed checkpoint included."""
        return self._step

    def resume(self) -> bool:
        """Continue from the checkpoint in the folder; False where there is none.

        Raises:
            CheckpointError: it is corrupt or of another run.
        """
        if self._checkpoint is None or not os.path.lexists(self._checkpoint):
            return False
        if not self._checkpoint.is_file():  # it would be waited for, or replaced
            raise checkpoint.CheckpointError(
                f"{self._checkpoint}: got a link to nothing, or what is no file; restore the checkpoint, or start again with --overwrite"
            )
        parameters = {twin.name: dict(twin.model.named_parameters()) for twin in self.twins}
        controllers = {twin.name: twin.controller.check_state for twin in self.twins if twin.controller is not None}
        state = checkpoint.load(
            self._checkpoint, self.config, self.data.fingerprint, self._state(), parameters, len(self._batches), controllers
        )
        for key, value in self._environment.items():
            if state["environment"].get(key) != value:
                self.reporter.warn(
                    f"resumed with {key} {value}, but the checkpoint was made with {state['environment'].get(key)}: "
                    "the results may differ in the last bits"
                )
        for twin in self.twins:
            twin.restore(state["twins"][twin.name])
        self._step, self._history = state["step"], state["history"]
        return True

    def fit(self) -> dict[str, Any]:
        """Train to the end, and return the summary that also goes into the log.

        Raises:
            TrainingError: the loss, or a weight, is not finite, or an image cannot be read.
            Stopped: a signal arrived. What was done until then is in the checkpoint.
            OSError: checkpoint or log cannot be written.
        """
        if self._step < self._total_steps:
            # Where an earlier run stopped within an epoch, this one goes on within it.
            self._history = [entry for entry in self._history if entry["complete"]]
        self._write_log()
        running = self.reporter.running(self._step, self._total_steps)
        with running, self._signals.deferred(), self._logging(), self._reading():
            if self._step == 0:
                # From here on there is something to resume; a disk that cannot hold it is found now, not in an hour.
                self._save()
            while True:
                if self._step and self._step % len(self._batches) == 0 and not self._closed():
                    self._close_epoch(complete=True)
                self._end_if(self._stop)
                if self._step == self._total_steps:
                    break
                self.train_step()
                if self.config.checkpoint_steps and self._step % self.config.checkpoint_steps == 0:
                    self._save()
            if not self._closed():
                self._close_epoch(complete=False)
        summary = summarize(self._history)
        self._write_log(summary)
        return summary

    @contextmanager
    def _logging(self) -> Iterator[None]:
        """Keeps the files open that grow with each step."""
        if self._steps is None:
            yield
            return
        if missing := self._steps.begin(self._step, [twin.name for twin in self.twins]):
            self.reporter.warn(f"{self._steps.path} lacks {missing} of the {self._step} steps before this one")
        if self.config.tensorboard:
            self._board = Board(self._steps.path.parent, [twin.name for twin in self.twins], self._step)
        try:
            yield
        finally:
            self._steps.close()
            if self._board is not None:
                self._board.close()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Ends the workers in the end. Where an image cannot be read, what was done until then is kept."""
        try:
            yield
        except DataError as error:
            self._save()
            advice = "; to leave it out, add --skip-unreadable to --resume" if isinstance(error, ImageError) else ""
            raise TrainingError(f"after step {self._step}, {error}{advice}") from None
        finally:
            self._batches.close()

    def _end_if(self, number: int) -> None:
        """End the run between two steps where a signal, by its number, arrived."""
        if number:
            self._save()
            raise Stopped(number, saved=True)

    def _closed(self) -> bool:
        """Whether the history ends with the step that was the last."""
        return bool(self._history) and self._history[-1]["global_step"] == self._step

    def train_step(self) -> None:
        """One step of every twin on the same batch, within `reporter.running`. They take turns at going first.

        Raises:
            TrainingError: the loss is not finite.
        """
        inputs, labels = self.batch(self._step)
        rate = self.config.learning_rate_at(self._step, len(self._batches))
        # Consecutive seeds: all steps of all processes of a run have different ones.
        seed = (self.config.seed * 0x9E3779B1 + self._step * self.world.size + self.world.rank) % 2**32
        measured = self._step % self.config.measure_every == self.config.measure_every - 1
        order = self.twins if self._step % 2 == 0 else self.twins[::-1]
        losses = dict.fromkeys(twin.name for twin in self.twins)
        for schedule in self._schedules:
            schedule.step(self._step)
        for twin in order:
            torch.manual_seed(seed)
            with self._compiling():
                losses[twin.name] = self._step_twin(twin, inputs, labels, rate, measured)
        self._step += 1
        seconds = {twin.name: twin.tally.step[-1] for twin in self.twins if twin.tally.step}
        if self._steps is not None:
            self._steps.add(self._step, rate, losses, {} if measured else seconds)
        if self._board is not None:
            for name, loss in losses.items():
                times = {} if measured else {"step_ms": 1e3 * seconds[name]}
                self._board.scalars(name, self._step, loss=loss, learning_rate=rate, **times)
        for twin in self.twins:
            if not math.isfinite(losses[twin.name]):
                raise TrainingError(
                    f"the loss of the {twin.name} model became {losses[twin.name]} in step {self._step}: {_ADVICE}"
                )
        self.reporter.step(losses, seconds)

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """What torch.compile cannot do ends the run in one line."""
        if not self.config.compile:
            yield
            return
        from torch._dynamo.exc import TorchDynamoException

        try:
            yield
        except TorchDynamoException as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise TrainingError(
                f"compile: torch.compile failed: {' '.join(lines[:2])}; train without --compile"
            ) from None

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs [N, 3, H, W] and labels [N] of step `step`, counted from 0 over the whole run."""
        images, labels = self._batches.batch(*divmod(step, len(self._batches)))
        return self._normalize(images), labels.to(self.world.device)

    def forward(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Logits in float32."""
        dtype = DTYPES[self.config.dtype]
        with torch.autocast(self.world.device.type, dtype, enabled=dtype != torch.float32):
            return model(inputs).float()

    def _criterion(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(outputs, labels, label_smoothing=self.config.label_smoothing)

    def _loss(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        return self._criterion(self.forward(model, inputs), labels)

    def show_notes(self) -> None:
        """Warns of what the data have to say since the last call: files that are no images, or cannot be read."""
        for note in self.data.notes.take():
            self.reporter.warn(note)

    def _workers(self) -> int | None:
        """Processes that decode images; None where there is nothing to decode."""
        if isinstance(self.data.train_images, np.ndarray):
            return None
        if self.config.workers is not None:
            return self.config.workers
        # A CPU trains with the cores that would decode.
        cores = available_cores() // self.world.size if self.world.device.type == "cuda" else 1
        return min(max(cores, 1), 8)

    def _step_twin(self, twin: Twin, inputs: Tensor, labels: Tensor, rate: float, measured: bool) -> float:
        """Forward, backward, update. Returns the mean loss over all processes."""
        twin.parallel.train()
        for group in twin.optimizer.param_groups:
            group["lr"] = rate
        twin.optimizer.zero_grad()
        parts = list(zip(inputs.chunk(self.config.accumulate), labels.chunk(self.config.accumulate)))
        if twin.controller is not None:
            twin.controller.step(*parts[0])
        timer = BackwardTimer(self.world.synchronize) if measured else None
        monitor = DensityMonitor(twin.model) if measured and twin.sparse_layers else None
        # Of the first step of an epoch that is measured.
        first = monitor is not None and self._step % len(self._batches) < self.config.measure_every
        gradients = Gradients(twin.model) if first and self._board is not None else None
        losses, logits = [], []
        begin, forward, backward = self._clock(), 0.0, 0.0
        for number, (part, answers) in enumerate(parts, 1):
            with ExitStack() as stack:
                if self.world.size > 1 and number < len(parts):
                    stack.enter_context(twin.parallel.no_sync())  # the last one sends the sum
                if gradients is not None:
                    stack.enter_context(gradients.watched())
                start = self._clock()
                outputs = self.forward(twin.parallel, part)
                loss = self._criterion(outputs, answers)
                # The mean over all parts, which may differ in size.
                loss = loss if len(parts) == 1 else loss * (len(answers) / len(labels))
                middle = self._clock()
                if measured:
                    stack.enter_context(timer)
                    if monitor is not None:
                        stack.enter_context(monitor)
                loss.backward()
            forward, backward = forward + middle - start, backward + self._clock() - middle
            losses.append(loss.detach())
            logits.append(outputs.detach())
        twin.optimizer.step()
        if measured:
            twin.tally.conv_backward.append(timer.seconds["convolution"])
            if monitor is not None:
                twin.tally.add_densities(monitor.as_dict())
                if self._board is not None:
                    self._board.layers(twin.name, self._step + 1, monitor)
                if gradients is not None:
                    self._board.gradients(twin.name, self._step + 1, gradients, monitor)
        else:
            twin.tally.step.append(self._clock() - begin)
            twin.tally.forward.append(forward)
            twin.tally.backward.append(backward)
        correct = (torch.cat(logits).argmax(1) == labels).sum().item()
        # All processes have to learn of a signal in the same step, or some would wait for the others for ever.
        arrived = self._signals.received
        total, correct, count, stop = self.world.sum([sum(losses).item() * len(labels), correct, len(labels), arrived])
        if stop:
            self._stop = arrived or signal.SIGTERM
        twin.tally.loss += total
        twin.tally.correct += correct
        twin.tally.images += count
        if twin.controller is not None:
            twin.controller.observe(sum(losses))
        return total / count

    @torch.no_grad()
    def _evaluate(self, twin: Twin) -> dict[str, float]:
        """Loss and accuracy on the test images."""
        twin.model.eval()
        loss = correct = count = 0.0
        for images, labels in ordered_batches(
            self.data.test_images,
            self.data.test_labels,
            self.config.batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
            workers=self.workers or 0,
        ):
            if self.world.size == 1:
                self._end_if(self._signals.received)
            labels = labels.to(self.world.device)
            logits = self.forward(twin.model, self._normalize(images))
            loss += cross_entropy(logits, labels, reduction="sum").item()
            correct += (logits.argmax(1) == labels).sum().item()
            count += len(labels)
        loss, correct, count = self.world.sum([loss, correct, count])
        return {"test_loss": loss / count, "test_accuracy": correct / count}

    def _close_epoch(self, complete: bool) -> None:
        """Test, report, write. The sums of an incomplete epoch are kept, for a longer run to resume within it."""
        per_epoch = len(self._batches)
        variants = {twin.name: {**twin.tally.row(), **self._evaluate(twin)} for twin in self.twins}
        entry = {
            "epoch": -(-self._step // per_epoch),
            "global_step": self._step,
            "complete": complete,
            "learning_rate": self.config.learning_rate_at(self._step - 1, per_epoch),
            "variants": variants,
            "speedup": speedups(variants),
        }
        self._history.append(entry)
        if self._board is not None:
            for name, row in variants.items():
                results = ("train_accuracy", "test_accuracy", "test_loss")
                self._board.scalars(name, self._step, **{result: row[result] for result in results})
        if complete:
            for twin in self.twins:
                twin.tally = EpochTally()
        self._save()
        self._write_log()
        self.reporter.epoch(entry)
        for twin in self.twins:
            if twin.controller is not None:
                self.reporter.say(f"  {twin.controller}")
        self.show_notes()

    def _write_log(self, summary: dict[str, Any] | None = None) -> None:
        if self._log is not None:
            self._log.write(self._history, summary)

    def _save(self) -> None:
        for twin in self.twins:
            try:
                checkpoint.require_finite(twin.model.state_dict())
            except ValueError as error:
                raise TrainingError(f"in the {twin.name} model after step {self._step}, {error}: {_ADVICE}") from None
        if self._log is not None:
            self._steps.sync()  # a checkpoint of a step means that the step is logged
            checkpoint.save(self._checkpoint, asdict(self.config), self.data.fingerprint, self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "environment": self._environment,
            "step": self._step,
            "history": self._history,
            "twins": {twin.name: twin.state() for twin in self.twins},
        }

    def _clock(self) -> float:
        self.world.synchronize()
        return time.perf_counter()
