#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize`).

Builds the package with both into build/sanitized and runs the kernels' tests and a part of the fuzz with that. Arguments
go to pytest in place of the choice of tests. Errors abort the process, with a report.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from emulation import fixed_addresses, sanitized_environment  # noqa: E402

PACKAGE = ROOT / "build" / "sanitized"
TESTS = ["test_bounds.py", "test_native.py", "test_native_kernels.py", "test_fuzz.py", "test_parity.py"]


def main(arguments: list[str]) -> int:
    environment = sanitized_environment()
    if environment is None:
        print("sparsebwd: the compiler has no sanitizers", file=sys.stderr)
        return 2
    build = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(PACKAGE)]
    done = subprocess.run(build, cwd=ROOT, env={**os.environ, "SPARSEBWD_SANITIZE": "1", "SPARSEBWD_CUDA": "0"})
    if done.returncode:
        return done.returncode
    environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])])
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *(arguments or tests)]
    for command in (pytest, [str(ROOT / "tools" / "fuzz.py"), "-n", "1000", "--seed", "2"]):
        done = subprocess.run([*fixed_addresses(), sys.executable, *command], cwd=ROOT, env=environment)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
