# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow bench bench-scale lint docs schema gpu dist clean

help:  ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY)  ## Make .venv with lit_kd and all it needs (the other targets do so by themselves)

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lit_kd needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --editable '.[dev]'
	@touch $@

demo: $(READY)  ## Compare methods on digits with 30% pair noise: table and pictures in runs/digits_pair
	$(BIN)/lit-kd compare configs/recipes/digits_pair.yaml --seeds 0

test: $(READY)  ## Run the tests
	$(BIN)/pytest -n 2 --dist loadfile

test-slow: $(READY)  ## Run the long studies
	$(BIN)/pytest -m slow

bench: $(READY)  ## Time lit_kd beside bare loops and other libraries: one table (minutes; on the GPU where there is one)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[bench]'
	$(BIN)/python tests/benchmarks/equal.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks

bench-scale: $(READY)  ## Measure how time and memory grow with the number of samples (minutes)
	$(BIN)/python tests/benchmarks/scale.py

lint: $(READY)  ## Check style, types and that imports between the rooms run downwards
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: $(READY)  ## Build the documentation, site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

gpu: $(READY)  ## Run every GPU path and benchmark in 8 minutes, table in runs/gpu (GPU="--device cpu --quick" tries it)
	$(BIN)/python tests/gpu.py $(GPU)

dist: $(READY)  ## Build wheel and sdist in dist
	$(BIN)/uv build --quiet

schema: $(READY)  ## Write the JSON schemas of configs and recipes, which the tests compare with the code
	$(BIN)/lit-kd schema > configs/fit.schema.json.new && mv configs/fit.schema.json.new configs/fit.schema.json
	$(BIN)/lit-kd schema recipe > configs/recipe.schema.json.new && mv configs/recipe.schema.json.new configs/recipe.schema.json

clean:  ## Remove the virtual environment and caches; runs are kept
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache build dist
