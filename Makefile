# make install   patchmine in .venv, ready to use (.venv/bin/patchmine); with TORCH=cpu TORCH_INDEX=... without CUDA's libraries
# make demo      pre-train HPM on photographs for 10 epochs, evaluate, write a report; BUDGET=1h trains for that long
# make check     ruff, mypy --strict, documentation, its links and its notebook
# make test      the test suite; `make test-all` adds the slow tests, `make test-bits` repeats those that ask for equal bits
#                with the vectors of older processors, `make test-wheel` builds the wheel and uses it outside of the clone
# make losses    twenty steps of every method's small recipe, equal bit for bit to those of another commit: BASE=main
# make faults    damaged files, kills, crashes, full disks: tried, survived, faults (MUTANTS=10000 KILLS=100 SEED=0)
#
# Each makes or updates .venv by itself.  Another interpreter: make PYTHON=python3.12 install

PYTHON ?= python3
DEMO ?= runs/demo
BUDGET :=
BASE ?= main
VENV := .venv
BIN := $(VENV)/bin
USER_READY := $(VENV)/.ready-user
DEV_READY := $(VENV)/.ready-dev
# Some processes side by side; the tests of one file stay together, since they share what they train.
PYTEST := $(BIN)/python -m pytest --quiet -n auto --maxprocesses 4 --dist loadfile
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
# PyTorch and torchvision come from one place, since neither works with another's; all else is found as always.
TORCH :=
TORCH_INDEX :=
INSTALL_TORCH = $(INSTALL) --no-deps --index-url '$(TORCH_INDEX)' torch torchvision

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install install-dev demo test test-all test-bits test-wheel losses faults check check-code check-docs format clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "patchmine needs Python 3.11 or newer; '$(PYTHON)' is older or missing. Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu, install python3-venv." >&2; exit 1; }

# A choice of PyTorch that cannot be is told before anything is made.
ifneq ($(TORCH)$(TORCH_INDEX),)
ifneq ($(TORCH),cpu)
$(error $(if $(TORCH),TORCH=$(TORCH) is not known: give TORCH=cpu or leave it out,TORCH_INDEX=$(TORCH_INDEX) is read with TORCH=cpu alone))
else ifeq ($(TORCH_INDEX),)
$(error TORCH=cpu needs TORCH_INDEX=ADDRESS too: the one behind --index-url in the command that PyTorch's 'Get started' page shows for pip and CPU)
else ifneq ($(wildcard $(USER_READY)),)
$(info $(VENV) keeps the PyTorch that it has: to exchange it, `make clean` first.)
endif
endif

$(USER_READY): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing patchmine into $(VENV). $(if $(TORCH),Without CUDA's libraries this fetches some hundreds of MB.,On Linux PyTorch brings" \
		"CUDA's libraries: about 3 GB are fetched and 6 GB stored. Without a GPU of NVIDIA's make install TORCH=cpu needs much less.)"
	@$(if $(TORCH),$(INSTALL_TORCH))
	@$(INSTALL) --editable '.[demo]'
	@touch $@

$(DEV_READY): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing patchmine and its development tools into $(VENV); the first time this takes a few minutes."
	@$(if $(TORCH),$(INSTALL_TORCH) --quiet)
	@$(INSTALL) --quiet --editable '.[dev,demo,export,video,seg,det]'
	@touch $@ $(USER_READY)

install: $(USER_READY)
	@echo "Ready. Try: $(BIN)/patchmine --help"

install-dev: $(DEV_READY)

# Threads that spin while they wait for each other make a step twice as long where other programs take the cores too, and
# tests of two threads in as many processes as there are cores five times.
test test-all test-bits: export GOMP_SPINCOUNT ?= 0

# Run again after an interruption, it goes on where it stopped; DEMO=runs/other makes a fresh one.
demo: export GOMP_SPINCOUNT ?= 3000
demo: $(USER_READY)
	@if [ -e $(DEMO)/config.yaml ]; then $(BIN)/patchmine resume $(DEMO); \
	else $(BIN)/patchmine pretrain photos-demo out=$(DEMO) $(if $(BUDGET),budget=$(BUDGET)); fi
	@$(BIN)/patchmine eval knn $(DEMO) data=embedded:photos/train test=embedded:photos/test pooling=mean baselines=true
	@$(BIN)/patchmine report $(DEMO) out=$(DEMO)/report.html
	@echo "Pictures, curves and the verdict in full are in $(DEMO)/report.html: open it in a browser."

test: $(DEV_READY)
	@$(PYTEST)

test-all: $(DEV_READY)
	@$(PYTEST) -m "slow or not slow" --timeout 3600

# The whole-run tests among them too: sums run in another order there, and what must be equal is equal all the same.
test-bits: $(DEV_READY)
	@ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) -m bitwise --timeout 900
	@ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=2 $(PYTEST) -m bitwise --timeout 900

test-wheel: $(DEV_READY)
	@$(BIN)/python -m pytest --quiet -m slow tests/test_wheel.py

losses: $(DEV_READY)
	@$(BIN)/python tests/losses/compare.py $(BASE)

# Sizes come from the environment or the command line, as in make faults MUTANTS=500 KILLS=5 ONLY=mutants,kills
faults: $(DEV_READY)
	@$(BIN)/python tests/faults

check: check-code check-docs

check-code: $(DEV_READY)
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/mypy

check-docs: $(DEV_READY)
	@$(BIN)/mkdocs build --strict --site-dir $(VENV)/site
	@$(BIN)/python -m pytest --quiet -m "slow or not slow" tests/test_docs.py tests/test_docs_notebook.py

format: $(DEV_READY)
	@$(BIN)/ruff format
	@$(BIN)/ruff check --fix

clean:
	rm -rf $(VENV) build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
