# Everything runs from .venv, which the first target makes. PYTHON=/path/to/python chooses the interpreter (3.11 or newer).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo venv test test-slow lint format bench docs tutorials gpu clean

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTHON ?=
METHOD ?=
PUBLISH ?=
WORKERS ?= 2
PYTEST_ARGS ?=
ARGS ?=

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

demo: venv ## train a spiking and an ordinary classifier on Fashion-MNIST; a table and an HTML page
	@echo "demo: two networks on real Fashion-MNIST, then a report"
	@$(BIN)/leanlight reproduce classifier/tables/demo --jobs 2 --output site/demo.json
	@$(BIN)/leanlight report site/demo.json --output site >/dev/null
	@echo "demo: table, verdicts and pictures in $(CURDIR)/site/index.html"

venv: $(INSTALLED) ## set up .venv (about 3 minutes and 6 GB)

# One pip command: package by package, pip upgrades torch past the torchvision and torchaudio that belong to it.
$(INSTALLED): pyproject.toml constraints.txt
	@python='$(PYTHON)'; \
	for candidate in python3.11 python3.12 python3.13 python3 python; do \
	  [ -z "$$python" ] || break; \
	  "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && python=$$candidate; \
	done; \
	[ -n "$$python" ] || { echo "make venv: no Python >= 3.11 with venv found; give one: make venv PYTHON=/path/to/python3.11" >&2; exit 2; }; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make venv: PYTHON=$$python is not Python >= 3.11" >&2; exit 2; }; \
	$(BIN)/python -c '' 2>/dev/null || "$$python" -m venv --clear $(VENV); \
	echo "venv: installing the tested versions into $(VENV) (about 3 minutes and 6 GB, mostly torch)"; \
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --no-input -c constraints.txt -e '.[dev,docs,rl]'; \
	touch $@

test: venv ## fast tests
	$(BIN)/pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-slow: venv ## the long tests: kill and resume, several processes, claims
	$(BIN)/pytest -m slow $(PYTEST_ARGS)

lint: venv ## ruff, format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv ## speed and memory of every method, or of METHOD=classifier, into runs/results; PUBLISH=1: into docs/results
	$(BIN)/leanlight benchmark $(or $(METHOD),--all) $(if $(PUBLISH),--publish)

docs: venv ## the documentation site, into site/docs
	@NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/mkdocs build --quiet --strict
	@$(BIN)/leanlight report --all --output site/docs/measured >/dev/null
	@echo "docs: $(CURDIR)/site/docs/index.html; with search: $(BIN)/python -m http.server -d site/docs"

tutorials: venv ## run the tutorials (some minutes); the next `make docs` shows what they draw
	@LEANLIGHT_TUTORIAL_PICTURES="$(CURDIR)/site/tutorials" $(BIN)/pytest -m slow tests/docs/test_tutorials.py

# With PYTHON= it takes that interpreter as it is, without .venv and without anything installed of the project.
gpu: $(if $(PYTHON),,venv) ## check on a GPU, in under ten minutes, what the suite promises there, into docs/results/*/gpu.json; ARGS="--only dsqn"
	@PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(or $(PYTHON),$(BIN)/python) -m leanlight.benchmarks.gpu $(ARGS)

clean: ## remove .venv, caches and site/; runs and data stay
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
