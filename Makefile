# One entry for everything. `make demo` and `make test` set up what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TYPES := build/types/shoal
PACKAGES := protocol crdt dht node
SHOAL := $(BIN)/shoal

.PHONY: demo test lint check sim sim-long setup bench clean

demo: setup  ## the main job: a local swarm that trains, loses a peer and gains one (REPORT=file, TEXT=path)
	$(SHOAL) demo $(if $(TEXT),--text $(TEXT)) $(if $(REPORT),--report $(REPORT))

test: setup  ## unit, property, simulation and end-to-end tests
	$(BIN)/python -m pytest tests/unit tests/properties tests/sim tests/e2e

lint: setup  ## ruff, mypy --strict, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test sim  ## what CI runs

sim: setup  ## simulate rounds under faults: SEED=n replays one, ROUNDS=n sets how many (default 5000)
	$(BIN)/python -m tests.sim.world $(if $(SEED),--seed $(SEED),--rounds $(or $(ROUNDS),5000))

sim-long: setup
	$(BIN)/python -m tests.sim.world --rounds 1000000

bench: setup  ## the figures in benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks.daemon

setup: $(STAMP)

$(STAMP): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "shoal needs Python 3.11 or newer; this is $$($(PYTHON) --version). Fix: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@sh .ci/native-needs
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c .ci/constraints.txt -e '.[train,plot,dev]'
	@mkdir -p $(TYPES) && for one in $(PACKAGES); do ln -sfn ../../../$$one $(TYPES)/$$one; done
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist demo-run *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
