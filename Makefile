# `make demo` and `make test` need nothing but Python and make: they build .venv by themselves.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test test-all lint types bench runtimes clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## build .venv with everything that development needs

# torch first and by exact version, or pip may choose a build of several gigabytes.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(READY)

demo: $(READY) ## export, optimize, verify and measure two real models, with the gain in a table
	$(BIN)/python -m sparse_onnx.bench.demo

test: $(READY) ## the tests (below 15 minutes on 2 cores)
	$(BIN)/python -m pytest -n auto --maxprocesses 8

test-all: $(READY) ## the tests and the slow sweeps
	$(BIN)/python -m pytest -n auto --maxprocesses 8 -m 'not gpu' --hypothesis-profile default

lint: $(READY) ## ruff, rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not see passes/ and models/ through an editable install, so the built package is checked.
types: $(READY) ## mypy over the built package
	rm -rf build/types build/lib
	$(BIN)/python -m pip install --quiet --no-deps --target build/types .
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p sparse_onnx

runtimes: $(READY) ## the runtimes that targets are tried on, into the user's cache (3 GB); `make test-all` uses them
	$(BIN)/python -m sparse_onnx.targets.runtimes install all

bench: $(READY) ## the measurements of docs/benchmarks.md; for the peers: .venv/bin/pip install -e '.[bench-peers]'
	$(BIN)/python -m sparse_onnx.bench.suite
	$(BIN)/python -m sparse_onnx.bench.quality
	$(BIN)/python -m sparse_onnx.bench.resident
	$(BIN)/python -m sparse_onnx.bench.startup
	$(BIN)/python -m sparse_onnx.bench.export_cost

clean: ## remove what was built, .venv too
	rm -rf $(VENV) build dist out *.egg-info
