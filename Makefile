# make demo   real adapters taken out of a real exported model and swapped; needs no torch and no compiler
# make kernels   the compiled kernels, as a wheel, into .venv; with CUDA=ON those for CUDA, too (needs nvcc)
# make test   lint, kernels and every test
# make lint | bench | clean
#
# Each installs exactly what it needs into .venv, pinned by constraints.txt, and only when the pins have changed.

.DEFAULT_GOAL := help
.PHONY: help demo kernels test lint bench clean
SHELL := /bin/bash
.DELETE_ON_ERROR:

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check --no-compile -c constraints.txt
# The tests run in two processes; a thread pool in each would only make them wait for one another.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
JOBS ?= 2
# Off, although CMake would look for nvcc by itself: the onnxruntime in .venv has no CUDA, and three architectures take time.
CUDA ?= OFF

# Any Python from 3.11 on, whatever it is called; `make PYTHON=/path/to/python` decides otherwise.
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.14 python
IS_NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p $(IS_NEW_ENOUGH) 2>/dev/null && command -v $$p && break; done)

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/.demo
	@$(PY) samples/demo.py

kernels: $(VENV)/.demo $(VENV)/.kernels-$(CUDA)
	@$(VENV)/bin/adapterx env | grep '^kernels'

test: lint $(VENV)/.kernels-$(CUDA)
	$(ONE_THREAD) $(PY) -m pytest -q -n $(JOBS) $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(VENV)/.dev
	$(PY) bench/swap.py
	$(PY) bench/feed.py
	$(PY) bench/bank.py
	$(PY) bench/mixed.py
	$(PY) bench/registered.py
	$(PY) bench/shared_input.py
	$(PY) bench/extract.py
	$(PY) bench/inject.py
	$(PY) bench/merge.py
	$(PY) bench/convert.py
	$(PY) bench/kinds.py
	$(PY) bench/quant.py
	$(PY) bench/quant_onnx.py
	$(PY) bench/quant_decode.py

clean:
	rm -rf $(VENV) build dist .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A half-made environment must not pass for a whole one, hence the rm.
$(PY):
	@test -n "$(PYTHON)" || { echo "adapterx needs Python 3.11 or newer; none of: $(CANDIDATES)" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make an environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

$(VENV)/.demo: pyproject.toml constraints.txt | $(PY)
	@echo "installing adapterx[cpu] into $(VENV)"
	@$(PIP) -e ".[cpu]"
	@touch $@

# .dev holds all of .demo.
$(VENV)/.dev: pyproject.toml constraints.txt | $(PY)
	@echo "installing adapterx[dev] into $(VENV)"
	@$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.demo

# Of the wheel that lies in .venv there is one stamp, whichever kind it is.
$(VENV)/.kernels-$(CUDA): $(shell find kernels -type f ! -path '*/harness/*' ! -path '*/__pycache__/*') | $(PY)
	@echo "building adapterx-kernels into $(VENV)"
	@rm -rf build/kernels $(VENV)/.kernels-*
	@ADAPTERX_CUDA=$(CUDA) kernels/build.sh $(PY) build/kernels
	@$(PIP) --no-deps --force-reinstall build/kernels/*.whl
	@touch $@
