# Two commands do everything on a fresh machine with Python 3.11 to 3.13: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_EXTRAS := train,openvino,tensorrt-rtx,demo
TEST_EXTRAS := $(DEMO_EXTRAS),onnxsim,accelerate,peft,sign,report,boxes,dev

# Two processes, a file of tests in each: most of a test's time is tracing, on one thread.
TESTS = $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
FAST_TESTS = $(TESTS) -m "not slow"
COVERED = --cov --cov-report=term  # a fifth of their time

.PHONY: demo test slow check fix bench bench-methods bench-trials bench-masks bench-boxes report clean

demo: $(VENV)/.demo
	$(BIN)/edgepet demo --dir demo

test: $(VENV)/.test
	$(FAST_TESTS)

slow: $(VENV)/.slow
	$(TESTS) -m slow

check: $(VENV)/.test
	$(BIN)/ruff format --check edgepet exporters calibration tests benchmarks
	$(BIN)/ruff check edgepet exporters calibration tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(FAST_TESTS) $(COVERED)

fix: $(VENV)/.test
	$(BIN)/ruff check --fix edgepet exporters calibration tests benchmarks
	$(BIN)/ruff format edgepet exporters calibration tests benchmarks

# ARGS=--quick goes through all of both, with as little of everything as goes the whole way, and keeps no result.
bench: $(VENV)/.bench $(if $(findstring --quick,$(ARGS)),bench-methods bench-trials bench-masks bench-boxes)
	$(BIN)/python benchmarks/latency.py $(ARGS)
	$(BIN)/python benchmarks/export.py $(ARGS)
	$(BIN)/python benchmarks/training.py $(ARGS)
	$(BIN)/python benchmarks/accuracy.py $(ARGS)
	$(BIN)/python benchmarks/accuracy.py --backbone efficientnet-lite0 $(ARGS)
	$(BIN)/python benchmarks/latency.py --backbone efficientnet-lite0 $(ARGS)
	$(BIN)/python benchmarks/half.py $(ARGS)
	$(BIN)/python benchmarks/int8.py $(ARGS)
	$(BIN)/python benchmarks/shared_int8.py $(ARGS)
	$(BIN)/python benchmarks/int8_convnets.py $(ARGS)
	$(BIN)/python benchmarks/int8_tuning.py $(ARGS)
	$(BIN)/python benchmarks/timm_sweep.py $(ARGS)
	$(BIN)/python benchmarks/store.py $(ARGS)
	$(BIN)/python benchmarks/serving.py $(ARGS)
	$(BIN)/python benchmarks/storage.py $(ARGS)
	$(BIN)/python benchmarks/fastest.py $(ARGS)
	$(BIN)/python benchmarks/peers.py $(ARGS)
	$(BIN)/python benchmarks/compare.py $(ARGS)

bench-methods: $(VENV)/.bench
	$(BIN)/python benchmarks/methods.py $(ARGS)
	$(BIN)/python benchmarks/branches.py $(ARGS)
	$(BIN)/python benchmarks/accuracy.py --every $(ARGS)
	$(BIN)/python benchmarks/report.py $(ARGS)

bench-trials: $(VENV)/.bench
	$(BIN)/python benchmarks/trials.py $(ARGS)
	$(BIN)/python benchmarks/robustness.py $(ARGS)
	$(BIN)/python benchmarks/packs.py $(ARGS)
	$(BIN)/python benchmarks/report.py $(ARGS)

bench-masks: $(VENV)/.bench
	$(BIN)/python benchmarks/masks.py $(ARGS)
	$(BIN)/python benchmarks/words.py $(ARGS)
	$(BIN)/python benchmarks/report.py $(ARGS)

bench-boxes: $(VENV)/.bench
	$(BIN)/python benchmarks/boxes.py $(ARGS)
	$(BIN)/python benchmarks/report.py $(ARGS)

report: $(VENV)/.test
	$(BIN)/edgepet report benchmarks/results -o report.html

clean:
	rm -rf $(VENV) demo bench build dist report.html

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "edgepet needs Python 3.11 to 3.13: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[$(DEMO_EXTRAS)]'
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[$(TEST_EXTRAS)]'
	touch $@ $(VENV)/.demo

$(VENV)/.slow: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[$(TEST_EXTRAS),ray]'
	touch $@ $(VENV)/.test $(VENV)/.demo

$(VENV)/.bench: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[$(TEST_EXTRAS),bench]'
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps deepforest==2.1.0  # photographs: no code of it is run
	touch $@ $(VENV)/.test $(VENV)/.demo
