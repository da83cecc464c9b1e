# Farmhand: `make` prints the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
# Those of the given Python interpreters that run and are new enough: a name on PATH may lead to nothing.
fit = $(foreach p,$(1),$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(p)))
# The wheels with redis-server inside exist for 3.11 and 3.12. 3.13 and later need redis-server on PATH.
PYTHON ?= $(firstword $(call fit,python3.12 python3.11 python3))
# Where to take torch from instead of the usual index, as from that of the CPU builds.
TORCH_INDEX ?=
PIP = $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
INSTALLED := $(VENV)/.installed
SDK := build/sdk/.installed
FIGURES ?=

.PHONY: help run test check bench migrate openapi lock clean

help: ## print the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Farmhand needs Python 3.11 or newer: install it, or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Installing into $(VENV) with $$($(PYTHON) --version); the first time takes some minutes ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) 'pip>=25.1'
	@$(if $(TORCH_INDEX),$(PIP) -c constraints.txt --index-url '$(TORCH_INDEX)' torch)
	@$(PIP) -c constraints.txt -e '.[web,worker,cli,demo]' --group dev
	@touch $@

run: $(INSTALLED) ## start the whole farm on this machine: API on 8080, Flower on 5555
	@$(BIN)/farmhand up

# The public SDK, as its users have it, in an environment of its own. It asks for Python 3.12 and runs on 3.11.
$(SDK): tests/sdk/requirements.txt $(INSTALLED)
	@$(BIN)/python -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --quiet --disable-pip-version-check -r tests/sdk/requirements.txt
	@$(@D)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --no-deps --ignore-requires-python sie-sdk==0.10.1
	@touch $@

test: $(INSTALLED) $(SDK) ## run every test, on real servers that start with them
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(INSTALLED) ## format, lint, types, imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED) ## measure; FIGURES="name name" for some
	$(BIN)/python -m bench $(FIGURES)

migrate: $(INSTALLED) ## bring FARMHAND_DATABASE_URL to the newest schema
	$(BIN)/farmhand migrate

openapi: $(INSTALLED) ## write docs/openapi.json anew, from the routes and the types that they read
	$(BIN)/python -m webapp.openapi docs/openapi.json

# by the oldest Python that the farm runs on: what the newest one resolves to may not exist for it. Some Pythons need
# more than that one: setuptools from 3.12 on (torch), async-timeout before 3.11.3 (redis).
lock: PYTHON = $(firstword $(call fit,python3.11 python3.12 python3))
lock: BIN = build/lock/bin
lock: ## write constraints.txt anew: the newest versions that resolve together
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	$(PIP) --upgrade 'pip>=25.1' setuptools async-timeout
	$(PIP) -e '.[web,worker,cli,demo]' --group dev
	set -o pipefail; $(BIN)/python -m pip freeze --all --exclude-editable --exclude pip | sed 's/+.*$$//' > build/lock/constraints.txt
	mv build/lock/constraints.txt constraints.txt

clean: ## remove what the other targets have made, the farm's data included
	rm -rf $(VENV) .farmhand build dist bench/out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
