# make demo    train a small KW Mask R-CNN on drawn shapes, evaluate it and draw its detections
# make app     a page to try networks and detectors on images of one's own
# make test    run the tests
# All set up by themselves, once: virtual environment, torch, timm, MMDetection 2.x (and 3.x beside it), this package.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# What all need of it, and what the demo needs.
READY_BASE := $(VENV)/.ready-base
READY_DEMO := $(VENV)/.ready-demo
# Further environments that hold only what differs, over the packages of the first one.
VENV3 := .venv3
READY3 := $(VENV3)/.ready
READY3_TEST := $(VENV3)/.ready-test
VENV_PACKAGES := .venv-packages
READY_PACKAGES := $(VENV_PACKAGES)/.ready
VENV_APP := .venv-app
READY_APP := $(VENV_APP)/.ready
READY_APP_TEST := $(VENV_APP)/.ready-test
VENV_FULL := .venv-full
READY_FULL := $(VENV_FULL)/.ready
VENV_DOCS := .venv-docs
READY_DOCS := $(VENV_DOCS)/.ready
# And one of its own, as `pip install '.[onedl]'` makes it.
VENV_ONEDL := .venv-onedl
READY_ONEDL := $(VENV_ONEDL)/.ready

# What holds under either generation of MMDetection, run again under 3.x.
DETECTION := $(addprefix tests/test_,framework.py mmdet_backbone.py detection_golden.py mmdet_checks.py \
	mmdet_temperature.py mmengine_temperature.py tools.py)

.DELETE_ON_ERROR:
.PHONY: demo app test test-mmdet3 test-slow test-packages test-app test-onedl test-mmcv-full lint docs dist setup setup3 clean

# So that the demo can say how long set-up took.
demo: export MAKE_BEGAN := $(shell date +%s)
ifeq ($(STACK),3)
demo: $(READY3)
	$(VENV3)/bin/python tools/demo.py
else
demo: $(READY_DEMO)
	$(BIN)/python tools/demo.py
endif

# KW_APP_CHECKPOINT and KW_APP_CONFIG name a detector; see hub/space/README.md.
app: $(READY_APP)
	$(VENV_APP)/bin/python hub/space/app.py

test: $(READY) $(READY3)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Detection under 3.x, and MMPreTrain; what compares the generations, or takes two processes of each, is in the run above.
test-mmdet3: $(READY) $(READY3_TEST)
	$(VENV3)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(DETECTION) tests/test_mmpretrain.py \
		-k 'not demo_end_to_end'

test-slow: $(READY) $(READY3)
	$(BIN)/python -m pytest -m slow
	$(VENV3)/bin/python -m pytest tests/test_tools.py -k demo_end_to_end

# Detection with compiled mmcv; compiles it, once.
test-mmcv-full: $(READY_FULL)
	$(VENV_FULL)/bin/python -m pytest -m 'not slow' tests/test_mmcv_operators.py tests/test_mmdet_backbone.py

# KW networks in Lightning, Accelerate, Transformers and the like.
test-packages: $(READY_PACKAGES)
	$(VENV_PACKAGES)/bin/python -m pytest -m packages tests/test_packages.py tests/test_examples.py

# The page, and in a browser: chromium, which is the system's. Without it, those tests are skipped.
test-app: $(READY) $(READY_APP_TEST)
	$(VENV_APP)/bin/python -m pytest -m app tests/test_app.py

# Detection with the maintained continuation of MMDetection 3.x.
test-onedl: $(READY_ONEDL)
	$(VENV_ONEDL)/bin/python -m pytest -n 2 --dist loadfile $(DETECTION)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in `site/`; what is missing or wrong in it fails. Newer releases of its builder advertise another one.
docs: $(READY_DOCS)
	NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/python -m mkdocs build --strict

# What is released, in `dist/`, checked.
dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

setup: $(READY)

setup3: $(READY3)

$(READY_BASE): pyproject.toml build-constraints.txt $(wildcard kw_timm/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 is needed: install it, or name it with make PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile torch torchvision opencv-python-headless wheel -r build-constraints.txt
	$(BIN)/python -m pip install --no-compile --no-build-isolation -e '.[detection]'
	-$(BIN)/python -m compileall -q -j 0 $(VENV)/lib  # as pip does, on all cores
	touch $@

# From here on only what the extras name. mmcv 1.7.2 is built without isolation: its setup.py needs an old setuptools,
# and asks for OpenCV if it finds none.
$(READY_DEMO): $(READY_BASE)
	$(BIN)/python -m pip install --no-compile --no-build-isolation 'kw-timm[mmdet]'
	-$(BIN)/python -m compileall -q -j 0 $(VENV)/lib
	touch $@

$(READY): $(READY_DEMO)
	$(BIN)/python -m pip install --no-compile 'kw-timm[mmdet,test,dev]'
	-$(BIN)/python -m compileall -q -j 0 $(VENV)/lib
	touch $@

# What an extra names, over the first environment.
define install_extra
bash tools/overlay.sh $(1) $(VENV)
$(BIN)/python -c 'import sys, tomllib; project = tomllib.load(sys.stdin.buffer)["project"]; \
	print(*project["optional-dependencies"]["$(2)"], sep="\n")' < pyproject.toml > $(1)/requirements.txt
$(1)/bin/python -m pip install -r $(1)/requirements.txt
endef

# mmcv-lite asks for an OpenCV that needs a display; the one of the first environment does.
$(READY3): $(READY_BASE) tools/overlay.sh
	$(call install_extra,$(VENV3),mmdet3)
	$(VENV3)/bin/python -m pip uninstall -y opencv-python
	touch $@

$(READY3_TEST): $(READY3)
	$(VENV3)/bin/python -m pip install 'kw-timm[mmpretrain]'
	$(VENV3)/bin/python -m pip uninstall -y opencv-python
	touch $@

$(READY_PACKAGES): $(READY) tools/overlay.sh
	$(call install_extra,$(VENV_PACKAGES),packages)
	touch $@

$(READY_APP): $(READY_DEMO) tools/overlay.sh
	$(call install_extra,$(VENV_APP),app)
	touch $@

$(READY_APP_TEST): $(READY_APP)
	$(VENV_APP)/bin/python -m pip install 'kw-timm[app-test]'
	touch $@

$(READY_DOCS): $(READY_BASE) tools/overlay.sh
	$(call install_extra,$(VENV_DOCS),docs)
	touch $@

$(READY_FULL): $(READY) tools/overlay.sh tools/mmcv_full.sh
	bash tools/overlay.sh $(VENV_FULL) $(VENV)
	bash tools/mmcv_full.sh $(VENV_FULL)/bin/python
	touch $@

$(READY_ONEDL): pyproject.toml
	$(PYTHON) -m venv --clear $(VENV_ONEDL)
	$(VENV_ONEDL)/bin/python -m pip install -e '.[onedl,test]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV3) $(VENV_DOCS) site dist $(VENV_PACKAGES) $(VENV_APP) $(VENV_ONEDL) $(VENV_FULL) work_dirs build *.egg-info kw_timm/*.so
