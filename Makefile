# Every target installs what it needs into .venv first; nothing but Python >= 3.11, pip and make is assumed.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help install demo test lint clean

help:
	@echo "make demo   train on digits, splice sites and sounds, and print where the results are"
	@echo "make test   lint, type check and test"
	@echo "make clean  remove .venv, runs and caches"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "mamba2-apps needs Python >= 3.11, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/mamba2-apps train vision/digits
	$(BIN)/mamba2-apps train genomics/splice
	$(BIN)/mamba2-apps train audio/sounds

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
