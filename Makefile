# The two commands: `make demo` and `make test`. Each first makes .venv from the pinned versions; later calls reuse it.
PYTHON ?= python3
BIN := .venv/bin
NAME ?= timestep_dbn
PRESET ?= laptop

.PHONY: demo test test-slow test-platforms test-browser run lint notebooks benchmarks pins clean

demo: .venv/ready
	$(BIN)/trainbook run timestep_dbn --preset laptop

# Tests of other processes wait for some of their time, so that three workers fill two cores. Files are taken in the order that
# tests/conftest.py puts them in, not by their number of tests.
# A worker that crashed is not replaced: with loadfile the next one would wait for tests that never come.
test: .venv/ready
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 --timeout 300

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow -o addopts="-ra --strict-markers"

# Installs what it tests against: the front ends and the clients of the platforms.
test-platforms: .venv/ready
	$(BIN)/python -m pytest -m platforms -o addopts="-ra --strict-markers"

# Installs what drives the browser, and the front ends; Chromium itself comes from the system: apt-get install chromium.
test-browser: .venv/ready
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements-pinned.txt --editable '.[test,browser]'
	$(BIN)/python -m pytest -m browser -o addopts="-ra --strict-markers"

run: .venv/ready
	$(BIN)/trainbook run $(NAME) --preset $(PRESET)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The .py file is the source of each notebook; --update keeps cell ids.
notebooks: .venv/ready
	$(BIN)/jupytext --to ipynb --update notebooks/*.py

benchmarks: .venv/ready
	$(BIN)/python -m tests.benchmarks.timestep_dbn
	$(BIN)/python -m tests.benchmarks.engine
	$(BIN)/python -m tests.benchmarks.batches
	$(BIN)/python -m tests.benchmarks.distillation
	$(BIN)/python -m tests.benchmarks.graph_diffusion_em
	$(BIN)/python -m tests.benchmarks.cellular_cube
	$(BIN)/python -m tests.benchmarks.nerf
	$(BIN)/python -m tests.benchmarks.diffusion
	$(BIN)/python -m tests.benchmarks.legal_bert

.venv/ready: requirements.txt requirements-pinned.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "trainbook needs Python 3.11, 3.12 or 3.13; this is " + sys.version.split()[0] + ". Name one: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements-pinned.txt uv
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --constraint requirements-pinned.txt --editable '.[test]'
	touch $@

# New pins for every supported Python, after a change of requirements.txt.
pins: .venv/ready
	$(BIN)/uv pip compile --universal --python-version 3.11 --no-header --no-annotate --extra test --output-file requirements-pinned.txt pyproject.toml

clean:
	rm -rf .venv runs
