# SPDX-License-Identifier: Apache-2.0
"""What runs on this machine, and why the rest does not: :func:`info`, or ``python -m sparsebwd.info [--json]``.

A package, not a module, so that ``python -m`` runs its ``__main__``, which importing sparsebwd does not load.
"""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import sparsebwd
from sparsebwd import backends
from sparsebwd.backends import break_even, machine
from sparsebwd.backends.cuda import why_not_loaded
from sparsebwd.backends.dense import is_native


class Info(dict[str, Any]):
    """A dictionary of plain values, as :func:`info` returns it; str() of it is for people."""

    def __str__(self) -> str:
        lines = [(name, self[name]) for name in ("sparsebwd", "torch", "python", "platform")]
        cpu, isa = self["cpu"], self["cpu"]["isa"]
        in_use = isa["in_use"] or "none"
        limit = f", SPARSEBWD_MAX_ISA={isa['limit']}" if isa["limit"] else ""
        lines += [
            ("CPU", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads in use"),
            ("instruction set", f"{in_use} (runs here: {', '.join(isa['supported']) or 'unknown'}{limit})"),
        ]
        slow = [name for name, native in cpu["dense"].items() if not native]
        if slow:
            lines.append(
                (
                    "PyTorch on CPUs",
                    f"no kernels for {' and '.join(slow)} convolutions on this CPU, which take 5 to 70 times as long as "
                    "float32, forward and backward: train in float32. SparseConv2d computes them in float32; other layers do not",
                )
            )
        for dtype, table in (cpu["break_even"] or {}).items():
            limits = (f"{kind} {agb:.2g}, {wgc:.2g}" for kind, (agb, wgc) in table["channels_last"].items())
            lines.append((f"{dtype}: sparse", f"up to these densities, AGB, WGC ({table['name']}): {'; '.join(limits)}"))
            lines.append(("", table["origin"]))
        cuda = self["cuda"]
        built = f"for {', '.join(cuda['architectures'])}; CUDA: built with {cuda['version']}, driver {cuda['driver'] or 'none'}"
        lines.append(("CUDA kernels", f"none: {cuda['not_loaded']}" if cuda["not_loaded"] else built))
        lines += [("GPU", text) for text in self["gpus"]] or [("GPU", f"none: {self['no_gpu']}")]
        lines += [
            (f"backend {name}", "runs" if reason is None else f"does not run: {reason}")
            for name, reason in self["backends"].items()
        ]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:{width}}  {text}" for name, text in lines)

    __repr__ = __str__


def info() -> Info:
    """Versions, CPU and instruction sets, GPUs, and each backend with the reason if it does not run.

    Returns:
        A dictionary that prints as a table and that json.dumps() takes:
            sparsebwd, torch, python, platform: versions, str.
            cpu: {name, cores (that this process may use), threads (of PyTorch's pool),
                isa: {in_use (None if the C++ kernels do not run), supported: [...], limit (SPARSEBWD_MAX_ISA)},
                dense: {"bfloat16", "float16": whether PyTorch has kernels for dense convolutions in it on this CPU},
                break_even: the densities up to which "auto" takes the sparse kernels for CPUs, and where they come from,
                    None if these do not run:
                    {"float32", "bfloat16": {name, origin: of :class:`sparsebwd.backends.break_even_tables.Table`,
                    "channels_last", "contiguous": {class of convolutions: [AGB, WGC]}}}}.
            cuda: the CUDA kernels: {not_loaded: why they are not there, or None, architectures (that they are built for):
                ["8.0", ...], version (of CUDA that they are built with), driver (the CUDA version that the driver runs;
                None if there is no driver)}.
            gpus: descriptions, [str]; no_gpu: why the list is empty, or None.
            backends: {name: None if it runs, else the reason}, in the order of preference, the last first choice.

    Examples:
        >>> import sparsebwd
        >>> found = sparsebwd.info()
        >>> found["cpu"]["isa"]["in_use"] in ("avx512", "avx2", "baseline", None)
        True
        >>> print(found)
        sparsebwd ...
    """
    reasons = {name: backends.get_backend(name).available() for name in backends.registered_backends()}
    in_use, supported, tables = None, [], None
    if reasons["cpu"] is None:
        supported = list(torch.ops.sparsebwd_cpu.supported_isas())
        try:
            in_use = torch.ops.sparsebwd_cpu.isa()
            tables = _break_even()
        except ValueError as error:  # SPARSEBWD_MAX_ISA names no instruction set, or SPARSEBWD_CALIBRATION no calibration
            reasons["cpu"] = str(error)
    gpus = [_gpu(i) for i in range(torch.cuda.device_count())]
    return Info(
        sparsebwd=sparsebwd.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        cpu={
            "name": machine.cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": {
                "in_use": in_use,
                "supported": supported,
                "limit": os.environ.get("SPARSEBWD_MAX_ISA") or None,
            },
            "dense": {str(dtype).removeprefix("torch."): is_native(dtype) for dtype in (torch.bfloat16, torch.float16)},
            "break_even": tables,
        },
        cuda=_cuda(),
        gpus=gpus,
        no_gpu=None if gpus else _why_no_gpu(),
        backends=reasons,
    )


def _break_even() -> dict[str, Any]:
    return {
        str(dtype).removeprefix("torch."): {
            "name": table.name,
            "origin": table.origin,
            "channels_last": {kind: list(limits) for kind, limits in table.channels_last.items()},
            "contiguous": {kind: list(limits) for kind, limits in table.contiguous.items()},
        }
        for dtype, table in break_even.tables().items()
    }


def _cuda() -> dict[str, Any]:
    architectures, *versions = ("", 0, 0) if why_not_loaded else torch.ops.sparsebwd_cuda.build()
    version, driver = (f"{v // 1000}.{v % 1000 // 10}" if v else None for v in versions)
    return {"not_loaded": why_not_loaded, "architectures": architectures.split(), "version": version, "driver": driver}


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB"
    )


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this build of PyTorch is for CPUs only"
    return "PyTorch finds no device"
