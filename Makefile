# Every target installs what it needs by itself: `make demo` and `make test` work on a fresh clone.
VENV := .venv
BIN := $(VENV)/bin
REPOSITORY ?= demo/synthetic/repository
.DEFAULT_GOAL := help
.PHONY: help setup check test demo serve bench bench-full rivals proto image image-gpu gpu-report test-gpu clean bench-growth

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

# ../shared/data (DATA=…) holds the click logs; a corpus whose log is not there is left out, and the page says so.
# The rivals are optional: hnswlib is compiled here, ScaNN gets an environment of its own.
DATA ?= ../shared/data
COMPARE = $(BIN)/nann compare --work build/bench --data $(DATA) --docs docs/benchmarks.md

bench: setup rivals ## every contender on the synthetic catalogue and MovieLens-1M (30 minutes); writes docs/benchmarks.md
	$(COMPARE) --corpus synthetic --corpus ml-1m --timed-points 0 $(ARGS)

bench-full: setup rivals ## the same, Brunch, and 1.3 million synthetic items (hours)
	$(COMPARE) --corpus synthetic --corpus ml-1m --corpus brunch-small --corpus brunch-small-fgsm --corpus brunch --corpus synthetic-1.3m --rounds 5 $(ARGS)

rivals:
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[rivals]' --constraint constraints.txt

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

bench-growth: setup ## how cost grows from 10,000 to 4 million items (20 GB, half an hour or more); writes docs/growth.md
	$(BIN)/python -m nann.cli.growth --output build/growth --docs docs/growth.md $(ARGS)

# The first Python that runs, is new enough and can make virtual environments; `PYTHON=…` picks one.
$(VENV)/.installed: pyproject.toml client/pyproject.toml constraints.txt
	@set -e; test -x $(BIN)/python || { \
	  for python in $(PYTHON) python3 python3.12 python3.11 python3.10 python3.13; do \
	    if $$python -c 'import sys, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; \
	    then $$python -m venv $(VENV); break; fi; done; \
	  test -x $(BIN)/python || { echo 'make: needs Python 3.10 to 3.13 with venv (Debian: apt install python3-venv)' >&2; exit 1; }; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[offline,dev,pjrt]' --editable ./client --constraint constraints.txt
	@touch $@
