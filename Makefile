# Any Python from 3.11 on: make quickstart PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help quickstart test gpu campaign lint type docs clean

help:  ## Show what can be made
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

quickstart: $(VENV)/.installed  ## Install, train on the embedded data with and without tuning, give a verdict (no network beyond the install)
	$(BIN)/hfbench suite quickstart_untuned quickstart_tuned --repeats 3
	$(BIN)/hfbench compare runs/quickstart_untuned runs/quickstart_tuned
	$(BIN)/hfbench report runs -o report

test: $(VENV)/.installed-test  ## Install with the test extra and run the test suite; PYTEST_ARGS are passed on
	$(BIN)/python -m pytest $(PYTEST_ARGS)

gpu: $(VENV)/.installed-test  ## Try what only a GPU can show, in five minutes; writes selftest.json, to attach to a report of a fault
	@status=0; $(BIN)/hfbench selftest || status=$$?; \
	$(BIN)/python -m pytest -m gpu --numprocesses=0 $(PYTEST_ARGS) || status=$$?; exit $$status

campaign: $(VENV)/.installed-test  ## Kill, damage, drift and misuse at random; some ten minutes each, PYTEST_ARGS are passed on
	$(BIN)/python -m pytest -m campaign --numprocesses=0 --timeout=0 $(PYTEST_ARGS) tests/campaigns

lint: $(VENV)/.installed-dev  ## Check style and format with ruff, and which room imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: $(VENV)/.installed-dev  ## Check types with mypy --strict
	$(BIN)/mypy

docs: $(VENV)/.installed-dev  ## Write docs/cli.md and docs/recipe.schema.json anew, then check the documentation
	$(BIN)/hfbench schema > docs/recipe.schema.json
	$(BIN)/typer hfbench.cli.app utils docs --name hfbench --output docs/cli.md
	$(BIN)/python -m pytest tests/test_docs.py

clean:  ## Remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hfbench needs Python 3.11 or newer; found " + sys.version + ". Say which: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)

# About 6 GB and two minutes with torch's CUDA libraries; a CPU build of torch installed before is kept.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable .
	@touch $@

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[$*]'
	@touch $@ $(VENV)/.installed
