# SPDX-License-Identifier: Apache-2.0
"""The parts that run tests on the GPU: a few that matter most, and all."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from . import machine
from .machine import Failed, require, run
from .record import Check

ALL, SMOKE, OTHERS = "gpu", "gpu and smoke", "gpu and not smoke"
"""Which tests, in pytest's words."""


def tests_command(report: Path, which: str = ALL) -> list[object]:
    # Only files that have such tests: others import what need not be here.
    files = [path for path in sorted((machine.ROOT / "tests").glob("test_*.py")) if re.search(r"\bmark\.gpu\b", path.read_text("utf-8"))]
    names = [path.relative_to(machine.ROOT) for path in files]
    # A test that hangs shows where in the log: after a minute all stacks go there.
    return [
        sys.executable, "-m", "pytest", "-q", "-m", which, "--tb=short", "-o", "faulthandler_timeout=60", "-p",
        "no:cacheprovider", f"--junitxml={report}", *names,
    ]  # fmt: skip


def tests(check: Check, name: str = "tests", which: str = ALL) -> dict[str, Any]:
    require(["pytest", "hypothesis", "sparsebwd"])
    report = machine.WORK / f"{name}.xml"
    report.unlink(missing_ok=True)
    # cuBLAS asks for this where PyTorch is told to be deterministic.
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    log, late = machine.WORK / f"{name}.log", None
    try:
        run(tests_command(report, which), log, 60 * check.minutes, environment=environment, show=True, interrupts=True)
    except Failed as error:
        late = error
    if not report.exists():
        raise late or Failed(f"pytest wrote no report; see {log}")
    found = outcomes(report)
    check.record["parts"][name] = found
    failures = f"{len(found['failed'])} of {found['ran']} tests failed: {', '.join(found['failed'][:20])}"
    if late:
        raise Failed(f"{failures}; then {late}" if found["failed"] else f"{found['ran']} tests passed, then {late}")
    if found["failed"]:
        raise Failed(failures)
    if not found["ran"]:
        raise Failed("no test ran")
    return found


def outcomes(report: Path) -> dict[str, Any]:
    """Of a report of pytest: how many tests ran, the names of those that failed, what the first ones said, and why others
    were skipped."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    messages = {}
    for case in cases:
        wrong = next((found for name in ("failure", "error") if (found := case.find(name)) is not None), None)
        if wrong is not None:
            messages[f"{case.get('classname')}::{case.get('name')}"] = (wrong.get("message") or "").partition("\n")[0][:300]
    failed = list(messages)
    reasons = [(case.find("skipped").get("message") or "") for case in cases if _has(case, "skipped")]
    skipped = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
    seconds = sum(float(case.get("time") or 0) for case in cases)
    first = dict(list(messages.items())[:10])
    return {"ran": len(cases) - len(reasons), "failed": failed, "messages": first, "skipped": skipped, "seconds": round(seconds)}


def _has(case: ElementTree.Element, *names: str) -> bool:
    return any(case.find(name) is not None for name in names)
