# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import __doc__ as about
from . import machine
from .machine import say
from .record import Check
from .tiers import PARTS, TIERS, Tier, commands, units
from .units import choose_batch, choose_repeats

_LEAST_MINUTES = 0.15
"""With less time left no part is begun."""


def plan(tier: Tier) -> None:
    """Print what would run, of the benchmark on a GPU such as an H100."""
    for name, minutes in tier.parts:
        say(f"== {name}, at most {minutes:.1f} minutes")
        chosen = units(name)
        if chosen:
            batch, left = choose_batch(minutes, 80 * 2**30, chosen), 60 * minutes
            say(f"  layers: {', '.join(chosen[0].layers)}. Batch {batch}")
        for number, unit in enumerate(chosen):
            repeats = choose_repeats(chosen[number:], batch, left)
            if repeats is None:
                say(f"  left out: {unit.title}")
                continue
            seconds = min(left, unit.seconds(repeats, batch))
            left -= seconds
            say(f"  about {seconds / 60:.1f} minutes, {unit.rows} rows of {repeats} samples: {unit.title}")
            say(f"    {shlex.join(map(str, unit.command(repeats, batch)))}")
        for command in commands(name):
            say(f"    {shlex.join(map(str, command))}")


def carry_out(check: Check, tier: Tier) -> bool:
    """All parts of the tier, each for as long as it may and as there is time. Whether all passed."""
    end = time.monotonic() + 60 * tier.minutes
    passed = []
    for name, limit in tier.parts:
        check.minutes = min(limit, (end - time.monotonic()) / 60)
        if check.minutes < min(_LEAST_MINUTES, limit):
            say(f"== {name}: left out: the time was over")
            check.record["results"][name] = "left out: the time was over"
            check.write()
        else:
            passed.append(check.part(name, PARTS[name]))
    return all(passed)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=about, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--tier", default="full", choices=list(TIERS),
        help="how much: smoke, first (what is most worth knowing, in 11 minutes), full. Default: full",
    )  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), metavar="PART", help=f"only these: {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, help="limit of all together; parts have as much less or more each")
    parser.add_argument(
        "--output", type=Path, default=machine.ROOT / "bench" / "results", metavar="DIR", help="default: bench/results"
    )
    parser.add_argument(
        "--prebuilt", type=Path, metavar="DIR", help="the package with its modules (`make gpu-modules`), if it cannot be built"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    options = parser.parse_args(arguments)
    tier = TIERS[options.tier]
    if options.parts:
        tier = tier.only(options.parts)
    if options.minutes is not None:
        if not options.minutes > 0:
            parser.error(f"--minutes: got {options.minutes}, accepted are numbers above 0")
        tier = tier.scaled(options.minutes)
    if options.prebuilt is not None and not list(options.prebuilt.glob("sparsebwd/_C_cuda*.so")):
        parser.error(f"--prebuilt: {options.prebuilt} has no sparsebwd/_C_cuda*.so; `make gpu-modules` makes such a folder")
    if options.dry_run:
        plan(tier)
        return 0
    if importlib.util.find_spec("torch") is None:
        print(f"gpu-check: {sys.executable} has no PyTorch, so nothing was checked; name one that has by PYTHON=.", file=sys.stderr)
        return 2
    gpu = machine.find_gpu()
    if gpu is None:
        print(f"gpu-check: PyTorch of {sys.executable} finds no NVIDIA GPU here, so nothing was checked.", file=sys.stderr)
        return 2
    sys.path.insert(0, str(machine.SITE))
    # Where toolkits are that were installed without being put on PATH.
    homes = filter(None, [os.environ.get("CUDA_HOME"), "/usr/local/cuda"])
    places = [os.path.join(home, folder) for home in homes for folder in ("bin", "compute-sanitizer")]
    places += sorted(map(str, Path("/opt/nvidia/nsight-compute").glob("*")), reverse=True)
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), *filter(os.path.isdir, places)])
    check = Check(options.output.resolve(), gpu, tier.minutes, options.prebuilt and options.prebuilt.resolve())
    say(f"{gpu['name']}, torch {gpu['torch']}, CUDA {gpu['cuda']}, nvcc {check.record['environment']['nvcc']}")
    passed = carry_out(check, tier)
    say(f"\n{check.report()}")
    say(f"{check.path}, and beside it .md and -logs.tar.gz")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
