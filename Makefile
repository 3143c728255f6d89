# make demo    train a small KW Mask R-CNN on drawn shapes, evaluate it and draw its detections
# make test    run the tests
# Both set up by themselves, once: virtual environment, torch, timm, compiled mmcv-full, MMDetection, this package.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DELETE_ON_ERROR:
.PHONY: demo test test-slow lint setup clean

# So that the demo can say how long set-up took.
demo: export MAKE_BEGAN := $(shell date +%s)
demo: $(READY)
	$(BIN)/python tools/demo.py

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(READY)

$(READY): pyproject.toml tools/install_mmcv.py $(wildcard kw_timm/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 is needed: install it, or name it with make PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install torch torchvision
	$(BIN)/python tools/install_mmcv.py
	$(BIN)/python -m pip install -e '.[mmdet,test,dev]'
	touch $@

clean:
	rm -rf $(VENV) work_dirs build *.egg-info kw_timm/*.so
