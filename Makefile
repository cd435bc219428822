# One entry for everything. `make demo` and `make test` set up what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TYPES := build/types/shoal
PACKAGES := protocol crdt dht node
SHOAL := $(BIN)/shoal
JOBS ?= $(shell nproc 2>/dev/null || echo 1)
# Swarms of processes at a time: they mostly wait, but each wants a core now and then.
SWARMS ?= $(if $(filter 1,$(JOBS)),1,2)

.PHONY: demo test lint check sim sim-long chaos natlab interop fuzz setup bench clean

demo: setup  ## the main job: a local swarm that trains, loses a peer and gains one (REPORT=file, TEXT=path)
	$(SHOAL) demo $(if $(TEXT),--text $(TEXT)) $(if $(REPORT),--report $(REPORT))

test: setup  ## unit, property, simulation and end-to-end tests; LONG=1: also those that take a minute each
	$(BIN)/python -m pytest -n $(JOBS) --durations=15 $(if $(LONG),,-m "not long") tests/unit tests/properties tests/sim
	$(BIN)/python -m pytest -n $(SWARMS) --durations=15 -m "not alone$(if $(LONG),, and not long)" tests/e2e
	$(BIN)/python -m pytest -m "alone$(if $(LONG),, and not long)" tests/e2e

lint: setup  ## ruff, mypy --strict, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=build/types $(BIN)/lint-imports  # import-linter wants the root of the packages to be a namespace; there it is

check:  ## what CI runs
	.ci/run

sim: setup  ## simulate rounds under faults: ROUNDS=n (5000), SECONDS=n, FIRST=n; SEED=n replays one, FAULTS=3,7 with these, TRACE=1
	$(BIN)/python -m tests.sim.world --jobs $(JOBS) $(if $(SEED),--seed $(SEED) $(if $(FAULTS),--faults $(FAULTS)) \
	  $(if $(TRACE),--trace),--rounds $(or $(ROUNDS),5000) $(if $(FIRST),--first-seed $(FIRST)) $(if $(SECONDS),--seconds $(SECONDS)) \
	  $(if $(JSON),--json $(JSON)))

sim-long: setup  ## a night's run: 1,000,000 rounds on all cores, summed up in build/sim-long.json; goes on where it was stopped
	@mkdir -p build
	$(BIN)/python -m tests.sim.world --jobs $(JOBS) --rounds 1000000 --keep-going --resume build/sim-long.place \
	  --json build/sim-long.json

chaos: setup  ## kill, stop and cut real daemons and check what must hold: SECONDS=n (default 120), SEED=n, PEERS=n (8)
	$(BIN)/python -m benchmarks.chaos --seconds $(or $(SECONDS),120) --peers $(or $(PEERS),8) \
	  $(if $(SEED),--seed $(SEED)) $(if $(JSON),--json $(JSON))

natlab: setup  ## real daemons behind routers of each kind; needs iproute2, nftables, root or user namespaces: SHORT=1
	@sh .ci/natlab-needs
	$(BIN)/python -m tests.natlab.needs $(BIN)/python -m pytest $(if $(SHORT),-m "not long") tests/natlab

interop: setup  ## js-libp2p and rust-libp2p against our node; needs Node.js 20 or newer, npm and the registries
	@sh .ci/interop-needs $(BIN)/python
	$(BIN)/python -m pytest tests/interop

fuzz: setup  ## mutated inputs for every parser of bytes from outside: COUNT=n (1,000,000 each), SEED=n, PARSER=name, FROM=n
	$(BIN)/python -m tests.properties.fuzz --count $(or $(COUNT),1000000) $(if $(SEED),--seed $(SEED)) \
	  $(if $(PARSER),--parser $(PARSER)) $(if $(FROM),--from $(FROM))

bench: setup  ## what this machine can do; benchmarks/RESULTS.md names the command of every figure there
	$(SHOAL) bench allreduce
	$(SHOAL) bench codecs
	$(SHOAL) bench links
	$(SHOAL) bench disk

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
