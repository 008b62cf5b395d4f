#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Checks for what pip cannot install: check_system.sh PYTHON.
# Silent where nothing is missing; otherwise one sentence that says what to install, and exit status 1.
set -u
python=${1:-python3}
cxx=${CXX:-c++}

missing() {
    echo "sparsebwd: $1" >&2
    exit 1
}

command -v "$python" >/dev/null 2>&1 ||
    missing "'$python' is not found; install Python 3.11 or newer (Debian, Ubuntu: apt install python3 python3-venv python3-dev), or name one: make PYTHON=/path/to/python3."
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2], int(sys.version_info >= (3, 11)))' 2>/dev/null) ||
    missing "'$python' does not run; install Python 3.11 or newer, or name another: make PYTHON=/path/to/python3."
version=${found% *}
[ "${found#* }" = 1 ] ||
    missing "'$python' is Python $version; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3."
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    missing "Python $version comes without its venv module; install it (Debian, Ubuntu: apt install python$version-venv)."
command -v ${cxx%% *} >/dev/null 2>&1 ||
    missing "no C++ compiler is found as '$cxx'; install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++), or name one: CXX=/path/to/g++."
echo '#include <concepts>' | $cxx -std=c++20 -x c++ -fsyntax-only - 2>/dev/null ||
    missing "the C++ compiler '$cxx' does not compile C++20; install g++ 11 or clang 14 or newer, or name one: CXX=/path/to/g++."
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -f "$headers/Python.h" ] ||
    missing "Python.h of Python $version is not found in $headers; install Python's headers (Debian, Ubuntu: apt install python$version-dev; Fedora: dnf install python3-devel)."
