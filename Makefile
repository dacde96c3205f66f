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
	$(BIN)/accel bench --suite cartridge --limit 16 --concurrency 1,4 --repeat 1
	$(BIN)/accel bench --suite dparallel --limit 16 --timed 4 --repeat 1 --no-sweep
	$(BIN)/accel bench --suite lawcat --lengths 128,512,1024 --limit 4 --repeat 1 --concurrency 1

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

# On a GPU machine without a network: make test-gpu VENV=  (likewise bench-gpu) takes the python on PATH with what it
# has and installs nothing; accel is then found through a link, not through the root (see PYTHONSAFEPATH above).
ifeq ($(strip $(VENV)),)
GPU_READY := build/path/accel $(LINKS)
GPU_PYTHON := PYTHONPATH=$(CURDIR)/build/path$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON)
else
GPU_READY := setup
GPU_PYTHON := $(BIN)/python
endif
# compiling the kernels takes longer than running them: several processes share that where pytest-xdist is installed
GPU_WORKERS ?= 8
NO_GPU = no CUDA device that torch can use: $@ needs one; make $(@:-gpu=) runs without

build/path/accel:
	@mkdir -p $(@D)
	@ln -sfn ../../accel $@

.PHONY: gpu-ready
gpu-ready: $(GPU_READY)

test-gpu: gpu-ready
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "$(NO_GPU)")'
	@spread=$$($(GPU_PYTHON) -c 'import xdist; print("-n $(GPU_WORKERS)")' 2>/dev/null); \
	$(GPU_PYTHON) -m pytest -m "gpu or kernel" $$spread --continue-on-collection-errors --json-out build/test-gpu.json

bench-gpu: gpu-ready
	@gpu=$$($(GPU_PYTHON) -c 'import re, sys, torch; torch.cuda.is_available() or sys.exit("$(NO_GPU)"); \
	  print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().removeprefix("nvidia ")).strip("-"))') || exit 1; \
	$(GPU_PYTHON) -c 'from accel.cli.main import main; main(prog_name="accel")' bench --suite kernels --device cuda --output "bench/results/kernels-$$gpu.json"

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks $(LINKS) $(VENV)
	find accel kernels drafters bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
