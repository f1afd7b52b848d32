# Two commands matter: `make run` and `make test`. Both set everything up in .venv on
# their first call and touch nothing outside this folder.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip keeps its downloads in the clone too; PIP_* set by whoever calls still apply.
export PIP_CACHE_DIR ?= $(CURDIR)/$(VENV)/pip-cache
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test check format bench faults lock wheel clean

run: $(VENV)/run.stamp
	@exec $(BIN)/molva up

# `make test ARGS="-n 0 tests/messaging -k lanes"` is one process, for a debugger.
test: $(VENV)/dev.stamp
	@scripts/test-tools
	@scripts/run-tests $(ARGS)

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy tests benchmarks
	$(BIN)/mypy -p examples.scaling_out -p examples.adder
	$(BIN)/lint-imports

format: $(VENV)/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks $(ARGS)

# Real processes, real faults: a few minutes of each kind. ARGS="run --seed 7 --seconds 600",
# "power --cuts 100", "queue --seconds 300", "pairs --pair kafka-redis" and "long" are more of it.
faults: $(VENV)/dev.stamp
	@scripts/test-tools
ifdef ARGS
	$(BIN)/python -m tests.faults.live $(ARGS)
else
	$(BIN)/python -m tests.faults.live run --seconds 90 --rate 1000
	$(BIN)/python -m tests.faults.live power --cuts 30
	$(BIN)/python -m tests.faults.live queue --seconds 30
endif

wheel: $(VENV)/dev.stamp
	$(BIN)/python -m build --no-isolation --wheel --outdir dist .

# Rewrites the pinned, hashed requirement files from pyproject.toml. Needs uv.
lock:
	uv pip compile -q --generate-hashes --universal --python-version 3.11 --no-header --no-annotate --upgrade \
	  --extra all --group build -o requirements/run.txt pyproject.toml
	uv pip compile -q --generate-hashes --universal --python-version 3.11 --no-header --no-annotate \
	  -c requirements/run.txt \
	  --extra all --group build --group dev -o requirements/dev.txt pyproject.toml

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "molva needs Python 3.11 or newer; %s is %s. Set PYTHON=python3.12, for example." % (sys.executable, sys.version.split()[0]))'
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: requirements/run.txt pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --require-hashes -r requirements/run.txt
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/dev.stamp: requirements/dev.txt pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --require-hashes -r requirements/dev.txt
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@ $(VENV)/run.stamp

clean:
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .import_linter_cache .hypothesis
