# GeoCLIP, reproduced. `make help` lists the targets; PYTHON=python3.12 chooses the Python that .venv is made of.
SHELL := /bin/bash
PYTHON ?= python3
# Where the environment is made, and where caches go (GEOCLIP_CACHE, GEOCLIP_RESULTS, GEOCLIP_DATA: see the README).
VENV ?= .venv
BIN := $(VENV)/bin/python
READY := $(VENV)/ready

# The same outputs wherever it runs: nothing from the user's own Python folders, the same hashes each time.
export PYTHONHASHSEED := 0
export PYTHONNOUSERSITE := 1
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help reproduce test lab bench accept lint setup python weights
.DELETE_ON_ERROR:

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */  make \1|/' | column -t -s '|'

reproduce: weights  ## run all notebooks, write figures/ and data/results/, print the results (ONLY="03 04", PROFILE=paper)
	@$(BIN) -m geoclip reproduce $(if $(ONLY),--only $(ONLY)) $(if $(PROFILE),--profile $(PROFILE))

test: weights  ## pytest over the package, then nbval over all notebooks
	$(BIN) -m pytest tests
	$(BIN) -m pytest --nbval notebooks --nbval-sanitize-with tests/nbval.cfg --nbval-cell-timeout 1200 \
	  --nbval-kernel-startup-timeout 180 --nbval-current-env -W default

lab: weights  ## open JupyterLab on the first notebook
	$(BIN) -m jupyterlab notebooks/00_where_is_this.ipynb

bench: weights  ## measure ours against the authors' package (minutes); table in data/results/11_bench.csv
	$(BIN) -m geoclip bench

accept: weights  ## make what notebook NB finds the expectation: make accept NB=04
	@test -n "$(NB)" || { echo 'make accept needs the number of a notebook: make accept NB=04' >&2; exit 2; }
	@$(BIN) -m geoclip accept $(NB)

lint: setup  ## ruff over code and notebooks
	$(BIN) -m ruff check .

setup: $(READY)  ## make .venv and install; again only when pyproject.toml or constraints.txt changed

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed, and \"$(PYTHON)\" is not: make PYTHON=/path/to/python3.11 …" >&2; exit 2; }

$(READY): pyproject.toml constraints.txt | python
	@echo "Installing into $(VENV) (torch and its libraries are the bulk; once)"
	@test -x $(BIN) || $(PYTHON) -m venv $(VENV)
	@$(BIN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,index]'
	@MPLCONFIGDIR=$$($(BIN) -c 'from geoclip import paths; print(paths.CACHE / "matplotlib")') \
	  $(BIN) -c 'import matplotlib.font_manager'
	@touch $@

weights: $(READY)
	@$(BIN) -c 'from geoclip import weights; weights.authors_wheel()'
