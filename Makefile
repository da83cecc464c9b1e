# Farmhand: `make` prints the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
# Python 3.11 or 3.12: the wheels with redis-server inside exist for these. 3.13 and later need redis-server on PATH.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
INSTALLED := $(VENV)/.installed
FIGURES ?=

.PHONY: help run test check bench migrate lock clean

help: ## print the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Farmhand needs Python 3.11 or newer: install it, or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Installing into $(VENV) with $$($(PYTHON) --version); the first time takes some minutes ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[web,worker,cli,demo]' --group dev
	@touch $@

run: $(INSTALLED) ## start the whole farm on this machine: API on 8080, Flower on 5555
	@$(BIN)/farmhand up

test: $(INSTALLED) ## run every test, on real servers that start with them
	$(BIN)/python -m pytest

check: $(INSTALLED) ## format, lint, types, imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED) ## measure; FIGURES="name name" for some
	$(BIN)/python -m bench $(FIGURES)

migrate: $(INSTALLED) ## bring FARMHAND_DATABASE_URL to the newest schema
	$(BIN)/farmhand migrate

lock: $(INSTALLED) ## write constraints.txt anew: the newest versions that resolve together
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check -e '.[web,worker,cli,demo]' --group dev
	build/lock/bin/python -m pip freeze --exclude-editable --exclude pip | sed 's/+.*$$//' > constraints.txt

clean: ## remove what the other targets have made, the farm's data included
	rm -rf $(VENV) .farmhand build dist bench/out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
