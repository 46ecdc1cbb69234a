# `make` runs exactly what CI runs. Everything is set up in .venv; nothing outside the checkout is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test quick lint types bench clean

demo: $(STAMP)
	$(BIN)/actstore demo demo.act

test: lint types $(STAMP)
	$(BIN)/pytest

quick: lint types $(STAMP)
	$(BIN)/pytest -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/extract.py
	$(BIN)/python benchmarks/query.py

# A torch that is already there (in .venv, or in the Python that makes it) is kept: its pin is then left out.
$(STAMP): pyproject.toml constraints.txt
	PYTHON="$(PYTHON)" sh tools/setup.sh $(VENV)
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info demo.act .mypy_cache .ruff_cache .pytest_cache
