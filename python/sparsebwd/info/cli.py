# SPDX-License-Identifier: Apache-2.0
"""The command line of ``python -m sparsebwd.info``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from sparsebwd.commands import new_app, one_line_errors
from sparsebwd.data.files import json_text

from . import info

app = new_app()


@app.command()
def command(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what runs on this machine, and why the rest does not."""
    found = info()
    print(json_text(found) if json else found)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m sparsebwd.info") -> None:
    with one_line_errors():
        app(arguments, prog_name=prog)
