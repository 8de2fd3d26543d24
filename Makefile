# `make serve` and `make test` do all the set-up there is; `make help` lists the rest.
VENV ?= .venv
# The first Python on the path that is new enough; override with `make PYTHON=/path/to/python serve`.
PYTHON ?= $(firstword $(foreach python,python3 python3.11 python3.12 python3.13 python3.14,$(if $(shell $(python) -c 'import sys; print(*[1] * (sys.version_info >= (3, 11)))' 2>/dev/null),$(python))))
CHECKPOINT ?= checkpoints/demo
BIN := $(VENV)/bin
TRITON_PYTEST := .venv-triton/bin/python -m pytest --noconftest -p no:cacheprovider -W ignore
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Every file that is downloaded is checked against the hashes of these lists.
INSTALL_LIST := $(PIP_INSTALL) --require-hashes --no-deps --only-binary :all: --requirement
# Whether torch's build is one for CUDA, which needs more.
CUDA_BUILD := $(BIN)/python -c 'from importlib.metadata import requires; exit(not any(name.startswith("cuda-") for name in requires("torch")))'

.DEFAULT_GOAL := help
.PHONY: help serve test faults-check benchmarks-check check protos triton-check gpu-packages gpu-check structures clean

help:  ## Lists the targets.
	@sed -n 's/^\([a-z][a-z-]*\):.*##  *\(.*\)/  make \1	\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 26

serve: $(VENV)/.serve $(CHECKPOINT)/echovlm.json  ## Installs what is missing, makes the demo checkpoint if there is none, and serves until Ctrl-C.
	@exec $(BIN)/echoray serve --checkpoint $(CHECKPOINT)

test: $(VENV)/.dev  ## Installs what the tests need and runs all checks and tests.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .
	$(BIN)/python -m pytest

faults-check: $(VENV)/.dev  ## Kills processes at every stage of a rollout, and tries every kind of bad bundle; takes eight minutes.
	$(BIN)/python -m pytest tests/faults --every-stage

benchmarks-check: $(VENV)/.dev  ## The tests of the benchmarks, which start whole systems to measure them.
	$(BIN)/python -m pytest tests/benchmarks

check: $(VENV)/.dev  ## The checks alone: linter, formatter, type checker.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

protos: $(VENV)/.dev  ## Generates the Python code of protos/ again.
	$(BIN)/python -m protos.generate

triton-check: .venv-triton/.ready  ## The GPU kernels without a GPU: interpreted at small sizes, and compiled for Hopper.
	.venv-triton/bin/python -c "from experts.kernels.gpu_support import import_megablocks; import_megablocks()"
	TRITON_INTERPRET=1 $(TRITON_PYTEST) tests/experts/kernels/test_triton_interpreter.py
	$(TRITON_PYTEST) tests/experts/kernels/test_triton_compile.py tests/experts/kernels/test_gpu_kernels_refused.py

gpu-packages: $(VENV)/.dev  ## Gathers what a GPU machine without network lacks, in gpu-packages/.
	$(BIN)/python -m benchmarks.gpu_packages gpu-packages

gpu-check:  ## On a GPU machine, with gpu-packages/: conformance, speed against the roofline, the system. GPU_CHECK=options.
	python3 -m benchmarks.gpu_check --packages gpu-packages $(GPU_CHECK)

structures:  ## Writes docs/structures.md again.
	$(PYTHON) docs/write_structures.py

clean:  ## Removes the environment and what tools left behind; checkpoints stay.
	rm -rf $(VENV) .venv-triton gpu-packages build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(CHECKPOINT)/echovlm.json: | $(VENV)/.serve
	$(BIN)/echoray checkpoint demo $(CHECKPOINT)

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and none was found; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml requirements/serve.txt requirements/cuda.txt | $(VENV)/bin/python
	@echo "Installing (about a minute, more on a slow network) …"
	$(INSTALL_LIST) requirements/serve.txt
	@if $(CUDA_BUILD); then set -x; $(INSTALL_LIST) requirements/cuda.txt; fi
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.serve
	$(INSTALL_LIST) requirements/dev.txt
	@touch $@

.venv-triton/.ready: constraints-triton.txt
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python -m pip install --quiet --no-deps --requirement constraints-triton.txt
	.venv-triton/bin/python -m pip install --quiet --no-deps --no-build-isolation megablocks==0.10.0 stanford-stk==0.7.1
	@touch $@
