# Everything a fresh clone needs: `make demo` shows the speed-up, `make test` checks the project.
# Needs python3 (3.11 or newer) with venv; everything else goes into .venv.

PYTHON ?= python3
VENV ?= .venv
# more arguments for the pip call that installs torch, for example where a CPU build is to be found
TORCH ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
READY := $(VENV)/.ready
LINKS := accel/kernels accel/drafters accel/bench

# the folder kernels/ must not answer to `import kernels` (see setup.py): keep the root off sys.path
export PYTHONSAFEPATH := 1

.PHONY: setup demo test lint fix types docs bench bench-gpu test-gpu clean
.DEFAULT_GOAL := demo

setup: $(READY) $(LINKS)

$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (torch and transformers: some minutes the first time)" >&2
	@$(PIP) install -c constraints.txt filelock fsspec jinja2 networkx setuptools sympy typing_extensions numpy
	@$(BIN)/python -W ignore -c 'import torch' 2>/dev/null || $(MAKE) --no-print-directory torch
	@rm -rf build
	@$(PIP) install --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $@

# With a GPU: torch and the CUDA packages it asks for. Without one: torch alone, so that none are pulled; a build
# made for CUDA then cannot be imported, and the last line says what to do.
.PHONY: torch
torch:
	@if [ "$$(uname)" != Linux ] || command -v nvidia-smi >/dev/null; then \
	  $(PIP) install $(TORCH) -c constraints.txt torch; \
	else \
	  $(PIP) install --no-deps --force-reinstall $(TORCH) -c constraints.txt torch; \
	  $(BIN)/python -W ignore -c 'import torch' 2>$(VENV)/torch.log || { tail -n 1 $(VENV)/torch.log >&2; \
	    echo "torch was found only as a CUDA build, which needs CUDA libraries that this machine lacks: install the CPU build of" \
	         "torch into $(VENV) (or name its place: make setup TORCH='--index-url URL'), then run make again" >&2; exit 1; }; \
	fi

# type checkers cannot see setup.py's mapping; these ignored links show it to them
$(LINKS): accel/%:
	@ln -sfn ../$* $@

demo: setup
	$(BIN)/accel bench

test: setup lint types
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

fix: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: setup
	$(BIN)/mypy accel

docs: setup
	$(BIN)/python -m accel.cli.docs docs/cli.md

bench: setup
	$(BIN)/accel bench --json --output bench/results/cpu.json

test-gpu: setup
	$(BIN)/python -m pytest -m gpu --json-out build/test-gpu.json

bench-gpu: setup
	$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "no CUDA device here; use make bench")'
	$(BIN)/accel bench --json --output bench/results/gpu.json

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks $(LINKS) $(VENV)
	find accel kernels drafters bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
