# Every target sets up what it needs and does nothing twice. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The first of these that starts: 3.11 is the version that everything is tested on.
PYTHON ?= $(or $(shell for p in python3.11 python3.12 python3.13; do $$p -c '' 2>/dev/null && echo $$p && break; done),python3)
TORCH ?= 2.13.0
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp

PROFILE ?= quick
DATASET ?=
DATA_DIR ?=
ARGS ?=
# Chapters at a time, each with its share of the cores.
JOBS ?= 2
# Downloaded weights and finished units; shared by study, test and bench.
export LLMREC_CACHE ?= $(CURDIR)/.cache
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Only the full run with nothing changed may replace the published notebooks and tables.
ifeq ($(PROFILE)$(DATASET)$(DATA_DIR)$(findstring -p,$(ARGS)),full)
EXECUTED := book/executed
RESULTS := results
else
STUDY := _build/study/$(PROFILE)$(if $(DATASET),-$(DATASET))
EXECUTED := $(STUDY)/executed
RESULTS := $(STUDY)/results
endif

.PHONY: help setup study book test compare agree stale bench soak lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile
	@echo
	@echo 'variables: PROFILE=quick|full  DATASET=NAME DATA_DIR=DIR (your own data)  ARGS=... (passed to llmrec run or pytest)'
	@echo '           JOBS=2 (chapters at a time)  PYTHON=python3.11  VENV=.venv  TORCH=$(TORCH)  LLMREC_CACHE=.cache'

setup: $(STAMP) ## make the virtual environment from requirements.lock

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "Python 3.11, 3.12 or 3.13 is needed, but $(PYTHON) is %d.%d. Name another one: make PYTHON=/path/to/python3.11 ..." % v)'
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "torch==$(TORCH)"
	$(PY) -m pip install -q --no-deps -r requirements.lock
	$(PY) -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

study: $(STAMP) ## run every chapter at PROFILE's scale and build that book into _build/html
	$(VENV)/bin/llmrec run -j $(JOBS) --profile "$(PROFILE)" --results "$(RESULTS)" --executed "$(EXECUTED)" \
		$(if $(DATASET),-p dataset "$(DATASET)") $(if $(DATA_DIR),-p data_dir "$(DATA_DIR)") $(ARGS)
	@# Chapter 11 reads what the others wrote, so it is always made anew.
	$(VENV)/bin/llmrec run 11 --force --profile "$(PROFILE)" --results "$(RESULTS)" --executed "$(EXECUTED)" \
		$(if $(DATASET),-p dataset "$(DATASET)") $(if $(DATA_DIR),-p data_dir "$(DATA_DIR)") $(if $(filter -p,$(firstword $(ARGS))),$(ARGS))
	$(PY) book/build_book.py --executed "$(EXECUTED)"

book: $(STAMP) ## build the published book from book/executed into _build/html, running nothing
	$(PY) book/build_book.py

# Two at a time, each on one core: most of the time goes into notebooks, and those are in files of their own.
test: $(STAMP) ## run all tests
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -q --durations=10 -n 2 --dist loadfile $(ARGS)

compare: $(STAMP) ## compute every published comparison again from results/*/*/per_user.parquet alone
	$(PY) book/comparisons.py $(ARGS)

agree: $(STAMP) ## compare the published results with another run's: ARGS="results DIR", where DIR holds DATASET/CHAPTER
	$(PY) book/two_runs.py $(ARGS)

stale: $(STAMP) ## name the published chapters whose sources have changed since, and what changed
	$(PY) book/stale.py $(ARGS)

bench: $(STAMP) ## measure every performance claim beside its peer into benchmarks/results.json
	$(PY) -m benchmarks $(ARGS)

soak: $(STAMP) ## kill a small study at over 100 random moments (up to 15 minutes) and compare what comes out; into benchmarks/soak.json
	$(PY) -m benchmarks.soak $(ARGS)

lint: $(STAMP) ## check style, in notebooks too
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean: ## delete what was built; the environment and the cache stay (.venv, .cache)
	rm -rf _build build .pytest_cache .ruff_cache log log_tensorboard saved
