# From a machine with make and Python >= 3.11 to a running demo or test suite. `make help` lists all.
# Another Python: make PYTHON=/path/to/python3.12 test. Another place: make VENV=/tmp/venv test.

VENV ?= .venv
BIN = $(VENV)/bin
CLIENTS = $(VENV)-clients
USABLE = import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHONS = python3.11 python3.12 python3.13 python3
PYTHON ?= $(shell for p in $(PYTHONS); do \
	if $$p -c '$(USABLE)' 2>/dev/null; then echo $$p; break; fi; done)
run-each = set -e; for script in $(or $(wildcard $1),$(error no $1)); do $(BIN)/python $$script; done
PYTEST = $(BIN)/python -m pytest -n 2

# Installs into one environment: not two at a time.
.NOTPARALLEL:

.PHONY: help
help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

.PHONY: demo
demo: $(VENV)/.models model ## Generate text with a real language model
	$(BIN)/python examples/generate_text.py

.PHONY: test
test: $(VENV)/.dev model ## Run the tests, without the slow ones and the examples
	$(PYTEST) -m "not slow and not example" $(PYTEST_ARGS)

.PHONY: examples
examples: $(VENV)/.dev model ## Run the examples and the README on the real model
	$(PYTEST) -m "example and not slow" $(PYTEST_ARGS)

.PHONY: test-all
test-all: $(VENV)/.dev model ## Run all tests
	$(PYTEST) $(PYTEST_ARGS)

.PHONY: test-clients
test-clients: $(CLIENTS)/.clients model ## Run the tests of swapped decoders, in their own environment
	$(CLIENTS)/bin/python -m pytest -n 2 -m "not slow" tests/clients tests/serving/test_clients.py $(PYTEST_ARGS)

.PHONY: grid
grid: $(VENV)/.dev ## Run every row of the shape grid through the kernel (hours; resumes)
	$(BIN)/python -m tests.grid $(GRID_ARGS)

.PHONY: lint
lint: $(VENV)/.dev ## Lint, check the format and the types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# On Linux, the default torch is the CUDA build, of several GB; PIP_ARGS can name another index.
.PHONY: bench
bench: $(VENV)/.bench ## Run the benchmarks, torch beside us
	$(call run-each,$(filter-out benchmarks/bench_swap%,$(wildcard benchmarks/*.py)))

.PHONY: bench-clients
bench-clients: $(CLIENTS)/.clients model ## Time swapped decoders before and after
	set -e; for script in benchmarks/bench_swap*.py; do $(CLIENTS)/bin/python $$script; done

.PHONY: docs
docs: $(VENV)/.docs ## Draw the figures of the documentation
	$(call run-each,docs/*.py)

.PHONY: model
model: $(VENV)/.models ## Get the model file (a download of 93 MB, once)
	@echo "Getting the model file (93 MB, once)"
	@$(BIN)/python -c 'from jax_tkg.models import smollm2_path; print(smollm2_path())'

.PHONY: clean
clean: ## Remove everything that this file made, but not the model file
	rm -rf $(VENV) $(CLIENTS) .nox .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each extra: installing is repeated only when what it depends on has changed.
$(VENV)/.models $(VENV)/.dev $(VENV)/.docs $(VENV)/.bench: $(VENV)/.%: pyproject.toml constraints/dev.txt | $(VENV)/.created
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints/dev.txt $(PIP_ARGS) -e '.[$*]'
	@touch $@

$(CLIENTS)/.clients: pyproject.toml constraints/clients.txt | $(CLIENTS)/.created
	$(CLIENTS)/bin/python -m pip install --disable-pip-version-check -c constraints/clients.txt $(PIP_ARGS) -e '.[clients,models,test]'
	@touch $@

$(VENV)/.created $(CLIENTS)/.created: %/.created:
	@$(or $(PYTHON),false) -c '$(USABLE)' || { \
	echo 'Needed: Python 3.11 or newer with its venv and ensurepip modules. Tried: $(or $(PYTHON),$(PYTHONS)).'; \
	echo 'Debian, Ubuntu: apt-get install python3 python3-venv. Elsewhere: make PYTHON=/path/to/python3.11 ...'; \
	exit 1; } >&2
	$(PYTHON) -m venv --clear $*
	@touch $@
