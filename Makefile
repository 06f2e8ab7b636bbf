# Needs Python >= 3.11 and GNU make >= 3.81; everything else is installed into .venv.
#
#   ACCEL=cpu|cuda|metal   the build of MLX (default: what this machine has)
#   PYTHON=...             the interpreter for .venv
#   HOST, PORT             where `make run` listens
#   ARGS=...               arguments for pytest or the benchmark

HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
UPGRADE ?=

OS := $(shell uname -s)
MACHINE := $(shell uname -m)

ifndef PYTHON
PYTHON := $(shell for python in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$python; break; }; done)
endif

ifndef ACCEL
ifeq ($(OS),Darwin)
ACCEL := metal
else
ACCEL := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
endif
endif

LOCK_cpu := cpu-linux
LOCK_cuda := cuda-linux
LOCK_metal := metal-macos
LOCK := $(LOCK_$(ACCEL))
ifeq ($(LOCK),)
$(error ACCEL=$(ACCEL): expected cpu, cuda or metal)
endif
# The wheels that write the same files as the chosen one.
RIVAL_cpu := mlx_cuda
RIVAL_cuda := mlx_cpu
RIVAL_metal := mlx_c

# A uv on PATH that does not start (a stale shim) is no uv.
UV := $(shell uv --version >/dev/null 2>&1 && echo uv || echo .uv/bin/uv)
UV_FILE := $(filter .uv/bin/uv,$(UV))

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(UV) pip install --quiet --python $(BIN)/python
# How the project itself comes into the environment.
PROJECT := --editable .
RUNTIME := $(VENV)/.installed-$(ACCEL)
DEV := $(VENV)/.installed-$(ACCEL)-dev
# Official clients want versions of their own, so they live apart from the server; Node comes with them.
CLIENTS_BIN := .venv-clients/bin
CLIENTS := .venv-clients/.installed
NODE := tests/clients/node

.DEFAULT_GOAL := help
.PHONY: help run starter test test-all test-clients test-image test-machine check format bench lock clean env env-dev env-clients

help:
	@echo "make run      start the server on http://$(HOST):$(PORT) (HOST=, PORT=, ACCEL=cpu|cuda|metal)"
	@echo "make starter  fetch and convert SmolLM2-135M-Instruct again, the model of a first run"
	@echo "make test     run the quick tests, in a few minutes (ARGS='tests/server -k name' runs these instead)"
	@echo "make test-all       run all tests, also the slow ones and the official clients"
	@echo "make test-clients   run only the official clients against a running server (ARGS='-k name')"
	@echo "make test-image     run Dockerfile.dev's steps on a bare Debian (as root; needs debootstrap)"
	@echo "make test-machine   run the services in a booted Debian (as root; needs debootstrap and systemd-container)"
	@echo "make check    check formatting, lint, types and import rules"
	@echo "make format   apply the formatting and the safe fixes of the linter"
	@echo "make bench    measure serving (ARGS=...)"
	@echo "make lock     write requirements/ again from pyproject.toml (UPGRADE=--upgrade for newer versions)"
	@echo "make install-service     start the server at login, as your own user (systemd or launchd; docs/deploy.md)"
	@echo "make restart-service     restart it after a change in its settings"
	@echo "make uninstall-service   remove it; settings and sessions stay"
	@echo "make install-system-service, uninstall-system-service   the same for a Linux machine that serves others (as root)"
	@echo "make monitoring          start Prometheus and Grafana in containers (Docker)"
	@echo "make clean    remove .venv, caches and build output"
	@echo "This machine: ACCEL=$(ACCEL), Python $(or $(PYTHON),not found)"

# The environments by themselves, for container images.
env: $(RUNTIME)
env-dev: $(DEV)
env-clients: $(CLIENTS) $(NODE)/node_modules/.package-lock.json

run: $(RUNTIME)
	@$(FETCH_STARTER) --if-needed || true
	$(BIN)/turbocache serve --host $(HOST) --port $(PORT)

# The model of a first run. A server for which it could not be fetched takes the bundled one and says why.
FETCH_STARTER = $(BIN)/turbocache starter --uv $(UV)

starter: $(RUNTIME) | $(UV_FILE)
	@$(FETCH_STARTER)

# Two processes, each with one BLAS thread: on two cores, more threads wait for each other and take a quarter longer.
ONE_THREAD := OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 OMP_NUM_THREADS=1
PYTEST := -m pytest -n 2 --dist loadfile --timeout 300
# In the order of their names: xdist would start the files with few tests last, and these are the slowest.
BY_NAME := --no-loadscope-reorder

TEST_CLIENTS := SERVER_PYTHON=$(abspath $(BIN)/python) $(ONE_THREAD) $(CLIENTS_BIN)/python $(PYTEST) -c tests/clients/pytest.ini

# The packages' own tests and a real server's, without those marked `slow`.
QUICK := -m 'not slow' $(addprefix tests/,kernels $(addprefix turbocache/,cache codebooks machine mlxlm storage) server serving) \
	$(wildcard tests/turbocache/test_*.py tests/test_*.py)

test: $(DEV)
	$(ONE_THREAD) $(BIN)/python $(PYTEST) $(BY_NAME) $(or $(ARGS),$(QUICK))

# The clients' tests also run when others have failed, so that one report shows everything.
test-all: $(DEV) env-clients
	@$(FETCH_STARTER) --if-needed || true
	status=0; $(ONE_THREAD) $(BIN)/python $(PYTEST) $(BY_NAME) $(ARGS) || status=$$?; \
	$(TEST_CLIENTS) tests/clients || status=$$?; exit $$status

