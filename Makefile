PYTHON ?= python3
# Another interpreter has an environment of its own, so that `make test PYTHON=python3.12` tests it.
VENV := $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TYPES := build/types
PYTEST_ARGS ?=
# Tests at a time. The processes that many start wait for each other half of the time.
JOBS ?= 2

# On a machine without a GPU the default torch wheel brings gigabytes of CUDA libraries along;
# TORCH_INDEX=<address of PyTorch's CPU wheels> avoids that.
TORCH_INDEX ?=

.PHONY: venv demo test checks docs clean
.DELETE_ON_ERROR:

venv: $(STAMP)

# torch goes first and alone, so that TORCH_INDEX is asked for torch and for nothing else.
# The stamp is written last: an interrupted installation is simply resumed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PYTHON=$(PYTHON) is %d.%d: Python 3.11 or newer is needed. Set PYTHON=python3.11, say." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install 'pip>=23.1'
	$(BIN)/python -m pip install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[test,docs]'
	@touch $@

demo: $(STAMP)
	$(BIN)/dhellam demo

# One thread per process: tests start several ranks, and their thread pools would fight for the cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist loadgroup --no-loadscope-reorder) -m 'not gpu' $(PYTEST_ARGS)

# mypy cannot follow `package-dir`, so it is shown the tree as it is installed, made of links.
checks: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/lightning_dhellam
	@ln -s "$(CURDIR)"/lightning_dhellam/* "$(CURDIR)"/kernels "$(CURDIR)"/search "$(CURDIR)"/recipes $(TYPES)/lightning_dhellam/
	@ln -s "$(CURDIR)"/benchmarks $(TYPES)/
	cd $(TYPES) && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p lightning_dhellam -p benchmarks

# Strict: a broken link, a missing name or a malformed docstring fails.
docs: $(STAMP)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --nitpicky docs build/docs
	@echo "built: build/docs/index.html"

clean:
	rm -rf .venv .venv-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find lightning_dhellam kernels search recipes benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
