# Everything runs in .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow check bench docs clean

# torch comes first and alone: other packages would otherwise pull a CUDA build of several gigabytes.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/deploykit demo --out demo --overwrite
	@echo "Reports: demo/report.html, and one beside the files of each target"

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" -n 2

test-slow: $(READY)
	$(BIN)/python -m pytest -n 2

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python -m benchmarks.road
	$(BIN)/python -m benchmarks.wide_openvino
	$(BIN)/python -m benchmarks.wide_c99
	$(BIN)/python -m benchmarks.wide_pixels
	$(BIN)/python -m benchmarks.support
	$(BIN)/python -m benchmarks.wide_support
	$(BIN)/python -m benchmarks.wide_devices
	$(BIN)/python -m benchmarks.wide_reproduce
	$(BIN)/python -m benchmarks.quantize
	$(BIN)/python -m benchmarks.mixed
	$(BIN)/python -m benchmarks.qat
	$(BIN)/python -m benchmarks.weight_only
	$(BIN)/python -m benchmarks.transformers
	$(BIN)/python -m benchmarks.data_free
	$(BIN)/python -m benchmarks.fp8
	$(BIN)/python -m benchmarks.prune
	$(BIN)/python -m benchmarks.low_rank
	$(BIN)/python -m benchmarks.detector
	$(BIN)/python -m benchmarks.robust kill bytes
	$(BIN)/python -m benchmarks.install base help fresh
	$(BIN)/python -m benchmarks.tables

docs: $(READY)
	$(BIN)/python -m benchmarks.tables

clean:
	rm -rf $(VENV) build *.egg-info demo
