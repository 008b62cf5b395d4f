# SPDX-License-Identifier: Apache-2.0
"""The first module of the package: while the rest loads for a command, Ctrl-C ends it without a traceback."""

import sys

if sys.argv[:1] == ["-m"]:  # python -m sparsebwd.train and its like load the package first
    import sparsebwd_command  # noqa: F401
