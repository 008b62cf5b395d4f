# SPDX-License-Identifier: Apache-2.0
"""Compile and run the comparison; the exit status is 0 if all cases are right."""

from __future__ import annotations

import argparse
import sys

from . import FAULTS, ROOT, aarch64, build, check, here, missing

parser = argparse.ArgumentParser(prog="kernel_parity", description=__doc__)
parser.add_argument("--here", action="store_true", help="this machine instead of aarch64")
parser.add_argument("-n", "--cases", type=int, default=800)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--fault", choices=FAULTS, help="make the results of these kernels wrong: the comparison has to fail")
options = parser.parse_args()

target = here() if options.here else aarch64()
if reason := missing(target):
    sys.exit(f"sparsebwd: {reason}")
print(f"Compiling the kernels for {target.machine}", flush=True)
try:
    program = build(target, ROOT / "build" / f"kernel_parity-{target.machine}")
except RuntimeError as error:
    sys.exit(f"sparsebwd: the kernels did not compile:\n{error}")
done = check(target, program, options.cases, options.seed, options.fault)
print(done.stdout + done.stderr, end="")
sys.exit(done.returncode)
