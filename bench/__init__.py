# SPDX-License-Identifier: Apache-2.0
"""The microbenchmark, ``python -m sparsebwd.bench``: sparse kernels against dense PyTorch, layer by layer.

Modules, in the order of the data flow: :mod:`.suites` (which layers), :mod:`.inputs` (tensors), :mod:`.operations` with
:mod:`.operation` and :mod:`.pruning` (what is timed, against what, and whether its result is right), :mod:`.timing`, :mod:`.runner` (from settings to rows),
:mod:`.results` (columns, tables, files), :mod:`.plot`, :mod:`.compare`, :mod:`.environment`, :mod:`.cli`. Commands of their
own: :mod:`.capture` writes files of :mod:`.gradients`, :mod:`.step` times whole training steps, :mod:`.zoo` those of many
networks, :mod:`.overhead` what a layer costs beside its computation. :mod:`.calibration` measures for
``python -m sparsebwd.calibrate``. docs/performance.md says how to read what they print.
"""
