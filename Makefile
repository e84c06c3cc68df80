# make demo | test | lint | bench | venv | clean. All of them work in .venv, which they create.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=

# Real data for the tests: SKCIFAR_DATA, or scikit-learn's own SCIKIT_LEARN_DATA, names a folder
# that holds cifar-10-batches-bin/ and MNIST/raw/.
ifdef SKCIFAR_DATA
export SCIKIT_LEARN_DATA := $(SKCIFAR_DATA)
endif

.PHONY: demo test lint bench venv clean

demo: $(VENV)/.installed
	$(BIN)/python -m skcifar compare

# SCIPY_ARRAY_API lets scikit-learn's check of array namespaces run.
# One thread a process: processes that share cores wait for each other's threads otherwise.
test: $(VENV)/.installed-dev
	SCIPY_ARRAY_API=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Goes on after a bound that is missed, so that all results and the README's tables are written,
# and fails at the end.
bench: $(VENV)/.installed-dev
	@failed=; \
	for script in benchmarks/bench_*.py; do \
	    echo "== $$script"; $(BIN)/python $$script --check || failed="$$failed $$script"; \
	done; \
	$(BIN)/python benchmarks/readme_table.py || failed="$$failed benchmarks/readme_table.py"; \
	if [ -n "$$failed" ]; then echo "failed, or missed a bound:$$failed" >&2; exit 1; fi

venv: $(VENV)/.installed-dev

clean:
	rm -rf $(VENV) build dist *.egg-info

# The stamps keep a second run from installing again; a changed dependency renews them.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "skcifar needs Python 3.11 or newer, and $(PYTHON) is not:" \
	    "name one that is with 'make PYTHON=/path/to/python ...'." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
