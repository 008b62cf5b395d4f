# SPDX-License-Identifier: Apache-2.0
"""The microbenchmark, ``python -m sparsebwd.bench``: sparse kernels against dense PyTorch, layer by layer.

Modules, in the order of the data flow: :mod:`.suites` (which layers), :mod:`.inputs` (tensors), :mod:`.operations`
(what is timed, against what, and whether its result is right), :mod:`.timing`, :mod:`.results` (columns, tables,
files), :mod:`.environment`, :mod:`.cli`. docs/performance.md says how to read what it prints.
"""
