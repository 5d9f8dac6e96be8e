SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
# The first interpreter that is new enough; choose another with `make PYTHON=…`.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: setup demo test test-clients lint fmt fuzz stress stress-server bench bench-peers dist help

PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Installs again whenever pyproject.toml changes; every target that needs the environment depends on it.
# pip reads dependency groups from 25.1 on, and an environment made by uv has no pip. The warning that is left out is
# about folders in the working directory, which tests/test_packaging.py checks.
$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.10 or newer is needed; none was found on PATH" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	$(PIP) 'pip>=25.1'
	PYTHONWARNINGS='ignore:Editable installation' $(PIP) --group dev --editable .
	@touch $@

setup: $(VENV)/.installed ## create .venv with the package and its development tools

# One picture and one question, as a person would read them.
define ask
	@echo "picture:  fastvlm_mlx/demo_model/$(1)"; echo "question: $(2)"; echo "answer:"
	@$(BIN)/fastvlm generate --model demo fastvlm_mlx/demo_model/$(1) --prompt "$(2)" --verbose
	@echo
endef

demo: setup ## set up and ask the demo model about two pictures, offline
	$(call ask,sample-1.png,What is in the picture?)
	$(call ask,sample-2.png,What does the text say?)

test: setup ## run the test suite (ARGS='-k name' selects)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

# An environment without MLX; the server of these tests runs in the other one.
.venv-clients/.installed: Makefile
	test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check pytest openai anthropic ollama langchain-openai
	@touch $@

test-clients: setup .venv-clients/.installed ## run the official client packages against a real server
	FASTVLM_PYTHON=$(BIN)/python .venv-clients/bin/python -m pytest -W default --confcutdir=tests/server/clients tests/server/clients $(ARGS)

fuzz: setup ## run N=5000 damaged inputs from SEED=0 on, or one CASE=class:seed; ends with a table
	$(BIN)/python -m tests.fuzz.driver --number $(or $(N),5000) --seed $(or $(SEED),0) $(if $(CASE),--case $(CASE)) $(ARGS)

stress: setup ## random calls from threads and processes, jobs killed at random moments, random schemas (SEED=0)
	$(BIN)/python -m tests.stress.sequences --number $(or $(N),300) --seed $(or $(SEED),0)
	$(BIN)/python -m tests.stress.kills --number 10 --seed $(or $(SEED),0)
	$(BIN)/python -m tests.stress.schemas --number 200 --seed $(or $(SEED),0)

stress-server: setup ## a server among good and bad clients and schemathesis for MINUTES=10 (SEED=0)
	$(BIN)/python -m tests.stress.serving --minutes $(or $(MINUTES),10) --seed $(or $(SEED),0) $(ARGS)

lint: setup ## check style and types: ruff, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: setup ## format the code and apply the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## time the first token of a 0.5B with random weights (ARGS='--resolution 512 --json FILE')
	$(BIN)/fastvlm bench --random-weights 0.5b $(or $(ARGS),--resolution 256 --resolution 512 --resolution 1024)

bench-peers: setup ## compare with mlx-vlm and transformers (makes their environments; 13 GB under ~/.cache)
	$(BIN)/python benchmarks/peers.py $(ARGS)

dist: setup ## build the sdist and the wheel into dist/
	$(PIP) build
	$(BIN)/python -m build

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 14
