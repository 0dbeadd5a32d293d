# make env    the environment in .venv, pinned by constraints.txt
# make test   the test suite
# make demo   fine-tune a small model with ADePT on two ZeRO-3 ranks and grade what it writes
# make lint   ruff, mypy and shellcheck
# make clean  remove the environment, the demo's model and its run
#
# PYTHON       interpreter that .venv is made from (3.11 or newer)
# TORCH_INDEX  further package index for torch; name PyTorch's CPU index here to avoid the CUDA build (several GB)
# PYTEST_ARGS  further arguments for pytest, for example PYTEST_ARGS="-n 0 -m 'not slow'"; by default two tests run at once

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help env test demo lint clean

PYTHON ?= $(shell command -v python3.11 || command -v python3 || command -v python)
TORCH_INDEX ?=
PYTEST_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
MODEL := models/smollm2-135m-instruct
CONFIG := ds_configs/smollm2_135m_demo.json
RUN := runs/demo
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

# Two workers, each with whole files, as these share what is slow to set up; in the order of the files, long ones first.
test: env
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	for script in $(SCRIPTS); do bash -n "$$script"; done
	$(BIN)/shellcheck --external-sources $(SCRIPTS)

# Decoding is in fp32: on a CPU it is faster than in bf16, and the adapter is fp32 anyway.
demo: env
	$(BIN)/python -m adept_ds.tools.demo_model $(MODEL)
	DS_ACCELERATOR=cpu $(BIN)/deepspeed --num_gpus 2 launchers/train.py --config $(CONFIG) --resume auto
	DS_ACCELERATOR=cpu $(BIN)/deepspeed --num_gpus 2 evals/mbpp.py --config $(CONFIG) --model.dtype fp32 --out $(RUN)/eval/base
	DS_ACCELERATOR=cpu $(BIN)/deepspeed --num_gpus 2 evals/mbpp.py --config $(CONFIG) --model.dtype fp32 --adapter $(RUN)/best --out $(RUN)/eval/adept
	$(BIN)/python evals/report.py $(RUN)

clean:
	rm -rf .venv $(MODEL) $(RUN)
