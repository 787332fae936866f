# make demo   set everything up in .venv, then simulate adenylate kinase particles and reconstruct them into demo/
# make test   set up with the test tools, then run the tests
# make lint   ruff and mypy
#
# TORCH=cuda  installs the newest GPU build of PyTorch instead of the CPU build (several gigabytes)
# PYTHON=...  names the interpreter to start from (3.11 or newer)

PYTHON ?= python3
VENV ?= .venv
TORCH ?= cpu
TORCH_VERSION ?= 2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
DEMO_OUTPUT ?= demo/

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# Packages that need torch must take the one that is installed, never bring another.
PINNED := $(VENV)/torch-constraint.txt

.PHONY: help demo test lint setup setup-dev clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

demo: setup
	$(VENV)/bin/cryorbit demo --output $(DEMO_OUTPUT)

test: setup-dev
	$(PY) -m pytest -n auto --dist loadfile

lint: setup-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m mypy benchmarks/*.py
	for folder in benchmarks/reproduce/*; do (cd $$folder && $(abspath $(PY)) -m mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache *.py) || exit 1; done

setup: $(VENV)/.package
setup-dev: $(VENV)/.dev

clean:
	rm -rf $(VENV)

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "cryorbit needs Python 3.11 or newer; '$(PYTHON)' is missing or older: $$($(PYTHON) --version 2>&1)"; \
	  echo "hint: name another interpreter, for example: make demo PYTHON=python3.12"; exit 1; }
	@echo "Creating the environment $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "hint: on Debian and Ubuntu the module is in a package of its own: sudo apt-get install python3-venv"; exit 1; }
	@touch $@

# CPU build: a wheel folder configured for pip first, then the CPU index. A plain "pip install torch" would fetch CUDA on Linux.
$(VENV)/.torch-$(TORCH): $(VENV)/.python
	@if $(PY) -c 'import torch' 2>/dev/null; then \
	  echo "PyTorch is already in $(VENV)"; \
	  if [ "$(TORCH)" = cuda ] && $(PY) -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then \
	    echo "hint: it is a CPU build; start over with: make clean && make demo TORCH=cuda"; exit 1; \
	  fi; \
	elif [ "$(TORCH)" = cuda ] || [ "$$(uname -s)" = Darwin ]; then \
	  echo "Installing PyTorch"; $(PIP) install "torch>=2.9"; \
	else \
	  echo "Installing PyTorch $(TORCH_VERSION) for the CPU (about 200 MB; GPU: make demo TORCH=cuda)"; \
	  { $(PIP) install --quiet --no-index --no-deps "torch==$(TORCH_VERSION)" 2>/dev/null || \
	    $(PIP) install --no-deps --index-url $(TORCH_CPU_INDEX) "torch==$(TORCH_VERSION)"; } && \
	  $(PIP) install --quiet filelock typing-extensions sympy networkx jinja2 fsspec numpy "setuptools>=77" && \
	  { $(PY) -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' || { \
	    echo "The installed PyTorch is a CUDA build or does not start."; false; }; } || { \
	  echo "No CPU build of PyTorch $(TORCH_VERSION) could be installed, and nothing larger is fetched without your word."; \
	  echo "hint: check the network and try again, choose another version (make demo TORCH_VERSION=2.9.0),"; \
	  echo "      or take the GPU build (make demo TORCH=cuda, several gigabytes)"; \
	  $(PIP) uninstall --quiet --yes torch 2>/dev/null; exit 1; }; \
	fi
	@$(PY) -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > $(PINNED)
	@touch $@

$(VENV)/.package: $(VENV)/.torch-$(TORCH) pyproject.toml
	@echo "Installing cryorbit and its libraries"
	@$(PIP) install --quiet --constraint $(PINNED) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.torch-$(TORCH) pyproject.toml
	@echo "Installing cryorbit with its test tools"
	@$(PIP) install --quiet --constraint $(PINNED) --editable ".[dev]"
	@touch $@ $(VENV)/.package
