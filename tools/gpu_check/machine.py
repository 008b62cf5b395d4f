# SPDX-License-Identifier: Apache-2.0
"""The machine, the processes started on it, and where their files go."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
WORK = ROOT / "build" / "gpu-check"
SITE = WORK / "site"  # where the package is built to
WORKLOAD = ROOT / "tools" / "gpu_workload.py"


class Failed(Exception):
    """A part cannot go on; the message is for people."""


def run(
    command: Sequence[object], log: Path, seconds: float, environment: dict[str, str] | None = None, show: bool = False,
    interrupts: bool = False,
) -> subprocess.CompletedProcess:  # fmt: skip
    """Run to the end or for so many seconds, output into `log`, and on the terminal too if `show`.

    Raises Failed if the time is over; the process and its children are ended then. If it `interrupts`, the process is
    interrupted a while before that, as by Ctrl-C, so that it can write down what it has.
    """
    words = [str(word) for word in command]
    log.parent.mkdir(parents=True, exist_ok=True)
    path = [str(SITE)] if SITE.exists() else []
    path += filter(None, [os.environ.get("PYTHONPATH")])
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
    with open(log, "w", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(words)}\n")
        file.flush()
        process = subprocess.Popen(
            words, cwd=ROOT, env=variables | (environment or {}), stdout=subprocess.PIPE if show else file,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
            # Shells start what runs in the background with interrupts ignored, which is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            if show:
                # A pipe's reader cannot wait with a limit, so another process ends the command.
                reader = subprocess.Popen(["tee", "-a", str(log)], stdin=process.stdout)
                process.stdout.close()
            late = _wait(process, seconds, interrupts)
            if show:
                reader.wait(10)
            if late:
                raise subprocess.TimeoutExpired(words, seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"stopped after {seconds / 60:.1f} minutes: {shlex.join(words)[:200]}; see {log}") from None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    return subprocess.CompletedProcess(words, process.returncode, log.read_text("utf-8", errors="replace"))


_LAST_SECONDS = 20.0
"""From the interrupt of a process to its end."""


def _wait(process: subprocess.Popen, seconds: float, interrupts: bool) -> bool:
    """Whether it had to be interrupted. Raises TimeoutExpired."""
    last = min(_LAST_SECONDS, 0.95 * seconds) if interrupts else 0.0
    try:
        process.wait(seconds - last)
    except subprocess.TimeoutExpired:
        if not interrupts:
            raise
        process.send_signal(signal.SIGINT)
        process.wait(last)
        return True
    return False


def checked(command: Sequence[object], log: Path, seconds: float, **settings: Any) -> str:
    """The output of a command that has to succeed. Raises Failed."""
    done = run(command, log, seconds, **settings)
    if done.returncode:
        last = "\n".join(f"    {line}" for line in done.stdout.rstrip().splitlines()[-15:])
        raise Failed(f"exit status {done.returncode} of {shlex.join(done.args)[:200]}; {log} ends in\n{last}")
    return done.stdout


def require(modules: Iterable[str] = (), programs: Iterable[str] = ()) -> None:
    """Raise Failed, naming all that is missing."""
    importlib.invalidate_caches()
    missing = [f"the Python module {name}" for name in modules if importlib.util.find_spec(name) is None]
    missing += [f"the program {name}" for name in programs if shutil.which(name) is None]
    if missing:
        raise Failed(f"missing: {', '.join(missing)}")


def say(text: str) -> None:
    print(text, flush=True)


# ---- what is there

_PROBE = """
import json, torch
if torch.cuda.is_available():
    found = torch.cuda.get_device_properties(0)
    print(json.dumps({"name": found.name, "capability": f"{found.major}.{found.minor}", "memory_bytes": found.total_memory,
        "devices": torch.cuda.device_count(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version()}))
"""

_CLOCKS = (
    "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "temperature.gpu", "power.draw",
    "power.limit",
)  # fmt: skip


def find_gpu() -> dict[str, Any] | None:
    """The first GPU that PyTorch finds, None without one; asked in a process of its own, which leaves no memory in use."""
    probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=300)
    last = probe.stdout.strip().rpartition("\n")[2]
    return json.loads(last) if probe.returncode == 0 and last.startswith("{") else None


def clocks() -> dict[str, str]:
    """What nvidia-smi reads at this moment. Nothing here sets anything of the card."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_CLOCKS, (value.strip() for value in answer.partition("\n")[0].split(","))))


def nvcc_release() -> str | None:
    try:
        text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"release (\S+),", text)
    return found[1] if found else None
