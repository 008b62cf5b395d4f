# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can tell (`make gpu-check`): build, tests, sanitizer, benchmark, profiler counters.

Needs an NVIDIA GPU, PyTorch with CUDA, nvcc and a C++ compiler; no network and no virtual environment. The package is
built into build/gpu-check, not into the Python that runs this. Each part has its own time limit, and one that fails does
not stop the others. After each, what is known goes into one JSON and one Markdown file, named after day and GPU; parts of
several runs on one day end up in the same files.
"""
