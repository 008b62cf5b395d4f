# SPDX-License-Identifier: Apache-2.0
"""The comparison of the CPU kernels with plain loops (tools/kernel_parity), here and for aarch64 under an emulator."""

from __future__ import annotations

import kernel_parity
import pytest

pytestmark = pytest.mark.slow

TARGETS = {"here": kernel_parity.here, "aarch64": kernel_parity.aarch64}
CASES = 800


@pytest.fixture(scope="module", params=TARGETS)
def target(request) -> kernel_parity.Target:
    found = TARGETS[request.param]()
    if reason := kernel_parity.missing(found):
        pytest.skip(reason)
    return found


@pytest.fixture(scope="module")
def program(target, tmp_path_factory):
    """Here with the kernels that the package has, elsewhere with those that compile several times as fast."""
    kernels = kernel_parity.built() if target == kernel_parity.here() else []
    return kernel_parity.build(target, tmp_path_factory.mktemp("parity"), ["-O1"], kernels)


def test_kernels_are_right(target, program):
    done = kernel_parity.check(target, program, CASES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{CASES} cases agree: baseline")
    assert target.machine != "aarch64" or done.stdout.endswith(" neon\n")


@pytest.mark.parametrize("fault", kernel_parity.FAULTS)
def test_a_planted_fault_is_found(target, program, fault):
    done = kernel_parity.check(target, program, 48, fault=fault)
    assert done.returncode == 1 and done.stdout.startswith("FAILED case"), done.stdout + done.stderr


def test_a_kernel_that_no_case_ran_is_an_error(target, program):
    done = kernel_parity.check(target, program, 8)
    assert done.returncode == 1 and "FAILED all cases: none ran" in done.stdout
