# The commands of the project; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements-$(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu).lock
TORCH := 2.13.0
HAS_HEADERS := import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())
UV := 0.13.9

.DEFAULT_GOAL := help
.PHONY: help install images demo real test test-gpu test-cluster test-kfp cluster-up cluster-down nightly check chart-render chart-docs chaos fuzz bench-store bench-search bench-training format lock golden clean

help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## Create the environment in .venv from the lock

$(VENV)/.installed: $(LOCK) requirements-reasoning.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "Tessera needs Python 3.11 to 3.13; choose one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check uv==$(UV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==$(TORCH)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --require-hashes --compile-bytecode \
	  -r $(LOCK)
	@if command -v cc >/dev/null 2>&1 && $(BIN)/python -c '$(HAS_HEADERS)'; then \
	  $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --require-hashes -r requirements-reasoning.lock; \
	else echo "data.reasoning_gym is left out: it takes a C compiler and Python's headers (apt-get install gcc python3-dev)"; fi
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

images: install ## Build the images as root, without a container engine: make images [DEVICE=cpu|gpu] [OUT=build/images]
	PYTHONPATH=. $(BIN)/python -m infra.images build $(or $(OUT),build/images) --torch $(TORCH) \
	  --device $(or $(DEVICE),$(LOCK:requirements-%.lock=%))

demo: install ## Run the whole recipe on this machine: from nothing to a served reasoning model
	$(BIN)/tessera run pipelines/recipes/demo.yaml

real: install ## Take a real model through a recipe of `tessera init` and measure it, an hour: make real OUT=file [QUICK=1]
	PYTHONPATH=. $(BIN)/python -m tests.bench.real $(or $(OUT),real.json) $(if $(QUICK),--quick)

# Many tests start processes: each would compile our code anew where the environment forbids to keep it.
test: check ## Format, lint, types, import contracts, all tests
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: install ## The quick half of the tests: format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-gpu: install ## The tests that need an NVIDIA GPU: one step of every computing stage
	$(BIN)/python -m pytest -m gpu

chart-render: install ## Print what an install of the Helm chart would apply: make chart-render [VALUES=file]
	@$(BIN)/python -m infra.chart render $(if $(VALUES),--values $(VALUES))

chart-docs: install ## Renew the page of the Helm chart
	$(BIN)/python -m infra.chart_page

cluster-up: install ## Start a Kubernetes cluster on this machine, as root; builds its programs the first time
	PYTHONPATH=. $(BIN)/python -m infra.testcluster up

test-cluster: install ## The tests that need a cluster: the one of cluster-up, or the one that KUBECONFIG names
	$(if $(KUBECONFIG),,PYTHONPATH=. $(BIN)/python -m infra.testcluster exec) $(BIN)/python -m pytest -m cluster tests/cluster

test-kfp: install ## The tests on a Kubeflow Pipelines: TESSERA_STORE=s3://… make test-kfp KFP=http://… NAMESPACE=…
	TESSERA_KFP=$(KFP) TESSERA_NAMESPACE=$(NAMESPACE) $(BIN)/python -m pytest -m kfp tests/kfp

cluster-down: install ## Stop the cluster; its state stays for the next start: make cluster-down [WIPE=1]
	PYTHONPATH=. $(BIN)/python -m infra.testcluster down $(if $(WIPE),--wipe)

nightly: test ## All tests, those on a cluster whose programs are built anew, and chaos; as root, about two hours
	$(BIN)/python -m pytest -m real tests/bench
	@export TESSERA_TESTCLUSTER=$$(mktemp -d /tmp/tessera-cluster-XXXX); \
	  trap '$(MAKE) cluster-down WIPE=1; rm -rf "$$TESSERA_TESTCLUSTER"' EXIT; \
	  $(MAKE) cluster-up test-cluster chaos

chaos: install ## Kill runs at random and compare their ends: make chaos SECONDS=600 [SEED=1] [OUT=chaos.json]
	PYTHONPATH=. $(BIN)/python -m tests.chaos --seconds $(or $(SECONDS),600) $(if $(SEED),--seed $(SEED)) \
	  --report $(or $(OUT),chaos.json)

fuzz: install ## Fuzz whatever reads a stranger's bytes, where atheris is installed: make fuzz SECONDS=600
	PYTHONPATH=. $(BIN)/python -m tests.fuzz $(or $(SECONDS),120)

bench-store: install ## Measure transfers, cache hits, upkeep: make bench-store OUT=file [STORE=folder of a demo run]
	PYTHONPATH=. $(BIN)/python -m tests.bench.store --out $(or $(OUT),bench-store.json) --store $(or $(STORE),.tessera)

format: install ## Bring the code into form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: ## Renew the lock files
	$(BIN)/python infra/lock.py

golden: install ## Renew what is generated and kept: recipe schema, compiled pipeline, stage pages, dashboards, alerts
	TESSERA_GOLDEN=renew $(BIN)/python -m pytest -q -k golden

bench-search: install ## Measure the search's solver beside Puzzletron's; OUT=FILE takes the rows
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python -m tests.bench.search $(or $(OUT),bench-search.json)

bench-training: install ## Measure the training loop beside transformers.Trainer: make bench-training OUT=file
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python -m tests.bench.training $(or $(OUT),bench-training.json)

clean: ## Remove the environment and caches, never a store
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
