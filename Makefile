# make env    .venv with everything installed
# make demo   the whole pipeline on the embedded digits
# make check  for while one works: lint, type check and quick tests that train nothing, in about a minute
# make test   lint, type check and the test suite
# make kernels  compiles every Triton kernel for every GPU: about half an hour on two cores, which make test needs only
#             where a kernel, a tile or Triton has changed
# make budgets  the same, and records what the compiler made of them; to be committed with the change
# make docs   the documentation as a site, build/docs/index.html
# CUDA=12     takes DALI's wheel for CUDA 12 instead of 13 (either runs without a GPU)

PYTHON ?= python3
CUDA ?= 13
RUN ?= runs/digits
VENV := .venv
BIN := $(VENV)/bin
# Compiles kernels for sm_80, 89, 90, 100 and 120: a sample in a minute or two where nothing has changed since
# budgets.json was recorded. It comes last so that both cores share it.
COMPILED := tests/kernels/test_ahead_of_time.py
INSTALLED := $(VENV)/.installed-cuda$(CUDA)

CHECKED := tests/test_imports.py tests/test_messages.py tests/engine/space tests/engine/networks tests/engine/host \
	tests/engine/runs tests/engine/checkpoints tests/engine/test_config.py \
	tests/search/algorithms tests/kernels/test_backends.py tests/docs/test_pages.py

.PHONY: env demo check test kernels budgets lint docs clean

env: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet --editable '.[cuda$(CUDA),dev,docs]'
	touch $@

demo: env
	$(BIN)/python benchmarks/demo.py --run $(RUN)

check: env lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow' $(CHECKED)

test: env lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore=$(COMPILED)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(COMPILED)

kernels: env
	BSNAS_KERNELS_COMPILED=all $(BIN)/python -m pytest -n 2 --dist worksteal $(COMPILED)

budgets: env
	BSNAS_KERNELS_COMPILED=record $(BIN)/python -m pytest -n 2 --dist worksteal $(COMPILED) -k every_launch_compiles

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
