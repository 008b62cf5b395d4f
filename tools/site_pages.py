# SPDX-License-Identifier: Apache-2.0
"""The pages of the documentation site (`make docs`): README, docs/ with its results, and others, copied to build/docs for mkdocs.

Links between them lead to the copies. Other files of the repository are not on the site: of links to them the text stays.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "build" / "docs"
PAGES = {ROOT / "README.md": "index.md", ROOT / "CHANGELOG.md": "changelog.md", ROOT / "CONTRIBUTING.md": "contributing.md"}
PAGES |= {path: path.name for path in sorted((ROOT / "docs").glob("*.md"))}

RESULTS = {path: f"results/{path.name}" for path in sorted((ROOT / "docs" / "results").iterdir())}


def page(path: Path) -> str:
    """The text of a page, with the links that it has on the site."""

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        name, hash, anchor = target.partition("#")
        if "://" in target or not name:
            return match[0]
        found = (PAGES | RESULTS).get((path.parent / name).resolve())
        return f"[{text}]({found}{hash}{anchor})" if found else text

    return re.sub(r"\[([^]]*)\]\(([^)\s]+)\)", link, path.read_text("utf-8"))


def main() -> None:
    shutil.rmtree(TARGET, ignore_errors=True)
    TARGET.mkdir(parents=True)
    for path, name in PAGES.items():
        (TARGET / name).write_text(page(path), "utf-8")
    shutil.copytree(ROOT / "docs" / "results", TARGET / "results")


if __name__ == "__main__":
    main()
