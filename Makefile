# `make` lists the targets.  pip takes its index from the usual settings (PIP_INDEX_URL, pip.conf).

# An environment keeps its Python: where .venv has another than PYTHON=python3.11 names, that is .venv-3.11.
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for python in python3.12 python3.11 python3; do $$python -c '' 2>/dev/null && echo $$python && break; done)
VENV ?= .venv
else
ASKED := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
FOUND := $(shell sed -n 's/^version = \([0-9]*\.[0-9]*\).*/\1/p' .venv/pyvenv.cfg 2>/dev/null)
VENV ?= $(if $(filter $(ASKED),$(or $(FOUND),$(ASKED))),.venv,.venv-$(ASKED))
endif
# TORCH_INDEX=URL installs torch from another index, for example PyTorch's index of small CPU builds.
VERSIONS := opo_megatron/environment/versions.toml
TORCH := torch==$(shell sed -n '/^\[packages.torch\]/,/^version/s/^version = "\(.*\)"/\1/p' $(VERSIONS))
PIP := $(VENV)/bin/python -m pip --quiet --disable-pip-version-check
SAY_VERSIONS = $(VENV)/bin/python -c 'import sys; from importlib.metadata import version; \
  print("Python", sys.version.split()[0] + ", megatron-core", version("megatron-core"))'

SGLANG_VENV ?= .venv-sglang
# SGLANG=cuda creates SGLang's environment for GPUs.
SGLANG ?= cpu
DOCS_VENV ?= .venv-docs

SYSTEM_PROGRAMS := sbatch srun scontrol slurmctld slurmd munged chromium

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev setup-sglang setup-system quickstart test test-slow lint docs

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

setup: $(VENV)/.setup  ## .venv for training

setup-dev: $(VENV)/.setup-dev  ## the same, plus tests and lint

setup-sglang: $(SGLANG_VENV)/.setup-$(SGLANG)  ## .venv-sglang with an SGLang server, for rollout.engine=sglang

setup-system:  ## for tests: SLURM on one node, Chromium for opo report's page (as root, on Debian or Ubuntu)
	@if which $(SYSTEM_PROGRAMS) >/dev/null; then echo "SLURM and Chromium are installed"; exit; fi; \
	set -ex; export DEBIAN_FRONTEND=noninteractive; \
	apt-get update; \
	apt-get install --yes --no-install-recommends slurm-wlm munge; \
	apt-get install --yes --no-install-recommends chromium || \
	  echo "no Chromium was installed (Ubuntu has it as a snap): the tests that open a page will be skipped" >&2

quickstart: setup  ## train the small recipe in a new folder under runs/
	@dir=runs/quickstart; n=2; \
	while [ -e "$$dir" ]; do dir="runs/quickstart-$$n"; n=$$((n + 1)); done; \
	$(VENV)/bin/opo train recipes/quickstart.yaml run.dir="$$dir"

# In order of their folders: files with few tests have the longest, and would come last.
test: setup-dev setup-sglang  ## fast tests (seconds each)
	@$(SAY_VERSIONS)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations=12

test-slow: setup-dev setup-sglang  ## slow tests (minutes each)
	@$(SAY_VERSIONS)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m slow

lint: setup-dev  ## style, formatting and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: setup $(DOCS_VENV)/.setup  ## the documentation as a web site in site/; a broken link is an error
	$(VENV)/bin/python tools/make_reference.py
	$(VENV)/bin/python tools/make_objectives.py
	$(DOCS_VENV)/bin/mkdocs build --strict

# Stamps are written last, so that an interrupted installation is repeated.
$(VENV)/.setup: setup.py $(VERSIONS)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
	  { echo "Python 3.11 or 3.12 is needed; name one with: make setup PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PIP) install --index-url $(TORCH_INDEX) $(TORCH))
	$(PIP) install -e .
	@touch $@

$(VENV)/.setup-dev: $(VENV)/.setup
	$(PIP) install -e '.[dev]'
	@touch $@

$(SGLANG_VENV)/.setup-%: requirements/sglang-%.txt $(VERSIONS)
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/python -m pip --quiet --disable-pip-version-check install \
	  $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(SGLANG_VENV)/bin/python -m pip --quiet --disable-pip-version-check install \
	  --no-deps -r $<
	@touch $@

$(DOCS_VENV)/.setup: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip --quiet --disable-pip-version-check install --no-deps -r $<
	@touch $@
