# make env    .venv with everything installed
# make demo   the whole pipeline on the embedded digits
# make test   lint, type check and the test suite
# make docs   the documentation as a site, build/docs/index.html
# CUDA=12     takes DALI's wheel for CUDA 12 instead of 13 (either runs without a GPU)

PYTHON ?= python3
CUDA ?= 13
RUN ?= runs/digits
VENV := .venv
BIN := $(VENV)/bin
# Compiles every kernel for sm_80 and sm_90. It takes minutes, and comes last so that both cores share it.
COMPILED := tests/kernels/test_ahead_of_time.py
INSTALLED := $(VENV)/.installed-cuda$(CUDA)

.PHONY: env demo test lint docs clean

env: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet --editable '.[cuda$(CUDA),dev,docs]'
	touch $@

demo: env
	$(BIN)/python benchmarks/demo.py --run $(RUN)

test: env lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore=$(COMPILED)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(COMPILED)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: env
	$(BIN)/python docs/generate_reference.py
	$(BIN)/python docs/draw.py
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
