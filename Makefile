# `make` runs exactly what CI runs. Everything is set up in .venv; nothing outside the checkout is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PARITY := .venv-saelens
TOOLS := .venv-tools

.PHONY: demo test quick lint types parity tools bench bench-large clean

demo: $(STAMP)
	$(BIN)/actstore demo demo.act

test: lint types $(STAMP) parity tools
	$(BIN)/pytest

quick: lint types $(STAMP)
	$(BIN)/pytest -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# The same SAEs and sites by sae-lens and transformer-lens themselves, in an environment of their own.
parity: $(PARITY)/.installed
	$(PARITY)/bin/python -m pytest tests/parity

$(PARITY)/.installed: $(STAMP) constraints-saelens.txt tools/setup_saelens.sh
	sh tools/setup_saelens.sh $(VENV) $(PARITY)
	touch $@

# Tools that people use with a store, each really opened, in an environment of their own.
tools: $(TOOLS)/.installed
	$(TOOLS)/bin/python -m pytest tests/tools

$(TOOLS)/.installed: $(STAMP) constraints-tools.txt tools/setup_tools.sh
	sh tools/setup_tools.sh $(VENV) $(TOOLS)
	touch $@

# Every figure of docs/benchmarks.md; exits with 1 where a floor is missed. `bench-large`: the sizes that need time and disk.
bench: $(STAMP)
	$(BIN)/python benchmarks/all.py

bench-large: $(STAMP)
	$(BIN)/python benchmarks/all.py --large

# A torch that is already there (in .venv, or in the Python that makes it) is kept: its pin is then left out.
$(STAMP): pyproject.toml constraints.txt
	PYTHON="$(PYTHON)" sh tools/setup.sh $(VENV)
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(PARITY) $(TOOLS) build *.egg-info demo.act .mypy_cache .ruff_cache .pytest_cache
