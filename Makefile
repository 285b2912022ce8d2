.DEFAULT_GOAL := help
export OMP_NUM_THREADS ?= 1

.PHONY: help check lint types test format

help: ## Print this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

check: lint types test ## All that must pass before a commit: lint, types, test

lint: ## Style, docstrings, annotations and complexity
	python -m ruff check .
	python -m ruff format --check .

types: ## mypy, strict
	python -m mypy

test: ## The tests, two at a time, offline
	python -m pytest -n 2

format: ## Let ruff format and mend what it can
	python -m ruff check --fix .
	python -m ruff format .
