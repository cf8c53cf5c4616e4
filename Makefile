# make demo    installs, trains a small mixture of experts on real text, shows it generate
# make test    installs and runs everything that CI runs: lint, types, tests, and the guard against slower code
# make bench   times every operation and path on a CPU beside its peers, in ten minutes, and writes docs/benchmarks.md
# make chaos   kills runs and nodes, damages checkpoints and lets disks fail, at length: docs/reliability.md and elastic.md
# make bench-gpu [BUDGET=minutes]   checks and times every kernel on an NVIDIA GPU; installs nothing

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# One thread per rank: two ranks share the cores of a small machine.
export OMP_NUM_THREADS ?= 1

BUDGET ?= 8

.PHONY: demo test bench chaos bench-gpu format clean

demo: $(VENV)/.installed
	@ranks=$$($(BIN)/python -c 'import torch; print(1 if torch.cuda.is_available() else 2)') && \
	$(BIN)/torchrun --nproc_per_node=$$ranks -m ava_fast.train --config configs/demo.yaml --resume latest

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m bench.guard cpu instructions

bench: $(VENV)/.installed-test
	$(PIP) --no-build-isolation -e ".[bench]"
	$(BIN)/python -m bench.cpu
	$(BIN)/python -m bench.report

chaos: $(VENV)/.installed-test
	$(BIN)/python -m bench.chaos
	$(BIN)/python -m bench.chaos_elastic

# Air-gapped: with the Python that is there, and this code where it lies.
bench-gpu:
	@python=$(PYTHON); [ ! -x $(BIN)/python ] || python=$(BIN)/python; \
	PYTHONPATH="$(CURDIR):$(CURDIR)/kernels" $$python -m bench.gpu --budget $(BUDGET)

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info kernels/ava_kernels/gradients/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "ava-fast needs Python 3.10 or newer; this is " + sys.version.split()[0] + ": make PYTHON=python3.12 demo")'
	@echo "installing into $(VENV): about a minute, once"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel
	$(PIP) torch
	@touch $@

# What the extension is built from; where there is no compiler, the installation goes on without it.
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)

# Without build isolation, DeepSpeed's build and ours find the torch above instead of fetching one of their own.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation -e ".[test]"
	@touch $@ $(VENV)/.installed
