# Two commands do everything on a fresh machine with Python 3.11 to 3.13: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_EXTRAS := train,openvino,tensorrt-rtx,demo
TEST_EXTRAS := $(DEMO_EXTRAS),onnxsim,accelerate,peft,dev

# Two processes, a file of tests in each: most of a test's time is tracing, on one thread.
FAST_TESTS = $(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile --cov --cov-report=term

.PHONY: demo test slow check fix bench bench-methods clean

demo: $(VENV)/.demo
	$(BIN)/edgepet demo --dir demo

test: $(VENV)/.test
	$(FAST_TESTS)

slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.test
	$(BIN)/ruff format --check edgepet exporters calibration tests benchmarks
	$(BIN)/ruff check edgepet exporters calibration tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(FAST_TESTS)

fix: $(VENV)/.test
	$(BIN)/ruff check --fix edgepet exporters calibration tests benchmarks
	$(BIN)/ruff format edgepet exporters calibration tests benchmarks

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/accuracy.py --dir bench/vit-small
	$(BIN)/python benchmarks/accuracy.py --dir bench/lite0 --backbone efficientnet-lite0
	$(BIN)/python benchmarks/latency.py --backbone efficientnet-lite0
	$(BIN)/python benchmarks/half.py --pack bench/vit-small/landcover-ssf.pet --pack bench/lite0/digits-ssf.pet
	$(BIN)/python benchmarks/int8.py --dir bench/int8
	$(BIN)/python benchmarks/shared_int8.py --dir bench/int8
	$(BIN)/python benchmarks/int8_tuning.py --dir bench/int8
	$(BIN)/python benchmarks/timm_sweep.py

bench-methods: $(VENV)/.bench
	$(BIN)/python benchmarks/methods.py
	$(BIN)/python benchmarks/branches.py
	$(BIN)/python benchmarks/accuracy.py --dir bench/every --every
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf $(VENV) demo bench build dist

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "edgepet needs Python 3.11 to 3.13: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[$(DEMO_EXTRAS)]'
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[$(TEST_EXTRAS)]'
	touch $@ $(VENV)/.demo

$(VENV)/.bench: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[$(TEST_EXTRAS),bench]'
	touch $@ $(VENV)/.test $(VENV)/.demo
