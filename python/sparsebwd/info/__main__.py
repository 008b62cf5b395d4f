# SPDX-License-Identifier: Apache-2.0
"""``python -m sparsebwd.info``: print what runs on this machine."""

from __future__ import annotations

import argparse

from sparsebwd.commands import one_line_errors
from sparsebwd.data.files import json_text
from sparsebwd.info import info


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sparsebwd.info", description="What runs on this machine, and why the rest does not."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args().json
    with one_line_errors():
        found = info()
        print(json_text(found) if as_json else found)


if __name__ == "__main__":
    main()
