# Every target makes and fills its own environment (.venv) and is quick the second time; but for `gpu` and `test-gpu`.
#   make train          two minutes of training on the text that is on the machine    (ARGS="--optimizer torch.AdamW")
#   make test           all tests but the slow ones; skipped ones are listed with their reason         (ARGS="-k lion")
#   make test-install   the tests that install into fresh environments;   make test-all   every test
#   make test-matrix    the tests on the oldest torch and triton, in .venv-oldest (downloads torch's CUDA wheels, 3 GB)
#   make gpu            the proof on a GPU, in under 9 minutes: build, tests, compute-sanitizer, benchmarks; with the
#                       Python it finds: installs nothing, downloads nothing       (ARGS=--dry without a GPU; docs/gpu.md)
#   make test-gpu       its build and all of its tests, the exhaustive ones too    (ARGS="-k lion")
#   make figures        the README's tables and plots from the newest results
#   make proof          what compilers made of every kernel, measured again: the table and its two pages (minutes)
#   make lint, make bench, make rules (writes csrc/rules.h), make install (only fills .venv), make clean
# Variables: PYTHON (which Python makes .venv), TORCH (what pip installs as torch), FASTTRAIN_CUDA (auto, on, off), JOBS
# (processes that share the tests of `make test`; 0: one, with its output as it comes).

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
EXTRAS ?= test,dev
ARGS   ?=
JOBS   ?= 2
PY     := $(VENV)/bin/python

.PHONY: train test test-all test-install test-matrix test-gpu gpu lint bench figures proof rules install clean

train: $(VENV)/.native
	$(PY) -m fasttrain train $(ARGS)

test: $(VENV)/.native  # passive: threads of torch that spin while they wait would take the other process's core
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(ARGS)

test-install: $(VENV)/.native
	$(PY) -m pytest tests/test_install.py $(ARGS)

test-all: $(VENV)/.native
	$(PY) -m pytest $(ARGS)

test-matrix:
	@echo "The oldest supported torch needs CUDA's libraries to import: about 3 GB are downloaded the first time."
	$(MAKE) test VENV=.venv-oldest TORCH="torch==2.11.0 triton==3.6.0" EXTRAS=test

lint: $(VENV)/.deps
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: $(VENV)/.native
	$(PY) -m benchmarks $(ARGS)

figures: $(VENV)/.native
	$(PY) -m benchmarks.readme
	$(PY) -m benchmarks.storage_page

proof: $(VENV)/.native
	$(PY) -m benchmarks.proof $(ARGS)

rules: $(VENV)/.torch  # not .native, which needs csrc/rules.h
	$(PY) -m fasttrain.optim.header csrc/rules.h

install: $(VENV)/.native

clean:
	rm -rf build dist *.egg-info .venv*/.native .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f fasttrain/_native*.so fasttrain/step.fatbin fasttrain/_build_info.json
	find fasttrain tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# --- The environment, one stamp for each part --------------------------------------------------------------------------
$(VENV)/.torch:  # first, so that no dependency picks another torch
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(TORCH) numpy
	touch $@

$(VENV)/.deps: pyproject.toml $(VENV)/.torch
	$(PY) -m pip install -q "setuptools>=77" "cmake>=3.24" ninja "pybind11>=2.13"
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m pip install -q --no-build-isolation -e ".[$(EXTRAS)]"
	touch $@

$(VENV)/.native: setup.py CMakeLists.txt $(shell find csrc -type f) $(VENV)/.deps
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) setup.py -q build_ext --inplace
	touch $@

# --- A bare GPU machine: torch, triton, CuPy, numpy, pytest, pybind11, CMake, ninja and nvcc are there, or it says so ---
gpu:
	$(PYTHON) -m benchmarks gpu $(ARGS)

test-gpu:
	$(PYTHON) -m benchmarks gpu --only build
	$(PYTHON) -m pytest -m gpu $(ARGS) $$(grep -lrE --include='test_*.py' 'mark\.gpu' tests)
