# Two commands on a fresh machine: `make demo` and `make test`. Both may be repeated; nothing is done twice.
# Needs Python 3.11+ with venv, and a C++20 compiler for the native kernels (without one: GALLEY_PURE=true).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Models of the checkout, apart from the user's own.
export GALLEY_HOME ?= $(CURDIR)/.galley
MODEL := smollm2-135m
NATIVE := $(wildcard CMakeLists.txt native/*)
PURE := $(filter 1 true TRUE yes on,$(GALLEY_PURE))

# How much longer than in `make test` the state machines run, and for how long each target is fuzzed.
SOAK ?= 50
FUZZ_SECONDS ?= 1800

.PHONY: help demo test lint bench conformance comply schema-suite soak fuzz mutants isa arm64 install model clean
help:
	@echo "make demo   install, pull $(MODEL), serve it, stream an answer, print its receipt"
	@echo "make test   install, pull $(MODEL), run all tests"
	@echo "make soak   1,500 kill -9 and restart cycles, the state machines, SOAK=$(SOAK) times as long, 100,000 decisions"
	@echo "make fuzz   damaged bodies, model files and cache folders, FUZZ_SECONDS=$(FUZZ_SECONDS) each"
	@echo "make mutants  break each rule in a copy: the test that names it must fail"
	@echo "make isa    every instruction set against the portable kernels, bit by bit; the missing ones emulated"
	@echo "make arm64  of these, arm64 alone (needs aarch64-linux-gnu-g++ and qemu-aarch64-static)"
	@echo "make conformance  unmodified clients against the endpoint, each in an environment of its own"
	@echo "make comply  the suites of llm-comply against a served $(MODEL)"
	@echo "make schema-suite SUITE=FILE  every schema of the official tests that is accepted yields valid instances only"
	@echo "make lint   ruff and mypy"
	@echo "make bench  the benchmarks against their peers (slow; measures, so leave the machine alone)"
	@echo "make clean  remove the environment and build results (models stay)"

demo: model
	@$(BIN)/python scripts/demo.py $(MODEL)

test: model
	@GALLEY_REQUIRE_MODEL=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

soak: model
	$(BIN)/python -m tests.faults.kill_cycles --cycles 1000
	$(BIN)/python -m tests.faults.ledger_kills --cycles 500
	GALLEY_SOAK=40 SOAK=$(SOAK) $(BIN)/python -m pytest tests/property -k "Machine or 100k" $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

conformance: install
	test -d .venv-conformance || $(PYTHON) -m venv .venv-conformance
	test -d .venv-litellm || $(PYTHON) -m venv .venv-litellm
	.venv-conformance/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.venv-litellm/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.venv-conformance/bin/python -m pip install --quiet --group conformance
	.venv-litellm/bin/python -m pip install --quiet --group litellm
	cd tests/conformance/node && npm ci --ignore-scripts --no-audit --no-fund
	$(BIN)/python -m pytest tests/conformance $(PYTEST_ARGS)

# The official tests of JSON Schema, as JSON lines (plain or gzipped) in SUITE, and what they refer to in REMOTES.
schema-suite: $(VENV)/.installed
	@test -n "$(SUITE)" || { echo "make schema-suite SUITE=FILE [REMOTES=FILE]"; exit 1; }
	JSON_SCHEMA_SUITE=$(SUITE) JSON_SCHEMA_REMOTES=$(REMOTES) $(BIN)/python -m pytest tests/conformance/test_schema_suite.py $(PYTEST_ARGS)

# The suites of llm-comply against a served model; minutes.
comply: model
	test -d .venv-comply || $(PYTHON) -m venv .venv-comply
	.venv-comply/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.venv-comply/bin/python -m pip install --quiet --group comply
	$(BIN)/python -m tests.conformance.compliance .venv-comply/bin/llm-comply $(MODEL)

bench: model
	$(BIN)/python -m benchmarks.speed

fuzz: $(VENV)/.installed
	$(BIN)/python -m tests.fuzz http --seconds $(FUZZ_SECONDS)
	$(BIN)/python -m tests.fuzz gguf --seconds $(FUZZ_SECONDS)
	$(BIN)/python -m tests.fuzz disk --seconds $(FUZZ_SECONDS)

mutants: $(VENV)/.installed
	$(BIN)/python -m tests.mutants

isa: $(VENV)/.installed
	GALLEY_ISA_PATHS=1 $(BIN)/python -m pytest tests/unit/backend/test_native_paths.py -v $(PYTEST_ARGS)

arm64: $(VENV)/.installed
	GALLEY_REQUIRE_ARM64=1 $(BIN)/python -m pytest tests/unit/backend/test_native_paths.py -k "arm64 and not agree" -v $(PYTEST_ARGS)

install: $(VENV)/.installed

model: $(VENV)/.installed
	@$(BIN)/galley pull $(MODEL)

# An editable install: Python changes need nothing, a change of native code or of a dependency builds again.
$(VENV)/.installed: $(VENV)/.created pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(if $(PURE),GALLEY_PURE=true )$(BIN)/python -m pip install --quiet --group dev --editable .
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Galley needs Python 3.11 or later; $(PYTHON) is older. Try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make environments. On Debian and Ubuntu: apt install python3-venv python3-dev"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache
