# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= $(shell for p in python3 python3.13 python3.12; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
JOBS ?= 2
DATA ?=
# Short tests spend their time in the compiler; the slow ones run programs as users have them.
QUICK := --xla_backend_optimization_level=0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow test-interop lint format bench docs validate clean

demo: .venv/.run          ## the main job on real data: report in the terminal and as a page
	$(BIN)/ppl demo --out out

test: .venv/.test         ## the tests
	OPENBLAS_NUM_THREADS=1 XLA_FLAGS="$$XLA_FLAGS $(QUICK)" $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and not interop"

test-slow: .venv/.test    ## longer statistical validation
	$(BIN)/python -m pytest -n $(JOBS) -m slow

test-interop: .venv/.bench ## beside other libraries: blackjax
	$(BIN)/python -m pytest -n $(JOBS) -m interop

lint: .venv/.test         ## style, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.bench       ## side by side with peers: make bench DATA=path/to/posteriordb
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/runtime.py
	$(BIN)/python benchmarks/diagnostics.py
	$(BIN)/python benchmarks/composition.py
	$(BIN)/python benchmarks/batch.py
	$(BIN)/python benchmarks/many_chains.py
	$(BIN)/python benchmarks/approximations.py
	$(BIN)/python benchmarks/particles.py
	$(BIN)/python benchmarks/stochastic_gradient.py
	$(BIN)/python benchmarks/infinite_width.py
	$(BIN)/python benchmarks/scale_mixture.py
	$(if $(DATA),$(BIN)/python benchmarks/mcmc.py $(DATA))
	$(if $(DATA),$(BIN)/python benchmarks/seeds.py $(DATA))

docs: .venv/.docs         ## all tutorials in full, as pages in docs/_build
	$(BIN)/python docs/build.py

validate: .venv/.test     ## real posteriors against their references: make validate DATA=path
	@test -n "$(DATA)" || { echo "say where the data are: make validate DATA=path/to/posteriordb"; exit 2; }
	$(BIN)/python benchmarks/validate.py $(DATA)
	$(BIN)/python benchmarks/validate_smc.py $(DATA)

clean:
	rm -rf .venv out docs/_build

.venv/.python:
	@test -n "$(PYTHON)" || { echo "Python >= 3.12 is needed; set PYTHON=/path/to/python3"; exit 2; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.run: .venv/.python pyproject.toml constraints.txt
	$(PIP) -e .
	@touch $@

.venv/.test: .venv/.python pyproject.toml constraints.txt
	$(PIP) -e ".[test]"
	@touch $@ .venv/.run

.venv/.bench: .venv/.test
	$(PIP) -e ".[test,bench]"
	@touch $@

.venv/.docs: .venv/.test
	$(PIP) -e ".[test,docs]"
	@touch $@
