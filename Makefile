# Everything runs in .venv, made from a bare Python; versions are pinned in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: docs quickstart test test-all lint clean

quickstart: .venv/installed  ## prune and distill the embedded model on the embedded data
	HF_HUB_OFFLINE=1 $(BIN)/distill-llm run recipes/quickstart.yaml --output-dir runs/quickstart
	@cat runs/quickstart/report.md

# Two workers with a thread each: tiny models gain nothing from more threads, and busy threads wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: .venv/installed  ## the fast tests
	$(PYTEST)

test-all: test  ## the fast tests, then the slow ones
	$(PYTEST) -m slow

docs: .venv/installed  ## the reference pages that are made from the code
	$(BIN)/python scripts/docs/recipe_reference.py
	$(BIN)/python scripts/docs/gallery.py

lint: .venv/installed  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[quickstart,dev]"
	touch $@

clean:
	rm -rf .venv runs build dist *.egg-info
