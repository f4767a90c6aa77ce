# Every target first sets up .venv with all that it needs; the second call finds it ready.
#   make train ARGS="--max-steps 3"     make test ARGS="-k hvp"     PYTHON=python3.12 make test

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)
ARGS ?=

# The first Python on the path that is new enough and can make virtual environments.
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(USABLE)' 2>/dev/null && echo $$p && break; done)

.PHONY: train test bench lint clean

train: $(VENV)/.installed
	$(BIN)/python -m mamlfast.train $(ARGS)

test: $(VENV)/.installed
	env -u TRITON_INTERPRET $(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.installed
	env -u TRITON_INTERPRET $(BIN)/python -m pytest bench --benchmark-only $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# What building and testing leave behind; the environment stays, for it is large.
clean:
	rm -rf build dist mamlfast.egg-info mamlfast/_C*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(VENV)/.installed $(VENV)/.installed-dev
	find mamlfast triton_kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "mamlfast needs Python 3.11 or newer with its venv module;" \
	    "install one (on Debian: python3-venv) or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "setting up $(VENV) with $(PYTHON); the first time this downloads torch"
	@$(PYTHON) -m venv $(VENV)

# torch comes first: the extension is compiled against the torch it will be loaded into.
$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	@$(PIP) "torch>=2.11,<2.14" "setuptools>=77" wheel
	@$(PIP) --no-build-isolation --editable ".[test]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) --no-build-isolation --editable ".[dev]"
	@touch $@
