# SPDX-License-Identifier: Apache-2.0
"""The first module of the package: while the rest loads for a command, Ctrl-C ends it without a traceback."""

import sys

if sys.argv[:1] == ["-m"]:  # python -m sparsebwd.train and its like load the package first
    import sparsebwd_command  # noqa: F401

_command = sys.modules.get("sparsebwd_command")
A_COMMAND = _command is not None and _command.is_a_command()
"""Whether it loads for a command, whose errors are one line."""
