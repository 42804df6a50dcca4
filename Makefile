# Two commands on a fresh machine: `make demo` and `make test`. Both build the environment first if need be.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
DEMO := demo
# One thread a process: tiny networks are slower on several, and two processes that both use all cores crawl.
# Compiled tests are kept whatever the environment says: compiling them again takes as long as importing torch.
IN_TWO_PROCESSES := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(RUN)/python -m pytest --numprocesses 2 --dist worksteal

.PHONY: install demo test test-fast check format

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11 ...")'
	@echo "building the environment in $(VENV) (some minutes and 6 GB the first time)"
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install
	RUN=$(RUN) DEMO=$(DEMO) sh demo.sh

test: install
	$(IN_TWO_PROCESSES) -m "not ray"
	$(RUN)/python -m pytest -m ray

test-fast: install
	$(IN_TWO_PROCESSES) -m "not ray and not slow"

check: install
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/hadolint Dockerfile

format: install
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .
