# Each target sets up what it needs: `.venv` holds a stamp per installation, renewed when pyproject.toml or constraints.txt changes.
#   PYTHON    the interpreter that makes .venv (3.11 or newer)
#   PIP_ARGS  further arguments of pip install, such as another package index (README: CPU builds of PyTorch)
#   ARGS      passed on: make demo ARGS="--seeds 5", make test ARGS="-k layers"
PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
export PYTHON PIP_ARGS

.NOTPARALLEL:
.PHONY: help setup demo test check docs clean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile

setup: .venv/.dev ## make .venv with the development install

demo: .venv/.demo ## fetch the demo's model and data, distil three students, write the report
	@.venv/bin/limbeck assets fetch demo
	@.venv/bin/limbeck demo $(ARGS)

test: .venv/.dev ## the checks and the test suite
	@scripts/test $(ARGS)

check: .venv/.dev ## format, lint, types and layers only
	@scripts/check

docs: .venv/.docs ## the documentation, as HTML in build/docs
	@scripts/docs

clean: ## remove .venv, caches and build products; runs and fetched models stay
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.demo .venv/.dev .venv/.docs: .venv/.%: pyproject.toml constraints.txt
	@scripts/setup $*
