# Needs Python 3.11 or later, make and a package registry; everything is installed into .venv. Planning installs no
# torch; what runs, tests, measures or checks the engine and its kernels does.
PYTHON ?= python3
WORKERS ?= auto

VENV := .venv
PY := $(VENV)/bin/python
# One empty file per finished step of the installation; a newer pyproject.toml repeats the step.
VENV_MADE := $(VENV)/.made
BASE_INSTALLED := $(VENV)/.base-installed
ENGINE_INSTALLED := $(VENV)/.engine-installed
TEST_INSTALLED := $(VENV)/.test-installed

.DEFAULT_GOAL := help
.PHONY: help setup setup-engine plan dashboard test test-gpu lint bench bench-kernels clean chromium

help: ## list the targets (default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "  PYTHON=python3.12 picks the interpreter that .venv is made from; WORKERS=4 the test processes."

setup: $(BASE_INSTALLED) ## create .venv and install Memwall into it

setup-engine: $(ENGINE_INSTALLED) ## the same with torch, Triton and transformers, for memwall generate, serve and bench

plan: $(BASE_INSTALLED) ## plan Llama-3.1-8B on H200, memwall plan's default question, from the shipped profile
	@$(VENV)/bin/memwall plan

dashboard: $(BASE_INSTALLED) ## serve the dashboard on this machine; PORT=8600 chooses the port
	@$(VENV)/bin/memwall dashboard $(if $(PORT),--port $(PORT))

test: $(TEST_INSTALLED) chromium ## run the tests (those that need a GPU are skipped without one)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --maxprocesses 8  # processes share the cores, not threads

# The browser of the dashboard's tests: Debian's, where apt-get may be used. Without it they are skipped, no more.
APT_GET := DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20
chromium:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	skipped() { echo "make test: $$1, so the tests that need Chromium are skipped" >&2; exit 0; }; \
	command -v apt-get >/dev/null || skipped "no Chromium and no apt-get here"; \
	if [ "$$(id -u)" = 0 ]; then as=env; elif sudo -n true 2>/dev/null; then as="sudo -n env"; \
	else skipped "no Chromium, and no right to install it (apt-get install chromium)"; fi; \
	echo "installing chromium for the dashboard's tests"; \
	$$as $(APT_GET) install -y --no-install-recommends chromium >/dev/null 2>&1 || \
	{ $$as $(APT_GET) update >/dev/null 2>&1; \
	  $$as $(APT_GET) install -y --no-install-recommends chromium >/dev/null 2>&1; } || \
	skipped "apt-get cannot install chromium"

test-gpu: $(TEST_INSTALLED) ## run only the tests that need a GPU, in one process; fails without one
	@$(PY) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make test-gpu: no CUDA device was found")'
	@$(PY) -m pytest -q -m gpu tests/kernels tests/engine

lint: $(TEST_INSTALLED) ## check style and formatting
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

bench: $(BASE_INSTALLED) ## measure the speed of the planner; TRACE=path.csv adds the Azure hour
	@$(PY) -m planner.bench $(if $(TRACE),--trace $(TRACE))

bench-kernels: $(ENGINE_INSTALLED) ## measure the kernels beside their peers, on a GPU; OUTPUT=path.json writes the record
	@$(PY) -m kernels.bench $(if $(OUTPUT),--output $(OUTPUT))

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

$(ENGINE_INSTALLED): pyproject.toml $(VENV_MADE)
	@echo "installing memwall[engine] into $(VENV)"
	@$(PY) -m pip install -qq --disable-pip-version-check --editable '.[engine]'
	@touch $(BASE_INSTALLED) $@

$(TEST_INSTALLED): pyproject.toml $(VENV_MADE)
	@echo "installing memwall[engine,test] into $(VENV)"
	@$(PY) -m pip install -qq --disable-pip-version-check --editable '.[engine,test]'
	@touch $(BASE_INSTALLED) $(ENGINE_INSTALLED) $@
