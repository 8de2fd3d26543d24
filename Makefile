# `make serve` and `make test` do all the set-up there is; `make help` lists the rest.
VENV ?= .venv
# The first Python on the path that is new enough; override with `make PYTHON=/path/to/python serve`.
PYTHON ?= $(firstword $(foreach python,python3 python3.11 python3.12 python3.13 python3.14,$(if $(shell $(python) -c 'import sys; print(*[1] * (sys.version_info >= (3, 11)))' 2>/dev/null),$(python))))
CHECKPOINT ?= checkpoints/demo
BIN := $(VENV)/bin
TRITON_PYTEST := .venv-triton/bin/python -m pytest --noconftest -p no:cacheprovider -W ignore
# Every file that is downloaded is checked against the hashes of the lists in requirements/.
INSTALL = $(1) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes
# pip prefers files whose hash the index names, so the build without CUDA, where one is offered, is asked for by version.
INSTALL_TORCH = $(call INSTALL,$(1)) --only-binary :all: --requirement requirements/torch-cpu.txt 2>/dev/null || \
	$(call INSTALL,$(1)) --only-binary :all: --requirement requirements/torch-cuda.txt

# Installed again when they change, which compiles them.
CPU_KERNELS := $(wildcard experts/kernels/cpu/*.c experts/kernels/cpu/*.h)
# Of these there are no wheels.
SOURCES := jieba,rouge-score

.DEFAULT_GOAL := help
.PHONY: help serve test demo-swap demo-model faults-check benchmarks-check client-check benchmarks check lock licences protos triton-check gpu-packages gpu-check structures clean

help:  ## Lists the targets.
	@sed -n 's/^\([a-z][a-z-]*\):.*##  *\(.*\)/  make \1	\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 26

serve: $(VENV)/.serve $(CHECKPOINT)/echovlm.json  ## Installs what is missing, makes the demo checkpoint if there is none, and serves until Ctrl-C.
	@exec $(BIN)/echoray serve --checkpoint $(CHECKPOINT)

test: $(VENV)/.dev  ## Installs what the tests need and runs all checks and tests.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# Two processes: one for the tests that start systems, which mostly wait, and one for all others.
	@$(BIN)/mypy . & types=$$!; $(BIN)/python -m pytest -n 2 --durations=25; tests=$$?; wait $$types && exit $$tests

faults-check: $(VENV)/.dev  ## Kills processes at every stage of a rollout, and tries every kind of bad bundle; takes twenty minutes.
	$(BIN)/python -m pytest tests/faults --every-stage

demo-swap: $(VENV)/.dev  ## Replaces the demo's breast experts under load and shows what that changes; takes two minutes.
	@exec $(BIN)/python -m benchmarks.demo_swap

demo-model: $(VENV)/.dev  ## Trains the demo model again, an hour on two cores, and puts it where `make serve` takes it from.
	$(BIN)/echoray train demo build/demo-model
	cp -r build/demo-model/demo_model/. echovlm_ray/checkpoint/demo_model/

benchmarks-check: $(VENV)/.dev  ## The tests of the benchmarks, which start whole systems to measure them.
	$(BIN)/python -m pytest tests/benchmarks

client-check: $(VENV)/.dev  ## The client's distribution with the newest gRPC and protobuf that there are.
	$(BIN)/python -m pytest tests/client_newest

benchmarks: $(VENV)/.dev  ## Installs what the benchmarks need, and lists them.
	@echo "One command each; --help says what it measures:"
	@grep -l __main__ benchmarks/*.py | sed 's,/,.,; s,\.py$$,,; s,^,  $(BIN)/python -m ,'

check: $(VENV)/.dev  ## The checks alone: linter, formatter, type checker.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

lock: $(VENV)/.dev  ## Resolves the dependencies again, and writes constraints.txt and requirements/.
	$(BIN)/python -m requirements.lock

licences: $(VENV)/.dev  ## Writes docs/licences.md again.
	$(BIN)/python -m requirements.licences

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

$(VENV)/.serve: pyproject.toml $(CPU_KERNELS) $(wildcard requirements/torch-*.txt) requirements/serve.txt | $(VENV)/bin/python
	@echo "Installing (about a minute, more on a slow network) …"
	$(call INSTALL_TORCH,$(BIN)/python)
	$(call INSTALL,$(BIN)/python) --only-binary :all: --requirement requirements/serve.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@ls experts/kernels/cpu/_kernels*.so >/dev/null 2>&1 || \
		echo "Without a C compiler that works here, oneDNN computes on the CPU, which is slower: see docs/kernels.md." >&2
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.serve
	$(call INSTALL,$(BIN)/python) --only-binary :all: --no-binary $(SOURCES) --no-build-isolation --requirement requirements/dev.txt
	@touch $@

.venv-triton/.ready: $(wildcard requirements/torch-*.txt) requirements/triton.txt requirements/megablocks.txt
	$(PYTHON) -m venv .venv-triton
	$(call INSTALL_TORCH,.venv-triton/bin/python)
	$(call INSTALL,.venv-triton/bin/python) --only-binary :all: --requirement requirements/triton.txt
	$(call INSTALL,.venv-triton/bin/python) --no-build-isolation --requirement requirements/megablocks.txt
	@touch $@
