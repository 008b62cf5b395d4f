# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` need Python >= 3.11, a C++ compiler and make; pip gets the rest.
# Stamp files record finished work: a second call goes straight to the demo or the tests.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

INSTALLED := $(VENV)/.installed
BUILT     := $(VENV)/.built
LINTER    := $(VENV)/.linter
DOCS      := $(VENV)/.docs
ZOO       := $(VENV)/.zoo
CUDA      := $(VENV)/.cuda
TRITON    := $(VENV)/.triton
DIST      := $(VENV)/.dist
# A test that is left on one process is taken over by another that has none left.
PYTEST    := $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist worksteal
USABLE    := $(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
# For `make ceilings` only: the package itself chooses at run time.
VECTOR_FLAGS = $(shell grep -qw avx2 /proc/cpuinfo && echo -mavx2 -mfma -mbmi -mbmi2 -mpopcnt) \
               $(shell grep -qw avx512vl /proc/cpuinfo && echo -mavx512f -mavx512bw -mavx512dq -mavx512vl)
SOURCES   := $(shell find csrc -type f 2>/dev/null)
LAID_OUT   = $(wildcard $(foreach depth,* */* */*/*,$(foreach suffix,cpp h cu cuh inl,$(foreach folder,csrc tests tools,$(folder)/$(depth).$(suffix)))))

.DEFAULT_GOAL := help
.PHONY: help demo test check build bench fuzz zoo sanitize aarch64 gpu-check gpu-modules ceilings sass lint format docs wheel clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16

demo: $(BUILT)  ## train a ResNet-18 dense and sparse, and compare time, density and accuracy
	@$(BIN)/python -m sparsebwd.train --demo

test: $(BUILT) $(CUDA) $(TRITON)  ## run every test that this machine can run (ARGS= for pytest)
	@echo "Running every test, in a process for each core: about 14 minutes on 2 cores, where nothing else runs"
	@$(PYTEST) --durations=10 $(ARGS)

check: $(BUILT)  ## the tests that matter, 2 minutes: one of each CPU kernel, dtype, layer and command (ARGS= for pytest)
	@echo "Running each test with each value of each parameter once: about 2 minutes on 2 cores. make test has those that are"
	@echo "left out: slow ones, and kernels of a GPU run on the CPU, but for files that are named (ARGS=tests/test_cuda_agb.py)"
	@$(PYTEST) --check $(ARGS)

build: $(BUILT)  ## set up .venv, build and install the package

bench: $(BUILT)  ## time the sparse kernels against dense PyTorch
	@$(BIN)/python -m sparsebwd.bench

fuzz: $(BUILT)  ## random convolutions through the CPU kernels, against the reference (N=20000, SEED=0, DENSE=)
	@$(BIN)/python tools/fuzz.py $(if $(N),-n $(N)) $(if $(SEED),--seed $(SEED)) $(if $(DENSE),--dense)

zoo: $(BUILT) $(ZOO)  ## convert, train and revert networks of torchvision, timm and pytorchcv; writes docs/compatibility.md (ARGS=names)
	@PYTHONPATH=tests $(BIN)/python -m zoo $(ARGS)

sanitize: $(BUILT)  ## the CPU kernels compiled with AddressSanitizer and UBSan, through their tests and the fuzz, 8 minutes (ARGS= for pytest)
	@$(BIN)/python tools/sanitize.py $(ARGS)

aarch64:  ## the CPU kernels for aarch64, cross-compiled and run by an emulator, against plain loops (ARGS=)
	@PYTHONPATH=tools '$(PYTHON)' -m kernel_parity $(ARGS)

# With the Python that has PyTorch with CUDA, not that of .venv. ARGS="--tier first" is what to do in the first minutes.
gpu-check:  ## on a machine with a GPU: build, test, sanitize, measure and profile the CUDA kernels (PARTS=, ARGS=)
	@PYTHONPATH=tools '$(PYTHON)' -m gpu_check $(if $(PARTS),--parts $(PARTS)) $(ARGS)

gpu-modules: $(BUILT) $(CUDA)  ## compile for a GPU that is elsewhere, where the package cannot be built: build/gpu-modules
	@$(BIN)/python tools/gpu_modules.py $(ARGS)

ceilings:  ## measure how fast the inner loops of the CPU kernels could be at best
	@mkdir -p build
	@$(CXX) -std=c++17 -O3 -ffp-contract=off $(VECTOR_FLAGS) -Icsrc/include -Icsrc/cpu tools/ceilings.cpp -o build/ceilings
	@build/ceilings

sass: $(CUDA)  ## compile the CUDA kernels, no GPU needed, and show registers, spills, branches, and the speed that they predict
	@$(BIN)/python tools/sass.py

lint: $(BUILT) $(LINTER)  ## check the Python sources with ruff, the types that users see with mypy, the layout of C++ with clang-format
	@$(BIN)/ruff check python bench examples tests tools setup.py
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror $(LAID_OUT)

format: $(LINTER)  ## lay out the C++ and CUDA sources as .clang-format says
	@$(BIN)/clang-format -i $(LAID_OUT)

docs: $(LINTER) $(DOCS)  ## the documentation as a site with search and API reference, into build/site
	@$(BIN)/python tools/site_pages.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q
	@echo "build/site/index.html"

wheel: $(DIST)  ## a source distribution and a wheel of the CPU kernels, tried in an environment of its own: dist/
	@$(BIN)/python tools/release.py

clean:  ## remove build outputs and caches (not .venv)
	rm -rf build dist python/*.egg-info .pytest_cache .hypothesis .ruff_cache $(BUILT)
	find python bench tests \( -name '*.so' -o -name '__pycache__' \) -prune -exec rm -rf {} +

$(INSTALLED): requirements.txt tools/check_system.sh
	@tools/check_system.sh '$(PYTHON)'
	@$(USABLE) || { echo "Creating $(VENV)"; '$(PYTHON)' -m venv $(VENV); $(USABLE); } || \
	    { echo "sparsebwd: $(VENV) does not hold a working Python 3.11 or newer with pip; remove it and run make again." >&2; exit 1; }
	@echo "Installing pinned dependencies into $(VENV) (PyTorch is large: this may take minutes)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.txt
	@touch $@

$(BUILT): $(INSTALLED) setup.py pyproject.toml $(SOURCES)
	@tools/check_system.sh $(BIN)/python
	@echo "Building the C++ kernels: 3 to 5 minutes on 2 cores the first time; a line for each file that is done"
	@$(BIN)/python tools/build.py
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

# Tests that need the CUDA compiler skip themselves where it cannot be had; a continuous integration must have it.
$(CUDA): $(INSTALLED) requirements-cuda.txt
	@echo "Installing the CUDA compiler into $(VENV) (100 MB; no GPU is needed)"
	@if $(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements-cuda.txt; then touch $@; \
	else echo "sparsebwd: no CUDA compiler could be installed; tests that need one use what there is, or are skipped" >&2; [ -z "$$CI" ]; fi

# The same for Triton; a PyTorch for CUDA has brought one.
$(TRITON): $(INSTALLED) requirements-triton.txt
	@echo "Installing Triton into $(VENV) (190 MB; no GPU is needed)"
	@if $(BIN)/python -c 'import triton' 2>/dev/null || \
	    $(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements-triton.txt; then touch $@; \
	else echo "sparsebwd: Triton could not be installed; tests that need it are skipped" >&2; [ -z "$$CI" ]; fi

$(LINTER): $(INSTALLED) requirements-lint.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements-lint.txt
	@touch $@

$(ZOO): $(INSTALLED) requirements-zoo.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -r requirements-zoo.txt
	@touch $@

$(DOCS): $(INSTALLED) requirements-docs.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements-docs.txt
	@touch $@

$(DIST): $(INSTALLED) requirements-dist.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements-dist.txt
	@touch $@
