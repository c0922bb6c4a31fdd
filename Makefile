# SEED, QUICK, OUT, GPU and PYTHON may be given as environment variables or after the target: make demo SEED=1
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check format clean

export SEED ?= 0
PY := .venv/bin/python

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## make .venv from the locked lists (GPU=1: the NVIDIA list)
	@bash scripts/setup.sh

demo: setup ## SFT, one RL teacher per domain and MOPD on a tiny model (QUICK=1: shorter; SEED=0; OUT=folder)
	@$(PY) -m examples.tiny.demo

test: setup ## all tests that need no GPU and are not slow
	@$(PY) -m pytest tests/unit -m "not gpu and not slow" -q -n auto
	@$(PY) -m pytest tests/integration -m "not gpu and not slow" -q --durations=20

test-slow: setup ## the slow tests
	@$(PY) -m pytest -m "slow and not gpu" -q

check: setup ## formatting, lint, types, unit tests
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy
	@$(PY) -m pytest tests/unit -m "not gpu and not slow" -q -x -n auto

format: setup ## format and apply the lint fixes
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

clean: ## remove caches and build outputs (keeps .venv and runs/)
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
