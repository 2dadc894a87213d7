# Words: install | lint | test | e2e | faults | bench | demo.  Each sets up what it needs; a second call finds it done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STUBS := .venv-stubs
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
STEPS ?=
BENCH ?= marks
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTEST := $(BIN)/python -m pytest

.PHONY: install lint test e2e faults bench demo stubs redis peers clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "engrid needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet 'torch~=2.13.0'
	$(BIN)/pip install --quiet -e '.[dev]'
	@touch $@

# The generator is kept apart: it must be old (a runtime may be newer than its stubs, never older).
$(STUBS)/.installed: Makefile
	$(PYTHON) -m venv $(STUBS)
	$(STUBS)/bin/pip install --quiet 'grpcio-tools==1.71.2' 'setuptools<81'
	@touch $@

stubs: $(STUBS)/.installed
	cd proto && ../$(STUBS)/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. engrid/v1/memory.proto engrid/v1/compute.proto

redis:
	@command -v redis-server >/dev/null || { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq redis-server >/dev/null; }

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy proto/engrid model/engrid services/engrid cluster/engrid
	$(BIN)/lint-imports

test: install $(STUBS)/.installed redis
	$(PYTEST) -m "not e2e and not faults"

# What starts clusters, trains or times.
e2e: install redis
	$(PYTEST) -m "e2e and not faults"

faults: install redis
	$(PYTEST) -m faults

# Mooncake, one of the systems we are measured beside, links to the libraries named.
peers: install redis
	@ldconfig -p | grep -q libibverbs || { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq libibverbs1 libnuma1 libcurl4 >/dev/null; } || echo "Mooncake will not be measured"
	@$(BIN)/pip install --quiet -e '.[peers]'

bench: peers
	$(BIN)/engrid bench $(BENCH)

demo: install
	$(BIN)/engrid demo $(if $(STEPS),--steps $(STEPS))

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
