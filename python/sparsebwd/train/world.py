# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed


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

    def synchronize(self) -> None:
        """Wait for the device, so that the clock can be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def launched() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def join(device: str = "auto") -> Iterator[World]:
    """The world of this process: that of torchrun where it started the process, else this process alone.

    Processes on CPUs talk by gloo, those on GPUs by nccl. A process group that the program has set up already is used
    as it is, and left.
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
        distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield World(here, distributed.get_rank(), distributed.get_world_size())
    finally:
        # A DistributedDataParallel that is freed after its group may wait for a thread that waits for
        # the interpreter's lock.
        gc.collect()
        if ours:
            distributed.destroy_process_group()
