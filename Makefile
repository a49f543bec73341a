# Everything runs in .venv, made from a bare Python; versions are pinned in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
# Every command imports torch and transformers: without their compiled modules that takes half a minute.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: docs quickstart test test-all lint clean

quickstart: .venv/quickstart  ## prune and distill the embedded model on the embedded data
	HF_HUB_OFFLINE=1 $(BIN)/distill-llm run recipes/quickstart.yaml --output-dir runs/quickstart

# Two workers with a thread each: tiny models gain nothing from more threads, and busy threads wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: .venv/installed  ## the fast tests
	$(PYTEST)

test-all: .venv/docs test  ## the fast tests, then the slow ones; those of the site need its tools
	$(PYTEST) -m slow

docs: .venv/docs  ## the reference pages that are made from the code, then the site: build/site/index.html
	$(BIN)/python scripts/docs/recipe_reference.py
	$(BIN)/python scripts/docs/gallery.py
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs build/site
	@echo build/site/index.html

lint: .venv/installed  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Modules are compiled when they are first imported: compiling all of them takes longer than the quickstart's download.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt

.venv/quickstart: pyproject.toml constraints.txt
	@echo "installing into .venv: about a minute"
	$(PYTHON) -m venv .venv
	$(PIP) --editable ".[quickstart]"
	touch $@

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable ".[quickstart,dev]"
	touch $@ .venv/quickstart

.venv/docs: .venv/installed
	$(PIP) --editable ".[docs]"
	touch $@

clean:
	rm -rf .venv runs build dist *.egg-info
