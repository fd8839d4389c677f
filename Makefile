# make demo | test | test-all | soak | lint | format | bench | clean
# Python 3.11 or later: the newest of python3.12, python3.11, python3 that is there, or PYTHON=...
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INPUTS := setup.cfg pyproject.toml requirements.txt

.PHONY: demo test test-all soak lint format bench clean

demo: $(VENV)/installed
	BIN=$(BIN) bash launch/demo.sh

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal

soak: $(VENV)/installed-test
	JAX_PLATFORMS=cpu $(BIN)/python tests/soak.py --out=benchmarks/results/soak.md

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks.train_step

$(VENV)/installed: $(INPUTS)
	@test -n "$(PYTHON)" || { echo "csba_jax needs Python 3.11 or later with venv: install it, or name it with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) -r requirements.txt -e .[test]
	touch $@

$(VENV)/installed-bench: $(VENV)/installed
	$(PIP) -r requirements.txt -e .[bench]
	touch $@

clean:
	rm -rf $(VENV) runs/demo build *.egg-info
