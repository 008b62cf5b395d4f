# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from ..commands import describe
from ..info import info


@dataclass(frozen=True)
class World:
    """This process's `rank` among `size`, and on which `device` it computes."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return total.tolist()

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Process 0 runs the body before the others do, so that they find what it has cached."""
        if self.size > 1 and self.rank > 0:
            distributed.barrier()
        try:
            yield
        finally:
            if self.size > 1 and self.rank == 0:
                distributed.barrier()

    def broadcast(self, value: str | None) -> str | None:
        """That of process 0."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def environment(self) -> dict[str, Any]:
        """What the last bits of a result depend on, besides the options of the run."""
        here = info()
        return {
            "sparsebwd": here["sparsebwd"],
            "torch": str(here["torch"]),  # a subclass of str, which a checkpoint must not hold
            "device": self.device.type,
            "cpu": here["cpu"]["name"],
            "isa": here["cpu"]["isa"]["in_use"],
            "break_even": here["cpu"]["break_even"] and here["cpu"]["break_even"]["float32"]["name"],
            "threads": torch.get_num_threads(),
            "processes": self.size,
        }

    def synchronize(self) -> None:
        """Wait for the device, so that the clock can be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether torchrun, or a launcher like it, started this process.

    Raises:
        ValueError: only some of the variables that it sets are there, or a number is none.
    """
    given = next((name for name in _VARIABLES[:2] if name in os.environ), None)
    if given is None:
        return False
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"{given}: got {os.environ[given]!r}, but {', '.join(missing)} is not set; accepted are all of "
            f"{', '.join(_VARIABLES)}, as torchrun sets them, or neither RANK nor WORLD_SIZE"
        )
    for name in (*_VARIABLES[:2], *_VARIABLES[3:], "LOCAL_RANK"):
        text = os.environ.get(name, "0")
        if not text.isdecimal():
            raise ValueError(f"{name}: got {text!r}; accepted: integers from 0, as torchrun sets them")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= size:
        raise ValueError(f"RANK: got {rank}; accepted: 0 to {size - 1}, below WORLD_SIZE")
    return True


@contextmanager
def join(device: str = "auto") -> Iterator[World]:
    """The world of this process: that of torchrun where it started the process, else this process alone.

    Processes on CPUs talk by gloo, those on GPUs by nccl. A process group that the program has set up already is used
    as it is, and left.

    Raises:
        ValueError: as `launched`, or the processes do not find each other.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not launched():
        yield World(torch.device(device))
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        here = torch.device("cuda", torch.cuda.current_device())
    else:
        here = torch.device("cpu")
    ours = not distributed.is_initialized()
    if ours:
        try:
            distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise ValueError(f"MASTER_ADDR: the processes cannot meet at {address}: {describe(error)}") from error
    try:
        yield World(here, distributed.get_rank(), distributed.get_world_size())
    finally:
        # A DistributedDataParallel that is freed after its group may wait for a thread that waits for
        # the interpreter's lock.
        gc.collect()
        if ours:
            distributed.destroy_process_group()
