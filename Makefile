# Two commands for a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
# Both install into .venv; nothing outside this folder and the caches is touched.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
QUANTKIT := $(BIN)/quantkit

.PHONY: demo test test-long check lint wheel clean

demo: $(READY)  ## quantize, evaluate and generate with a real small model, on the CPU
	$(QUANTKIT) quantize demo -r fp8 -o demo/fp8
	$(QUANTKIT) quantize demo -r int8 -o demo/int8
	$(QUANTKIT) quantize demo -r int4 --set calibration.samples=32 -o demo/int4
	$(QUANTKIT) verify demo/int4
	$(QUANTKIT) eval demo demo/fp8 demo/int8 demo/int4 --windows 12
	$(QUANTKIT) generate demo/int4 "What is water made of?"

test: check  ## what CI runs: check, then the end-to-end tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/e2e -m "not long" -n auto --dist loadfile

test-long: $(READY)  ## kills, full disks, a 3B model, a soak of the engine, load on a server: more than an hour
	$(BIN)/python -m pytest tests -m long -s

check: lint wheel  ## style, types, layering, unit tests, and the wheel in a clean environment
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -n auto  # a process for each core

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

wheel: $(READY)
	$(BIN)/python tests/wheel_smoke.py

# torch first and by itself: left to choose, pip takes the newest build with its CUDA libraries
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) demo build dist
