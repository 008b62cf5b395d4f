# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a backward pass, beyond what is alive when it begins.

It is measured in a process of its own, because malloc is told to keep what is freed where times are measured.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5)
_BACKWARD = "the backward pass"

_VARIABLES = {
    # glibc maps blocks from this size on, and gives them back as soon as they are freed.
    "MALLOC_MMAP_THRESHOLD_": str(2**17),
    # Kineto would report its start and end on stderr.
    "KINETO_LOG_LEVEL": "9",
}


def backward_peaks(
    models: Mapping[str, nn.Module], inputs: Tensor, labels: Tensor, dtype: torch.dtype
) -> dict[str, dict[str, int | None]]:
    """For each of `models` (to be had by pickle), what the backward pass of its loss takes at the most, in bytes.

    allocated_bytes: by PyTorch's CPU allocator: tensors, gradients of parameters included, and buffers of PyTorch's own
        operators, but not what kernels allocate by themselves.
    resident_bytes: growth of the process's resident memory, whoever allocated it: the workspace of the sparse kernels
        and of oneDNN too, and what malloc wastes. None where the system does not say.

    Args:
        inputs, labels: a batch, (N, 3, H, W) and (N,).
        dtype: that of autocast; float32 for none.

    Raises:
        RuntimeError: the process that measures failed; the message is what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.pt"
        torch.save((dict(models), inputs, labels, dtype, torch.get_num_threads()), path)
        command = [sys.executable, "-m", __name__, str(path)]
        done = subprocess.run(command, env=os.environ | _VARIABLES, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}"
        raise RuntimeError(f"the process that measures memory failed: {reason}")
    return json.loads(done.stdout)


def peak_on_cuda(
    loss: Callable[[tuple[Tensor, Tensor]], Tensor], batch: tuple[Tensor, Tensor]
) -> dict[str, int | None]:
    """The same of a model on PyTorch's current CUDA device, by its allocator there; the host's memory is not looked at."""
    loss(batch).backward()  # what is set up once is not counted
    value = loss(batch)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    value.backward()
    torch.cuda.synchronize()
    return {"allocated_bytes": torch.cuda.max_memory_allocated() - before, "resident_bytes": None}


def _measure(path: str) -> dict[str, dict[str, int | None]]:
    models, inputs, labels, dtype, threads = torch.load(path, weights_only=False)  # of backward_peaks()
    torch.set_num_threads(threads)
    peaks = {}
    for name, model in models.items():

        def forward(model: nn.Module = model) -> Tensor:
            model.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits = model(inputs)
            return cross_entropy(logits.float(), labels)

        _in_thread(forward().backward)  # what is set up once is not counted
        peaks[name] = {"allocated_bytes": _peak_allocated(forward), "resident_bytes": _peak_resident(forward)}
        model.zero_grad()
    return peaks


def _peak_allocated(forward: Callable[[], Tensor]) -> int:
    # Forward too: the profiler counts a block as freed only if it has seen it being allocated.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = forward()
        with torch.profiler.record_function(_BACKWARD):
            loss.backward()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
    begin = next(event["ts"] for event in events if event["name"] == _BACKWARD)
    allocated, peak = 0, 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        if event["ts"] >= begin:
            allocated += event["args"]["Bytes"]
            peak = max(peak, allocated)
    return peak


def _peak_resident(forward: Callable[[], Tensor]) -> int | None:
    loss = forward()
    try:
        before = _resident("VmRSS")
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return None
    # The sparse kernels keep a workspace for each thread; in a new one it is part of the growth.
    _in_thread(loss.backward)
    return max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)[1])


def _in_thread(call: Callable[[], object]) -> None:
    """In a new one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(call).result()


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1])))
