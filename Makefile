# Everything goes through here, and CI calls the same targets. `make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu`
# takes PyTorch's CPU build where PyPI's own is the CUDA one.
PYTHON ?= python3
TORCH_INDEX ?=
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: setup serve test explore soak check format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) --editable '.[dev,nixl-cu13]'
	touch $@

serve: setup
	$(BIN)/triptych serve --port $(PORT)

test: setup
	$(BIN)/pytest

# Random examples that nobody has seen yet; `make test` has the same ones every time.
explore: setup
	TRIPTYCH_EXPLORE=1 $(BIN)/pytest tests/stages tests/memory tests/router tests/planning tests/flows/test_cluster_model.py

# The same, then everything that fails in every way at every moment, 10,000 hostile requests and as many messages, and
# 2,000 requests with kills and role switches: about half an hour.
soak: setup explore
	TRIPTYCH_SOAK=1 $(BIN)/pytest tests/faults
	TRIPTYCH_FUZZ=10000 $(BIN)/pytest tests/fuzz
	$(BIN)/python benchmarks/soak.py --json benchmarks/results/soak-$$(date -u +%F).json

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
