# make demo | test | test-most | test-slow | test-all | soak | fuzz | lint | format | docs | docs-links | bench | clean | python
# Pythons that the suite passes with, the first that is found is taken; or PYTHON=...
TRIED := 3.13 3.12 3.11
PYENV_ROOT ?= $(HOME)/.pyenv
UV_PYTHONS := $(HOME)/.local/share/uv/python
CHECK := import sys, venv, ensurepip; sys.exit("%d.%d" % sys.version_info[:2] not in "$(TRIED)".split())
PYTHON ?= $(shell \
	for v in $(TRIED); do \
		for p in python$$v $(PYENV_ROOT)/versions/$$v.*/bin/python$$v $(UV_PYTHONS)/cpython-$$v.*/bin/python$$v; do \
			$$p -c '$(CHECK)' 2>/dev/null && echo $$p && exit; \
		done; \
	done; \
	python3 -c '$(CHECK)' 2>/dev/null && echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INPUTS := setup.cfg pyproject.toml requirements.txt
USABLE = $(shell $(PYTHON) -c '$(CHECK)' 2>/dev/null && echo yes)
comma := ,
# malloc asks Linux for huge pages: programs compile and compute faster
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
NAMES = $(subst $() ,$(comma) ,$(TRIED))
FOUND = $(or $(shell $(PYTHON) --version 2>/dev/null),nothing that runs)

.PHONY: demo test test-most test-slow test-all soak fuzz lint format docs docs-links bench clean python

demo: $(VENV)/installed
	BIN=$(BIN) bash launch/demo.sh

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not seconds"

test-most: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

test-all: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal

soak: $(VENV)/installed-test
	JAX_PLATFORMS=cpu $(BIN)/python tests/soak.py --out=benchmarks/results/soak.md

fuzz: $(VENV)/installed-test # reads 10,000 damaged files
	JAX_PLATFORMS=cpu $(BIN)/python tests/fuzz.py --out=benchmarks/results/fuzz.md

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed-docs # ends at docs/_build/html/index.html; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html

docs-links: $(VENV)/installed-docs # asks every address outside of the pages: needs a network
	$(BIN)/python -m sphinx -q -b linkcheck docs docs/_build/links

bench: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks.train_step

python: # prints the one that is taken
	@echo $(PYTHON)

$(VENV)/installed: $(INPUTS)
	$(if $(PYTHON),,$(error expected one of Python $(NAMES), with its venv module; found none; to fix it: install one of them, or use make PYTHON=PATH))
	$(if $(USABLE),,$(error expected one of Python $(NAMES), with its venv module; found PYTHON=$(PYTHON), which is $(FOUND); to fix it: use one of these versions: the tests pass with them))
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) -r requirements.txt -e .[test]
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(PIP) -r requirements.txt -e .[docs]
	touch $@

$(VENV)/installed-bench: $(VENV)/installed
	$(PIP) -r requirements.txt -e .[bench]
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache runs/demo build docs/_build docs/gallery *.egg-info
