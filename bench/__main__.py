# SPDX-License-Identifier: Apache-2.0
from sparsebwd.commands import one_line_errors

from .cli import app

if __name__ == "__main__":
    with one_line_errors():
        app(prog_name="python -m sparsebwd.bench")