test-clients: $(DEV) env-clients
	$(TEST_CLIENTS) $(or $(ARGS),tests/clients)

# Both need root and debootstrap, and take minutes.
test-image test-machine: $(DEV)
	$(BIN)/python -m tests.deploy.$(@:test-%=%) $(ARGS)

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(DEV)
	$(BIN)/python -m tests.bench.serving $(ARGS)

clean:
	rm -rf .venv .venv-clients .uv $(NODE)/node_modules .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find server turbocache kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

include deploy/service.mk

# --- environment ---

.uv/bin/uv: requirements/uv.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found: install one, or name it with PYTHON=..." >&2; exit 1; }
	@rm -rf .uv
	@# Debian splits venv from Python; pip --target works there, also where the system's Python is externally managed.
	@$(PYTHON) -m venv .uv >/dev/null 2>&1 && .uv/bin/python -m pip install --quiet --require-hashes -r $< || { \
	  rm -rf .uv; $(PYTHON) -m pip install --quiet --target .uv --require-hashes -r $<; } || { \
	  rm -rf .uv; echo "Could not install uv: it needs the network, and venv or pip (Debian: apt install python3-venv)" >&2; exit 1; }
	@touch $@

$(RUNTIME): requirements/$(LOCK).txt requirements/build.txt pyproject.toml | $(UV_FILE)
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found: install one, or name it with PYTHON=..." >&2; exit 1; }
	@if ls -d $(VENV)/lib/python3*/site-packages/$(RIVAL_$(ACCEL))*.dist-info >/dev/null 2>&1; then \
	  echo "$(VENV) holds another build of MLX: making it anew for $(ACCEL)"; rm -rf $(VENV); fi
	@test -x $(BIN)/python || $(UV) venv --quiet --clear --python "$(PYTHON)" $(VENV)
	$(INSTALL) --require-hashes -r requirements/$(LOCK).txt
	@# No --require-hashes for a local folder; the build's own requirements are held to the hashes of build.txt.
	$(INSTALL) --no-deps --build-constraints requirements/build.txt $(PROJECT)
	@$(if $(filter cpu,$(ACCEL)),$(MAKE) --no-print-directory blas)
	@touch $@

$(DEV): requirements/$(LOCK)-dev.txt $(RUNTIME)
	$(INSTALL) --require-hashes -r requirements/$(LOCK)-dev.txt
	@touch $@

$(CLIENTS): requirements/clients.txt $(DEV)
	$(UV) venv --quiet --clear --python $(BIN)/python .venv-clients
	$(UV) pip install --quiet --python $(CLIENTS_BIN)/python --require-hashes -r $<
	@touch $@

$(NODE)/node_modules/.package-lock.json: $(NODE)/package-lock.json $(CLIENTS)
	PATH="$(abspath $(CLIENTS_BIN)):$$PATH" npm ci --prefix $(NODE) --no-audit --no-fund --loglevel=error
	@touch $@

IS_FAST := TURBOCACHE_BLAS=auto $(BIN)/python -c 'import sys; from turbocache.machine import blas; sys.exit(not blas.prefer_fast().fast)'

# PyPI's MKL takes 1 GB, so it is only the answer where the system has no BLAS of its own.
.PHONY: blas
blas:
	@$(IS_FAST) || { test "$(OS)-$(MACHINE)" = Linux-x86_64 && { echo "No system OpenBLAS: installing MKL into $(VENV)"; \
	  $(INSTALL) --require-hashes -r requirements/blas-linux-x86_64.txt; }; } || true
	@TURBOCACHE_BLAS=auto $(BIN)/python -c 'from turbocache.machine import blas; r = blas.prefer_fast(); print("BLAS:", r.name, "-", r.advice)'

# --- locks ---

# Extra indexes and folders of this machine must neither be written into the locks nor change what is chosen.
COMPILE := env -u PIP_FIND_LINKS -u UV_FIND_LINKS -u UV_INDEX -u UV_EXTRA_INDEX_URL -u UV_CONSTRAINT -u UV_OVERRIDE \
	$(UV) --no-config pip compile --quiet --universal --python-version 3.11 --generate-hashes $(UPGRADE) \
	--custom-compile-command "make lock"

lock: $(UV_FILE)
	$(COMPILE) pyproject.toml --extra cpu -o requirements/$(LOCK_cpu).txt
	$(COMPILE) pyproject.toml --extra cuda -c requirements/$(LOCK_cpu).txt -o requirements/$(LOCK_cuda).txt
	$(COMPILE) pyproject.toml --extra metal -c requirements/$(LOCK_cpu).txt -o requirements/$(LOCK_metal).txt
	$(COMPILE) pyproject.toml --extra cpu --group dev -c requirements/$(LOCK_cpu).txt -o requirements/$(LOCK_cpu)-dev.txt
	$(COMPILE) pyproject.toml --extra cuda --group dev -c requirements/$(LOCK_cuda).txt -c requirements/$(LOCK_cpu)-dev.txt \
	  -o requirements/$(LOCK_cuda)-dev.txt
	$(COMPILE) pyproject.toml --extra metal --group dev -c requirements/$(LOCK_metal).txt -c requirements/$(LOCK_cpu)-dev.txt \
	  -o requirements/$(LOCK_metal)-dev.txt
	echo mkl | $(COMPILE) - -o requirements/blas-linux-x86_64.txt
	$(COMPILE) --group clients -o requirements/clients.txt
	printf 'hatchling\neditables\n' | $(COMPILE) - -o requirements/build.txt
	echo uv | $(COMPILE) - -o requirements/uv.txt
	@if grep -nE '://|--(extra-)?index|--find-links' requirements/*.txt; then echo "A lock names an index" >&2; exit 1; fi
