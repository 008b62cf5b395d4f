# SPDX-License-Identifier: Apache-2.0
"""Five networks of the benchmark's own, as all of ``make zoo``; and its table."""

from __future__ import annotations

import pytest

from .architectures import ARCHITECTURES, OWN
from .checks import check
from .table import PAGE, between


@pytest.mark.parametrize("architecture", [OWN[0], *(pytest.param(other, marks=pytest.mark.slow) for other in OWN[1:])], ids=str)
def test_network(architecture):
    row = check(architecture)
    assert row.converted + sum(count for _, count in row.left) == row.convolutions
    assert all("ConvTranspose2d" in reason for reason, _ in row.left)


def test_the_table_has_all_networks():
    lines = [line for line in between(PAGE.read_text("utf-8")) if line.startswith("|")][2:]
    listed = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in lines]
    assert listed == [(architecture.source, architecture.name) for architecture in ARCHITECTURES]
