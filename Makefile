# Palimpsest: `make help` lists what there is.
SHELL := /bin/bash
.DEFAULT_GOAL := help

HOST   ?= 127.0.0.1
PORT   ?= 8080
MODELS ?= auto
STORE  ?= model-store
PYTHON ?= python3

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/pip install --quiet --disable-pip-version-check --no-deps
NPM  := $(shell command -v npm)
PARALLEL := -n logical --maxprocesses 8
# Of servers that have no GPU to share, a few go beside each other; those of one module share one.
SERVERS := $(if $(shell nvidia-smi --list-gpus 2>/dev/null),,-n logical --maxprocesses 4 --dist loadfile)
export PALIMPSEST_HOST := $(HOST)
export PALIMPSEST_PORT := $(PORT)
export PALIMPSEST_MODELS := $(MODELS)
export PALIMPSEST_STORE := $(STORE)

.PHONY: help install serve cluster stop image up image-check test screenshots test-fast test-full test-sdk check format bench eval-demo archives lock sbom vendor clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20
	@echo "Variables: HOST=$(HOST) PORT=$(PORT) MODELS=$(MODELS) (auto|full|demo) STORE=$(STORE)"

install: $(VENV)/.serve ## set up what `make serve` needs, and no more

serve: $(VENV)/.serve ## set up what is missing, then serve in the foreground (Ctrl-C stops everything)
	@exec $(BIN)/palimpsest serve

cluster: $(VENV)/.cluster ## set up what `palimpsest cluster` needs beside it (70 MB): docs/scale.md

stop: ## stop the server that `make serve` started on PORT
	@test ! -x $(BIN)/palimpsest || $(BIN)/palimpsest stop

test: $(VENV)/.dev ## all tests, a real TorchServe included
	$(BIN)/python -m pytest -m "not full and not torchserve" $(PARALLEL)
	$(BIN)/python -m pytest -m "torchserve and not (alone or full)" $(SERVERS)
	$(BIN)/python -m pytest -m "torchserve and alone and not full"

image: ## the container's image, from this tree
	docker compose build palimpsest

up: ## the container in the background: the GPU where there is one, else the demo models
	docker compose up --detach --wait $(if $(shell nvidia-smi --list-gpus 2>/dev/null),palimpsest,cpu)

image-check: ## build the image and prove it, with Docker or else podman (ten minutes, 30 GB)
	deploy/image-check.sh

screenshots: $(VENV)/.dev ## the pictures of the editing page in docs/page, anew (needs a Chromium)
	SCREENSHOTS=yes $(BIN)/python -m pytest tests/test_page_browser.py -k screenshots

test-fast: $(VENV)/.dev ## what needs no TorchServe and no patience: two minutes on two cores
	$(BIN)/python -m pytest -m "not full and not torchserve and not slow" $(PARALLEL)

test-sdk: $(VENV)/.dev .venv-sagemaker/.ready ## the SageMaker SDK against a real server, in an environment of its own (300 MB)
	$(BIN)/python -m pytest tests/test_sdks.py

bench: $(VENV)/.dev ## what the gateway adds, hit rate under pressure, 10,000 archives, cold starts, memory, codecs, HTTP clients
	$(BIN)/python -m bench.residency
	$(BIN)/python -m bench.many_archives
	$(BIN)/python -m bench.coldstart
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.codecs
	$(BIN)/python -m bench.http_clients

eval-demo: .venv-training/.ready ## how good the demo models are, from their shipped weights (400 MB of Debian packages, 15 minutes)
	training/fetch-data.sh
	.venv-training/bin/python -m training.eval_sam
	.venv-training/bin/python -m training.eval_lama
	.venv-training/bin/python -m training.eval_sd

test-full: $(VENV)/.dev ## full-size networks with random weights through TorchServe (minutes, ~20 GB of disk)
	$(BIN)/python -m pytest -m full -s --timeout=3600

check: $(VENV)/.dev deploy/web/node_modules/.ready ## format, lint, types, import rules, and that each test is found
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32 client/palimpsest
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --collect-only -qq # what the tests import is there
	$(if $(NPM),npm --prefix deploy/web run --silent check,@echo "No npm here: the page's types are not checked")

format: $(VENV)/.dev ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

archives: $(VENV)/.serve ## build the archives that MODELS names into STORE
	$(BIN)/palimpsest archives build

lock: $(VENV)/.dev ## resolve pyproject.toml anew into the lock files
	deploy/lock.sh $(BIN)

sbom: $(VENV)/.dev ## what it is made of: THIRD-PARTY.md, and sbom.cdx.json in CycloneDX's format
	$(BIN)/python deploy/sbom.py

vendor: deploy/web/node_modules/.ready ## copy the editing page's libraries anew, as deploy/web/package-lock.json names them
	npm --prefix deploy/web run --silent vendor

clean: ## remove the virtual environment and the caches; STORE stays
	rm -rf $(VENV) .venv-sagemaker .venv-training .palimpsest .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache deploy/web/node_modules *.egg-info client/*.egg-info client/build
	find . -name __pycache__ -not -path './model-store/*' -prune -exec rm -rf {} +

# pip shows its own progress; a stamp makes later starts skip it.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 serve"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: requirements.lock requirements-torch.lock pyproject.toml client/pyproject.toml | $(VENV)/bin/python
	@echo "Installing what requirements.lock names into $(VENV) (1 GB, with CUDA 6 GB; two minutes on a fast line)"
	deploy/install.sh $(BIN)
	$(PIP) --no-build-isolation --editable .
	$(PIP) --no-build-isolation --editable client # last: an earlier version's end takes the command along
	@touch $@

$(VENV)/.cluster: requirements-cluster.lock $(VENV)/.serve
	$(PIP) --require-hashes -r requirements-cluster.lock
	@touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.cluster
	$(PIP) --require-hashes -r requirements-dev.lock
	@touch $@

deploy/web/node_modules/.ready: deploy/web/package-lock.json
	$(if $(NPM),npm ci --prefix deploy/web --silent --no-audit --no-fund,mkdir -p $(@D))
	@touch $@

.venv-training/.ready: requirements.lock requirements-torch.lock training/requirements.txt
	$(PYTHON) -m venv .venv-training
	deploy/install.sh .venv-training/bin
	.venv-training/bin/pip install --quiet --disable-pip-version-check -r training/requirements.txt
	@touch $@

.venv-sagemaker/.ready: requirements-sagemaker.lock
	$(PYTHON) -m venv .venv-sagemaker
	.venv-sagemaker/bin/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-sagemaker.lock
	@touch $@
