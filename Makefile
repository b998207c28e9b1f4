# make demo and make test build the environment they need: Python 3.11 and pip's registry do.

PYTHON := $(shell for python in python3.11 python3.12 python3.13 python3; do \
    $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' \
        >/dev/null 2>&1 && echo $$python && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Small models: more threads only wait for one another.
export OMP_NUM_THREADS ?= 2
# Tests at a time, of one thread each.
WORKERS ?= 2
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help env demo test fuzz lint format data clean

help:
	@echo 'make env      an environment in .venv (Python 3.11 or newer; 2 GB and up)'
	@echo 'make demo     draw a sheet of prompts with the shipped model'
	@echo 'make test     linters, types, import rules and tests'
	@echo 'make fuzz     damaged files and odd calls by the thousand (MUSE_FUZZ_CASES=3000)'
	@echo 'make lint     the same without the tests'
	@echo 'make format   put the code into shape'
	@echo 'make data     draw the emoji set into data/emoji (needs the Noto Color Emoji font)'
	@echo 'make clean    remove caches and what marks .venv as complete'

env: .venv/demo.stamp

demo: env
	$(BIN)/python examples/scenes/demo.py

test: export HF_HUB_OFFLINE = 1
test: export OMP_NUM_THREADS = 1
test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

fuzz: export HF_HUB_OFFLINE = 1
fuzz: export MUSE_FUZZ_CASES ?= 3000
fuzz: .venv/dev.stamp
	$(BIN)/python -m pytest tests/fuzz -s -q --timeout=0

lint: .venv/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports

format: .venv/dev.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

data: .venv/emoji.stamp
	$(BIN)/python examples/emoji/make_dataset.py --out data/emoji

clean:
	rm -rf .venv/*.stamp .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is the last thing written, so an interrupted installation is taken up again.
.venv/torch.stamp: constraints.txt
	@test -n '$(PYTHON)' || { echo 'No Python 3.11 or newer with venv found: install one' \
	    '(Debian: apt install python3 python3-venv), or give it: make PYTHON=/path/to/python'; \
	    exit 1; }
	@echo 'Making .venv with $(PYTHON): PyTorch first, this takes a few minutes'
	@$(PYTHON) -m venv .venv
	@$(PIP) torch==2.13.0
	@touch $@

.venv/%.stamp: pyproject.toml .venv/torch.stamp
	@echo 'Installing the package with its extra "$*"'
	@$(PIP) -e '.[$*]'
	@touch $@
