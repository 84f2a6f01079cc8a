# Everything runs from .venv, which the first target makes: `make demo` in a fresh clone needs Python 3.11 and no more.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Where the demo works.
DIR ?= demo
# Of the model that benchmarks work on.
LAYERS ?= 8
# The small base and pairs of claims.py; without them those that `orpo demo` makes.
STUDY = $(if $(and $(SMALL),$(PAIRS)),--model $(SMALL) --data $(PAIRS))
BENCH = --data $(DATA) --tokenizer $(TOKENIZER) --layers $(LAYERS)
PEERS := $(strip $(if $(TRL),--trl $(TRL)) $(if $(LLAMAFACTORY),--llamafactory $(LLAMAFACTORY)))
BIN := .venv/bin
INSTALLED := .venv/.installed
# A test works in one thread: one process for each core, a core that is done takes over half of what another has left.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test faults fuzz lint check bench

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)  ## Tiny base, pairs, ORPO, answers before and after (DIR=demo), some two minutes
	$(BIN)/orpo demo $(DIR) --overwrite

test: $(INSTALLED)  ## All tests, the fault suite in its short form
	$(PYTEST)

faults: $(INSTALLED)  ## Runs killed, stopped, damaged and out of disk at every turn, then resumed: 1,500 runs
	$(PYTEST) tests/faults -m faults -v

fuzz: $(INSTALLED)  ## Recipes and rows of all kinds, 10,000 inputs of each, some half an hour
	ORPO_FUZZ_EXAMPLES=10000 $(PYTEST) tests/test_fuzz.py

lint: $(INSTALLED)  ## Format, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

check: lint test  ## lint and test: what has to pass

bench: $(INSTALLED)  ## Benchmarks; speed as well with DATA=hh-rlhf.jsonl TOKENIZER=dir, against TRL=python LLAMAFACTORY=python
	$(BIN)/python benchmarks/claims.py $(STUDY) $(if $(TRL),--trl $(TRL))
	$(BIN)/python benchmarks/wrong_losses.py $(STUDY)
ifdef DATA
	$(BIN)/python benchmarks/speed.py $(BENCH) $(PEERS) --sweep
	$(BIN)/python benchmarks/data_path.py --data $(DATA) --tokenizer $(TOKENIZER)
ifneq ($(PEERS),)
	$(BIN)/python benchmarks/first_loss.py $(BENCH) $(PEERS)
endif
ifdef TRL
	$(BIN)/python benchmarks/evaluation.py $(BENCH) --trl $(TRL)
	$(BIN)/python benchmarks/shapes.py $(BENCH) --trl $(TRL)
	$(BIN)/python benchmarks/stages.py $(BENCH) --trl $(TRL)
endif
endif
