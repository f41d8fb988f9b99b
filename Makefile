# Needs Python 3.11 or later, make and a package registry; everything is installed into .venv.
PYTHON ?= python3
WORKERS ?= auto

VENV := .venv
PY := $(VENV)/bin/python
# One empty file per finished step of the installation; a newer pyproject.toml repeats the step.
VENV_MADE := $(VENV)/.made
BASE_INSTALLED := $(VENV)/.base-installed
TEST_INSTALLED := $(VENV)/.test-installed

.DEFAULT_GOAL := help
.PHONY: help setup plan test lint bench clean

help: ## list the targets (default)
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "  PYTHON=python3.12 picks the interpreter that .venv is made from; WORKERS=4 the test processes."

setup: $(BASE_INSTALLED) ## create .venv and install Memwall into it

plan: $(BASE_INSTALLED) ## run memwall plan with its default question
	@$(VENV)/bin/memwall plan

test: $(TEST_INSTALLED) ## run the tests (those that need a GPU are skipped without one)
	@$(PY) -m pytest -q -n $(WORKERS) --maxprocesses 8

lint: $(TEST_INSTALLED) ## check style and formatting
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

bench: $(BASE_INSTALLED) ## measure the speed of the planner; TRACE=path.csv adds the Azure hour
	@$(PY) -m planner.bench $(if $(TRACE),--trace $(TRACE))

clean: ## remove .venv, build products and caches
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV_MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "Memwall needs Python 3.11 or later, which $(PYTHON) is not: name one with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(BASE_INSTALLED): pyproject.toml $(VENV_MADE)
	@echo "installing memwall into $(VENV)"
	@$(PY) -m pip install -qq --disable-pip-version-check --editable .
	@touch $@

$(TEST_INSTALLED): pyproject.toml $(VENV_MADE)
	@echo "installing memwall[test] into $(VENV)"
	@$(PY) -m pip install -qq --disable-pip-version-check --editable '.[test]'
	@touch $(BASE_INSTALLED) $@
