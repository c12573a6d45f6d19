# `make demo` and `make test` set up everything they need: an environment in $(VENV), pinned by constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready-dev

.PHONY: demo test test-all slow check clean

demo: $(READY)
	$(BIN)/genrecal demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not slow" tests

test-all: test slow

slow: $(READY)
	$(BIN)/python -m pytest -m slow tests

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "genrecal needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo-out build dist
