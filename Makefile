# make env    .venv with everything installed
# make demo   the whole pipeline on the embedded digits
# make test   lint, type check and the test suite
# CUDA=12     takes DALI's wheel for CUDA 12 instead of 13 (either runs without a GPU)

PYTHON ?= python3
CUDA ?= 13
RUN ?= runs/digits
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-cuda$(CUDA)

.PHONY: env demo test lint clean

env: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet --editable '.[cuda$(CUDA),dev]'
	touch $@

demo: env
	$(BIN)/python benchmarks/demo.py --run $(RUN)

test: env lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
