# Every target installs what it needs by itself: `make demo` and `make test` work on a fresh clone.
VENV := .venv
BIN := $(VENV)/bin
REPOSITORY ?= demo/synthetic/repository
.DEFAULT_GOAL := help
.PHONY: help setup check test demo serve bench proto image image-gpu gpu-report test-gpu clean

help: ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(VENV)/.installed ## make .venv with the pinned dependencies

check: setup ## formatting, lint, types, spelling, import rules
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy nann client/nann_client && $(BIN)/codespell && $(BIN)/lint-imports && $(BIN)/clang-format --dry-run -Werror nann/engine/cuda/kernels/*.cu*

test: setup ## every test but the demo
	$(BIN)/python -m pytest $(ARGS)

demo: setup ## pipeline, server and two queries; INPUT=PATH for your own click log
	$(BIN)/nann demo $(if $(INPUT),--input $(INPUT))

serve: setup ## serve REPOSITORY (by default the demo's)
	$(BIN)/nann serve --repository $(REPOSITORY)

bench: setup ## load REPOSITORY in process, closed and open loop
	$(BIN)/nann benchmark --repository $(REPOSITORY)

gpu-report: ## measure on a GPU (8 minutes) and write docs/gpu.md; PYTHON=… picks the Python that has CuPy
	$(or $(PYTHON),$(BIN)/python) -m nann.cli.gpu_report --output build/gpu-report --docs docs/gpu.md $(ARGS)

test-gpu: ## the tests that need a GPU; PYTHON=… picks the Python that has CuPy
	$(or $(PYTHON),$(BIN)/python) tests/gpu/run.py

proto: setup ## generate nann/service/pb and the client's from protos/
	$(BIN)/python protos/generate.py

image: ## build the container image nann:cpu
	docker build --target cpu --tag nann:cpu .

image-gpu: ## build the container image nann:gpu
	docker build --target gpu --tag nann:gpu .

clean: ## remove .venv, caches and the demo's output
	rm -rf $(VENV) demo build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# The first Python that runs, is new enough and can make virtual environments; `PYTHON=…` picks one.
$(VENV)/.installed: pyproject.toml client/pyproject.toml constraints.txt
	@set -e; test -x $(BIN)/python || { \
	  for python in $(PYTHON) python3 python3.12 python3.11 python3.10 python3.13; do \
	    if $$python -c 'import sys, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; \
	    then $$python -m venv $(VENV); break; fi; done; \
	  test -x $(BIN)/python || { echo 'make: needs Python 3.10 to 3.13 with venv (Debian: apt install python3-venv)' >&2; exit 1; }; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[offline,dev,pjrt]' --editable ./client --constraint constraints.txt
	@touch $@
