# Needs make and Python 3.11, nothing else: every target sets up what it uses.
PYTHON ?= python3.11
VENV ?= .venv
UV_VERSION := 0.13.8
WORK_DIR ?= work_dirs/demo
PATHGEN_WORK_DIR ?= work_dirs/demo_pathgen
PYTEST_ARGS ?=
BENCH_ARGS ?=

# Exported models are loaded by these transformers, in environments without this package.
TRANSFORMERS := 4.48 4 5
ALONE := $(foreach version,$(TRANSFORMERS),$(VENV)/transformers-$(version))

STAMP := $(VENV)/.setup-complete
SETUP_INPUTS := $(wildcard requirements/*.txt) setup.py pyproject.toml
REQUIREMENTS := $(addprefix requirements/,$(addsuffix .txt,runtime models host train evaluate convert cite demo serve ray pathgen gigapath dev docs))

# DeepSpeed looks for ninja on PATH; subprocesses of the tests look for xtuner-add.
export PATH := $(abspath $(VENV))/bin:$(PATH)
export VIRTUAL_ENV := $(abspath $(VENV))
unexport PYTHONHOME PYTHONPATH CONDA_PREFIX
# Without byte code, each of the many processes of a test run compiles the libraries again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup lock demo demo-pathgen test test-fast check format docs notebooks bench bench-check clean distclean

help: ## Show the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv with everything in requirements/lock.txt

$(STAMP): $(SETUP_INPUTS)
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "make: '$(PYTHON)' was not found. Install Python 3.11, or name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "make: '$(PYTHON)' is $$($(PYTHON) -V 2>&1), but requirements/lock.txt is written for Python 3.11. Name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: '$(PYTHON)' lacks the modules venv and ensurepip (on Debian and Ubuntu: apt-get install python3.11-venv)" >&2; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(VENV)/bin/uv pip install --no-deps --build-constraints requirements/build.txt -r requirements/lock.txt
	$(VENV)/bin/uv pip install --no-deps --build-constraints requirements/build.txt --config-setting editable_mode=compat -e .
	@touch $@

$(VENV)/transformers-%/.setup-complete: requirements/transformers/%.txt $(STAMP)
	$(VENV)/bin/uv venv --quiet --clear --python $(VENV)/bin/python $(@D)
	$(VENV)/bin/uv pip install --quiet --no-deps --python $(@D)/bin/python -r $<
	@touch $@

lock: ## Write requirements/lock.txt anew from the ranges and the overrides
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(VENV)/bin/uv pip compile --no-header --python-version 3.11 --override requirements/overrides.txt $(REQUIREMENTS) -o requirements/lock.txt
	@grep -E '^(torch|numpy|pillow)==' requirements/lock.txt > $(VENV)/common.txt
	set -e; for version in $(TRANSFORMERS); do $(VENV)/bin/uv pip compile --quiet --no-header --no-annotate \
	  --python-version 3.11 --constraint $(VENV)/common.txt requirements/transformers/$$version.in \
	  -o requirements/transformers/$$version.txt; done

demo: setup ## Train PA-LLaVA on data made here and answer held-out questions (CPU, about ten minutes)
	xtuner-add demo --work-dir $(WORK_DIR)

demo-pathgen: setup ## Caption slides made here and train a CLIP on the captions (CPU, a few minutes)
	xtuner-add demo-pathgen --work-dir $(PATHGEN_WORK_DIR)

test: export PALLAVA_TRANSFORMERS_PYTHONS := $(subst $(eval ) ,:,$(foreach folder,$(ALONE),$(abspath $(folder))/bin/python))
test: setup $(addsuffix /.setup-complete,$(ALONE)) ## Run every test
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-fast: setup ## Run the tests that take seconds
	OMP_NUM_THREADS=1 python -m pytest -m "not slow and not multiproc" $(PYTEST_ARGS)

check: setup ## Lint, format, types, import directions, every config
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	OMP_NUM_THREADS=1 python -m pytest -q tests/test_configs.py

format: setup ## Apply the formatter and the safe fixes
	ruff check --fix .
	ruff format .

docs: setup ## Build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

notebooks: setup ## Run the tutorials and store their outputs
	OMP_NUM_THREADS=1 jupyter nbconvert --to notebook --execute --inplace \
	  --ExecutePreprocessor.record_timing=False docs/tutorials/*.ipynb

bench: setup ## Measure against straightforward implementations
	OMP_NUM_THREADS=1 python -m benchmarks $(BENCH_ARGS)

bench-check: setup ## Compare quick ratios with the committed ones (before a release)
	OMP_NUM_THREADS=1 python -m benchmarks.check $(BENCH_ARGS)

clean: ## Remove caches and build products
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove also .venv (work_dirs stays)
	rm -rf $(VENV)
