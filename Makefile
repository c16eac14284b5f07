# Every command makes the environment first where it is missing; PYTHON, DETECTRON2 and VENV are explained in
# tools/setup_env.sh.
PYTHON ?= python3
DETECTRON2 ?=
VENV ?= .venv
VENV_MAIN ?= .venv-main
ARGS ?=
WORKERS ?= 2

BIN = $(VENV)/bin
export PYTHON DETECTRON2
# Threads that wait by spinning take the core from the one they wait for: several times slower on shared cores.
export OMP_WAIT_POLICY ?= PASSIVE
# detectron2 is told about torch.jit at import, before any of our code runs.
QUIET = -W ignore::FutureWarning
# A file's tests stay in one process, which makes a module's fixtures once; the longest files start first.
PYTEST = python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help env test test-main detectron2-tests check format demo demo-real bench soak docker clean

help:
	@echo 'make env        make the environment in $(VENV) (the other commands do it too)'
	@echo 'make demo       the main job on drawn scenes of handwritten digits; results in output/demo/'
	@echo 'make demo-real  the same on real photographs, from the folder that D2HA_REAL names'
	@echo 'make test       run the tests in WORKERS processes (2); ARGS="-k name" chooses'
	@echo 'make detectron2-tests  the unit tests of D2HA_DETECTRON2_SRC, on stock and under d2-headadapt run'
	@echo 'make test-main  build D2HA_DETECTRON2_SRC (a source tree or git directory) in $(VENV_MAIN), and run both there'
	@echo 'make check      ruff and mypy'
	@echo 'make format     let ruff rewrite the files'
	@echo 'make bench      measure speed'
	@echo 'make soak       long random runs'
	@echo 'make docker     build the image of docker/Dockerfile and check it (docker, podman, or buildah as root; 25 GB of disk)'
	@echo 'make clean      delete caches and output/ (the environment stays)'
	@echo 'PYTHON=...      the interpreter to build the environment on; with DETECTRON2=git detectron2 is built from source'

env:
	@VENV='$(abspath $(VENV))' bash tools/setup_env.sh

test: env
	$(BIN)/$(PYTEST) $(ARGS)

detectron2-tests: env
	$(BIN)/python tools/detectron2_tests.py $(ARGS)

# An environment of its own: compiled operators, and a newer numpy than the wheel takes.
test-main:
ifeq ($(strip $(D2HA_DETECTRON2_SRC)),)
	@echo 'test-main: not run, because D2HA_DETECTRON2_SRC names no source of detectron2'
else
	@VENV='$(abspath $(VENV_MAIN))' DETECTRON2=git DETECTRON2_REPO='$(abspath $(D2HA_DETECTRON2_SRC))' \
		bash tools/setup_env.sh
	$(VENV_MAIN)/bin/python tools/detectron2_tests.py
	$(VENV_MAIN)/bin/$(PYTEST) --deselect tests/cli/test_run_detectron2.py::test_what_passes_on_stock_passes_under_run $(ARGS)
endif

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: env
	$(BIN)/python $(QUIET) tools/demo.py $(ARGS)

demo-real: env
	$(BIN)/python $(QUIET) tools/demo_real.py $(ARGS)

bench: env
	$(BIN)/python tools/bench.py $(ARGS)

soak: env
	$(BIN)/python tools/soak.py $(ARGS)

# Needs no environment.
docker:
	bash docker/build.sh $(ARGS)

clean:
	rm -rf output .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
