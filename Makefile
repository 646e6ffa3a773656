# `make run` serves the built-in model on two ranks; `make test` runs the checks. `make help` lists the rest.

PYTHON ?= python3
DEVICE ?= auto
PORT ?= 8000
DP ?= $(shell $(BIN)/python -c "from dplaunch.inventory import local_node as n; print(min(2, len(n().devices)) or 2)")
BACKEND ?=
VERSION ?= 0.33.0
ARGS ?=

BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --reruns 1 --rerun-show-tracebacks
STAMP := .venv/.dplaunch-env

.DEFAULT_GOAL := help
.PHONY: help env run test test-long test-gpu test-without-ray seam soak lint types bench-launch bench-serve bench-memory bench-dispatch bench-recover bench-scale bench-batch bench-weights compare-lm-eval clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 24

env: $(STAMP) ## the virtual environment .venv (PYTHON=python3.12, DEVICE=cpu|cuda)
	@:

$(STAMP): setup.cfg scripts/make_env.py
	@$(PYTHON) scripts/make_env.py --device $(DEVICE)

# Two ranks, or one where there is one GPU; asked for when the recipe runs, which is after `env`.
run: env ## ranks of the built-in model on 127.0.0.1:8000 (DP=8, PORT=8080, ARGS="--max-model-len 2048")
	@$(BIN)/dplaunch --backend mp --dp $(DP) --port $(PORT) $(ARGS)

test: lint types ## lint, types and the tests that take less than 20 minutes on two cores (ARGS="-k zygote -x")
	@$(PYTEST) -m "not long" $(ARGS)

test-long: env ## the other tests: whole programs, several nodes, every fault of the table
	@$(PYTEST) -m long $(ARGS)

test-gpu: env ## the tests that need an NVIDIA device; without one they are skipped
	@$(BIN)/python -m pytest tests/gpu $(ARGS)

test-without-ray: env ## what may miss it, with Ray uninstalled (`make env` brings it back)
	@$(BIN)/python -m pip uninstall --quiet --yes ray
	@rm -f $(STAMP)
	@$(PYTEST) -m "not real" tests/unit tests/contract/test_group.py $(ARGS)

seam: env ## what dplaunch needs of a vLLM version, checked in its sources (VERSION=0.33.0)
	@$(BIN)/python -m tests.seam $(VERSION) $(ARGS)

soak: env ## ten minutes of harm under load on mp and on ray, then real engines (ARGS="--seed 7 --minutes 2")
	@$(BIN)/python -m tests.chaos.soak --backend mp $(ARGS)
	@$(BIN)/python -m tests.chaos.soak --backend ray $(ARGS)
	@$(BIN)/python -m tests.chaos.soak --real --minutes 3 $(ARGS)
	@$(BIN)/python -m tests.chaos.crowd
	@$(BIN)/python -m tests.chaos.launches

lint: env ## ruff's linter and formatter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: env ## mypy, strict
	@$(BIN)/mypy

bench-launch: env ## process start to first answer, beside stock vLLM (BACKEND=ray, ARGS="--quick")
	@$(BIN)/python -m benchmarks.bench_launch $(if $(BACKEND),--backend $(BACKEND)) $(ARGS)

bench-serve: env ## tokens per second over HTTP and in process, beside stock vLLM
	@$(BIN)/python -m benchmarks.bench_serve $(ARGS)

bench-memory: env ## memory that is not a rank's own, beside stock vLLM
	@$(BIN)/python -m benchmarks.bench_memory $(ARGS)

bench-dispatch: env ## what a request costs with Ray over what it costs without (ARGS="--quick")
	@$(BIN)/python -m benchmarks.bench_dispatch $(ARGS)

bench-recover: env ## a rank is killed under load, beside stock vLLM (ARGS="--quick")
	@$(BIN)/python -m benchmarks.bench_recover $(ARGS)

bench-scale: env ## 1 to 256 ranks on this machine, with stand-in engines (ARGS="--quick")
	@$(BIN)/python -m benchmarks.bench_scale $(ARGS)

bench-batch: env ## a batch of skewed answer lengths: our dispatch over equal chunks (ARGS="--quick")
	@$(BIN)/python -m benchmarks.bench_batch $(ARGS)

compare-lm-eval: env ## lm-evaluation-harness over hf, stock vLLM and groups of ranks: the same scores (ARGS='--only hf')
	@$(BIN)/python -m benchmarks.compare_lm_eval $(ARGS)

bench-weights: env ## new weights in 1 to 8 ranks, from memory and from disk (ARGS="--quick")
	@$(BIN)/python -m benchmarks.bench_weights $(ARGS)

clean: ## removes everything that make made, .venv too
	rm -rf .venv build dist dplaunch.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
