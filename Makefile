# GeoCLIP, reproduced. `make help` lists the targets; PYTHON=python3.12 chooses the Python that .venv is made of.
SHELL := /bin/bash
PYTHON ?= python3
# The environment: VENV if given, else .venv if it exists, else the active conda environment (but base), else .venv.
CONDA := $(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX))
VENV ?= $(or $(wildcard .venv),$(CONDA),.venv)
BIN := $(VENV)/bin/python
READY := $(VENV)/geoclip-ready
JOBS ?= 2
BOOK_READY := $(VENV)/geoclip-book-ready
INT8_READY := $(VENV)/geoclip-int8-ready

# Relative paths in GEOCLIP_* become absolute: notebooks run in another folder.
absolute = $(shell case '$($(1))' in (/*) echo '$($(1))';; (*) echo '$(CURDIR)/$($(1))';; esac)
$(foreach name,GEOCLIP_DATA GEOCLIP_CACHE GEOCLIP_RESULTS GEOCLIP_FIGURES,$(if $($(name)),\
  $(eval override $(name) := $(call absolute,$(name)))$(eval export $(name))))
ifneq ($(GEOCLIP_DATA),)
ifeq ($(shell test -d '$(GEOCLIP_DATA)' && echo yes),)
$(error GEOCLIP_DATA names $(GEOCLIP_DATA), which is not a folder; correct or unset it)
endif
endif

# The same results everywhere: no packages from the user's own Python folders, the same hashes each time.
export PYTHONHASHSEED := 0
export PYTHONNOUSERSITE := 1
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help reproduce rehearse test lab try book bench accept lint setup python weights
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -nE 's/^([a-z]+):.*## *(.*)/\1|\2/p' Makefile | \
	  while IFS='|' read -r name text; do printf '  make %-11s %s\n' "$$name" "$$text"; done

reproduce: weights  ## run all notebooks, write figures/ and data/results/, print the results (ONLY="03 04", PROFILE=paper)
	@$(BIN) -m geoclip reproduce $(if $(ONLY),--only $(ONLY)) $(if $(PROFILE),--profile $(PROFILE))

rehearse: weights  ## the paper's path, from addresses to tables, over a miniature world in REHEARSAL (N=120 images a set, DEVICES=2 ranks, ONLY="04 07" notebooks)
	@$(BIN) -m geoclip rehearse --out '$(or $(REHEARSAL),data/rehearsal)' --images $(or $(N),120) --run \
	  --jobs $(JOBS) $(if $(DEVICES),--devices $(DEVICES)) $(if $(ONLY),--only $(ONLY))

# Threads that wait must not spin while another process needs their core.
test: export OMP_WAIT_POLICY := PASSIVE
test: weights  ## run all tests, then compare all notebooks with their committed outputs (JOBS=4)
	$(BIN) -m pytest tests -m "" --numprocesses $(JOBS) --dist worksteal
	$(BIN) -m pytest --nbval notebooks --nbval-sanitize-with tests/nbval.cfg --nbval-cell-timeout 1200 \
	  --nbval-kernel-startup-timeout 180 --nbval-current-env -W default --numprocesses $(JOBS) --dist loadscope

lab: weights  ## open JupyterLab on the first notebook
	$(BIN) -m jupyterlab notebooks/00_where_is_this.ipynb

try: weights  ## open a page in the browser: click on a globe, see a tile, and where the model thinks that it is
	cd notebooks/try && JUPYTER_PATH=. JUPYTER_PREFER_ENV_PATH=1 $(abspath $(BIN)) -m voila try.ipynb

book: $(BOOK_READY)  ## build the book of README, notebooks as committed and API: book/_build/html/index.html
	@$(BIN) book/build.py

bench: weights $(INT8_READY)  ## measure speed beside the authors' package (minutes); the table is data/results/11_bench.csv
	$(BIN) bench.py

accept: weights  ## make the results of notebook NB the expected ones: make accept NB=04
	@test -n "$(NB)" || { echo 'make accept needs the number of a notebook: make accept NB=04' >&2; exit 2; }
	@$(BIN) -m geoclip accept $(NB)

lint: setup  ## check style and types: ruff over code and notebooks, mypy over the core
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m mypy

setup: $(READY)  ## make the environment and install; again only if pyproject.toml or constraints.txt changed

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed, and \"$(PYTHON)\" is not: make PYTHON=/path/to/python3.11 …" >&2; exit 2; }

$(READY): pyproject.toml constraints.txt | python
	@echo "Installing into $(VENV) (torch and its libraries are the bulk; once)"
	@test -x $(BIN) || $(PYTHON) -m venv $(VENV)
	@$(BIN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,index,try]'
	@MPLCONFIGDIR=$$($(BIN) -c 'from geoclip import paths; print(paths.CACHE / "matplotlib")') \
	  $(BIN) -c 'import matplotlib.font_manager'
	@touch $@

# An extra of pyproject.toml: geoclip-book-ready installs "book".
$(VENV)/geoclip-%-ready: pyproject.toml constraints.txt | $(READY)
	@echo "Installing what \"$*\" needs (once)"
	@$(BIN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

weights: $(READY)
	@$(BIN) -c 'from geoclip import pretrained; pretrained.authors_wheel()'
