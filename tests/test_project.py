# SPDX-License-Identifier: Apache-2.0
"""The project's own rules: documentation that runs, build files, licences, metadata."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import site_pages
from typer.main import get_command

import sparsebwd
from sparsebwd.train import cli

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
SOURCES = [
    path
    for folder in ("csrc", "python", "bench", "examples", "tests", "tools", ".ci")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".sh", ".h", ".hpp", ".c", ".cpp", ".inl", ".cu", ".cuh") or path == ROOT / ".ci" / "run"
] + [ROOT / "setup.py"]
REQUIREMENTS = ["requirements.txt", "requirements-cuda.txt", "requirements-lint.txt", "requirements-docs.txt", "requirements-dist.txt"]
REQUIREMENTS += ["requirements-zoo.txt", "requirements-triton.txt"]
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING")), *sorted((ROOT / "docs").glob("*.md"))]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "docs/compatibility.md", "docs/develop.md"])
def test_python_in_the_documentation_runs(page, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks or page == "docs/develop.md"
    program = tmp_path / "page.py"
    program.write_text("\n".join(blocks))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    for expected in re.findall(r"^```text\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL):
        assert expected in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} is not there"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text("utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, f"{target}: no such section"


def test_pages_of_the_site():
    """All are in its navigation, links lead to pages that are or to results, and each result is linked."""
    settings = (ROOT / "mkdocs.yml").read_text("utf-8")
    listed = re.findall(r"[\w-]+\.md$", settings.partition("\nnav:")[2].partition("\nmarkdown_extensions:")[0], re.MULTILINE)
    assert sorted(listed) == sorted(site_pages.PAGES.values())
    results = set(site_pages.RESULTS.values())
    linked = set()
    for path in site_pages.PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", site_pages.page(path)):
            linked.add(target)
            assert "://" in target or target.partition("#")[0] in ("", *listed, *results), f"{relative(path)}: {target}"
    assert results <= linked


def test_tests_that_pages_name_exist():
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", (ROOT / "docs" / "compatibility.md").read_text("utf-8"))
    assert named
    for path, name in named:
        assert f"\ndef {name}(" in (ROOT / path).read_text("utf-8"), f"{path}::{name}"


def test_make_targets_of_the_documentation_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", page.read_text("utf-8"), re.MULTILINE):
            assert "".join(target) in targets


def test_durations_of_the_tests_are_the_same_everywhere():
    for target in ("check", "test"):
        pages = [(ROOT / name).read_text("utf-8") for name in ("Makefile", "README.md", "CONTRIBUTING.md", "docs/develop.md")]
        said = re.search(rf"^{target}:.*\n\t@echo \".*about (\d+) minutes", pages[0], re.MULTILINE)[1]
        for page in pages[1:3]:
            assert re.search(rf"^make {target} .*about (\d+) minutes", page, re.MULTILINE)[1] == said
        assert re.search(rf"`make {target}` [\w\s,]*about (\d+) minutes", pages[3])[1] == said


@pytest.mark.parametrize("named", [True, False])
def test_kernels_of_a_gpu_are_in_make_check_only_where_their_file_is_named(named):
    """By what conftest.py makes of made-up items."""
    file = ROOT / "tests" / "test_cuda_agb.py"
    marks = {"emulated": [{"emulated"}, set()], "slow": [{"slow"}, set()]}
    items = [
        SimpleNamespace(nodeid=f"{name}{i}", path=file, get_closest_marker=own.__contains__)
        for name, owns in marks.items()
        for i, own in enumerate(map(frozenset, owns))
    ]
    left_out = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(item.nodeid for item in items))
    arguments = [f"{file}::test_memory_accesses" if named else str(file.parent)]
    conftest.pytest_collection_modifyitems(SimpleNamespace(getoption=lambda _: True, args=arguments, hook=hook), items)
    assert left_out == (["slow0"] if named else ["emulated0", "slow0"])
    assert [item.nodeid for item in items] == (["emulated0"] if named else []) + ["emulated1", "slow1"]


def test_training_commands_of_the_documentation_are_understood():
    commands = [
        line.partition(" -m sparsebwd.train ")[2].split()
        for page in PAGES
        for line in page.read_text("utf-8").splitlines()
        if line.startswith("python -m sparsebwd.train ")
    ]
    assert commands
    for arguments in commands:
        cli.config_of(cli.options_of(get_command(cli.app).make_context("train", arguments)))


def test_sources_name_their_licence():
    lacking = []
    for source in SOURCES:
        first, _, rest = source.read_text("utf-8").partition("\n")
        line = rest.partition("\n")[0] if first.startswith("#!") else first
        comment = "#" if source.suffix in (".py", ".sh", "") else "//"
        if line != f"{comment} SPDX-License-Identifier: Apache-2.0":
            lacking.append(relative(source))
    assert not lacking


def test_builds_are_portable_and_keep_ieee_arithmetic():
    unwanted = re.compile(r"-march=native|-mtune=native|-ffast-math|-Ofast|-funsafe-math|fast_math")
    for path in [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "Makefile", *(ROOT / "csrc").rglob("*.*")]:
        if path.is_file():
            assert not unwanted.search(path.read_text("utf-8")), relative(path)


def sources_of(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / "csrc" / folder).rglob("*")) if path.is_file()]
    assert found
    return found


def test_kernels_are_free_of_torch():
    includes = re.compile(r"^\s*#\s*include\s*[<\"](torch|ATen|c10|Python\.h|pybind11)", re.MULTILINE)
    for path in sources_of("include", "cpu", "cuda", "emulator"):
        found = set(includes.findall(path.read_text("utf-8")))
        allowed = {"pybind11"} if path.stem == "bindings" and path.parent.name == "emulator" else set()
        assert found <= allowed, relative(path)


# What the emulator cannot stand in for has one place each.
CUDA_ONLY = {
    "shared variables": (r"\b__shared__\b", {"device.cuh"}),
    "launches": (r"<<<", set()),
    "PTX": (r"\b(asm|__asm__)\b", {"device.cuh", "element.cuh"}),
    "cooperative groups": (r"\bcooperative_groups\b", {"device.cuh"}),
    "CUDA's headers": (r"#\s*include\s*[<\"]cu(da|rand|blas)", {"device.cuh", "device.cpp", "kernels.h"}),
}


@pytest.mark.parametrize("what", CUDA_ONLY)
def test_what_only_cuda_has_is_in_one_place(what):
    pattern, places = CUDA_ONLY[what]
    for path in sources_of("cuda"):
        code = re.sub(r"//.*", "", path.read_text("utf-8"))
        assert path.name in places or not re.search(pattern, code), f"{relative(path)} has {what}"


def test_one_version():
    version = PYPROJECT["project"]["version"]
    assert sparsebwd.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_paper_is_cited_by_one_name():
    for path in [*SOURCES, *PAGES, ROOT / "CITATION.cff"]:
        if path != Path(__file__):
            named = re.findall(r"Ye\s+et\s+al\.?(?:\s+\(\d+\))?", path.read_text("utf-8"))
            assert {re.sub(r"\s+", " ", name) for name in named} <= {"Ye et al. (2019)"}, relative(path)


def test_every_package_is_listed():
    def packages(root: Path, *prefix: str) -> set[str]:
        return {".".join([*prefix, *init.parent.relative_to(root).parts]) for init in root.rglob("__init__.py")}

    setuptools = PYPROJECT["tool"]["setuptools"]
    assert set(setuptools["packages"]) == packages(ROOT / "python") | packages(ROOT / "bench", "sparsebwd", "bench")
    assert setuptools["package-dir"] == {"": "python", "sparsebwd.bench": "bench"}
    assert setuptools["py-modules"] == [path.stem for path in (ROOT / "python").glob("*.py")]


def test_pinned_requirements_cover_what_the_package_declares():
    lines = [line for name in REQUIREMENTS for line in (ROOT / name).read_text("utf-8").splitlines()]
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    project = PYPROJECT["project"]
    declared = [
        *PYPROJECT["build-system"]["requires"],
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    for requirement in declared:
        assert re.match(r"[\w-]+", requirement)[0].lower() in pins, requirement
    assert pins["torch"] == "2.13.0"
    assert len(pins) == len({line.lower() for line in lines if "==" in line}), "a package is pinned to two versions"
    assert all(re.fullmatch(r"[\d.]+(post\d+)?", version) for version in pins.values())


@pytest.mark.slow
def test_metadata(tmp_path):
    build = f"import setuptools.build_meta as b; b.prepare_metadata_for_build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
    (info,) = tmp_path.glob("sparsebwd-*.dist-info")
    metadata = (info / "METADATA").read_text("utf-8")
    assert f"\nName: sparsebwd\nVersion: {sparsebwd.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    assert "\nRequires-Dist: torch>=2.11\n" in metadata
    assert "# sparsebwd\n" in metadata  # the README
    assert (info / "licenses" / "LICENSE").read_text("utf-8").lstrip().startswith("Apache License")


@pytest.mark.slow
def test_the_source_distribution_is_complete(tmp_path):
    build = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("sparsebwd-*.tar.gz")
    with tarfile.open(archive) as files:
        packed = {name.partition("/")[2] for name in files.getnames()}
    results = (ROOT / "bench" / "results").iterdir()  # which pages link to
    wanted = [path for path in [*SOURCES, *PAGES, *results, *map(ROOT.joinpath, REQUIREMENTS)] if path.parent.name != ".ci"]
    assert not {relative(path) for path in wanted} - packed
    assert not [name for name in packed if name.endswith((".so", ".o", ".pyc"))]


def test_one_binary_serves_every_python():
    """What makes the tag cp311-abi3 of wheels true."""
    assert PYPROJECT["project"]["requires-python"] == ">=3.11"
    assert '"py_limited_api": "cp311"' in (ROOT / "setup.py").read_text("utf-8")
    module = pytest.importorskip("sparsebwd._C")
    assert module.__file__.endswith("/_C.abi3.so")
    if shutil.which("nm") is None:
        pytest.skip("nm is not found: install binutils")
    used = subprocess.run(["nm", "-D", "--undefined-only", module.__file__], capture_output=True, text=True, check=True)
    assert set(re.findall(r"\b_?Py\w+", used.stdout)) == {"PyModule_Create2"}


@pytest.mark.parametrize(
    "environment, python, words",
    [
        ({}, "no-such-python", "'no-such-python' is not found; install Python 3.11 or newer"),
        ({}, "false", "'false' does not run; install Python 3.11 or newer"),
        ({"CXX": "no-such-compiler"}, sys.executable, "no C++ compiler is found as 'no-such-compiler'; install one"),
        ({"CXX": "false"}, sys.executable, "'false' does not compile C++20; install"),
    ],
)
def test_what_the_system_lacks_is_said_in_one_sentence(environment, python, words):
    check = ROOT / "tools" / "check_system.sh"
    done = subprocess.run([check, python], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert words in done.stderr and done.stderr.startswith("sparsebwd: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "version, ensurepip, words",
    [
        ("3.9 0", "true", "is Python 3.9; install Python 3.11 or newer"),
        ("3.14 1", "false", "without its venv module; install it (Debian, Ubuntu: apt install python3.14-venv)"),
        ("3.14 1", "true", "Python.h of Python 3.14 is not found in /nowhere; install Python's headers"),
    ],
)
def test_incomplete_python_is_refused(version, ensurepip, words, tmp_path):
    python = tmp_path / "python3"
    python.write_text(
        "#!/bin/sh\n"
        f'case "$2" in *version_info*) echo {version};; *ensurepip*) {ensurepip};; *sysconfig*) echo /nowhere;; esac\n'
    )
    python.chmod(0o755)
    done = subprocess.run([ROOT / "tools" / "check_system.sh", python], capture_output=True, text=True)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1


def test_what_this_machine_has_passes():
    done = subprocess.run([ROOT / "tools" / "check_system.sh", sys.executable], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
