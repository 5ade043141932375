# Every target works alone on a machine with g++, make and Python 3.10 to 3.13 (with venv): it makes .venv, installs
# torch and builds the package there first, and a second run reuses what stands. `make help` lists the targets.

TORCH ?= torch==2.13.0
OTHER_TORCH ?= torch==2.14.1
TRITON ?= triton==3.9.0
EFFKERN_CUDA ?= auto
VENV ?= .venv
# CIFAR-10 as docs/training.md describes it, and a trained ResNet-32 to fine-tune on it, for `make experiments`.
CIFAR10 ?= data/cifar10.npz
WEIGHTS ?=
# The first interpreter that really runs (a version manager's shim may exist and only print an error) and has venv.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do \
    $$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
        >/dev/null 2>&1 && { echo $$p; break; }; done)

BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install -q --disable-pip-version-check
NATIVE := $(shell find csrc -type f -not -path 'csrc/tests/*' 2>/dev/null)
export EFFKERN_CUDA

.DEFAULT_GOAL := help
.PHONY: help demo experiments test test-fast test-gpu-proof gpu-check gpu-bench bench lint format clean test-other-torch FORCE
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-20s%s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: TORCH=$(TORCH)  EFFKERN_CUDA=$(EFFKERN_CUDA) (auto, 0, 1)  PYTHON=  VENV=$(VENV)"

demo: $(VENV)/.built ## train on real images, run all four ops, write runs/demo/report.html
	$(BIN)/effkern demo $(DEMO_ARGS)

experiments: $(VENV)/.tested ## train and measure what docs/experiments shows (a night; goes on after a stop)
	$(BIN)/python -m experiments.stochastic_depth $(EXPERIMENT_ARGS)
	$(BIN)/python -m experiments.dsnet $(EXPERIMENT_ARGS)
	$(BIN)/python -m experiments.dsnet --data 'cifar10:$(CIFAR10)' $(EXPERIMENT_ARGS)
	$(BIN)/python -m experiments.blockdrop --data 'cifar10:$(CIFAR10)' --weights '$(WEIGHTS)' $(EXPERIMENT_ARGS)

test: $(VENV)/.tested ## build, then all tests of Python and C++
	$(BIN)/python -m pytest -q $(TEST_ARGS)

test-fast: $(VENV)/.tested ## the tests without the slow ones
	$(BIN)/python -m pytest -q -m "not slow" $(TEST_ARGS)

test-gpu-proof: $(VENV)/.tested $(VENV)/.gpu-tools ## prove the CUDA and Triton kernels without a GPU: schedules, mutants, every target (docs/gpu.md)
	$(BIN)/python -m pytest -q -s -rs -p no:cacheprovider tests/gpu/proof_*.py $(TEST_ARGS)

gpu-check: $(VENV)/.tested ## run every CUDA op on the GPU against the CPU; says so where there is none
	$(BIN)/python -m tests.gpu.check $(CHECK_ARGS)

gpu-bench: $(VENV)/.tested ## time the CUDA ops against cuDNN and torch.compile; says so where there is no GPU
	$(BIN)/python -m benchmarks.gpu $(BENCH_ARGS)

bench: $(VENV)/.peers ## time everything against PyTorch and the engines that can be installed (40 minutes), then plot
	$(BIN)/python -m benchmarks.run_all $(BENCH_ARGS)

lint: $(VENV)/.linters ## ruff, mypy and clang-format, all checking only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -print0 \
	    | xargs -0 $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.linters ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check -q --fix .
	$(BIN)/ruff format -q .
	find csrc \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -print0 \
	    | xargs -0 $(BIN)/clang-format -i

test-other-torch: $(VENV)/.built ## one wheel, built here, tested on OTHER_TORCH without a rebuild
	rm -rf build/other && mkdir -p build/other
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w build/other .
	$(BIN)/python -m venv build/other/venv
	build/other/venv/bin/python -m pip install -q '$(OTHER_TORCH)' pytest hypothesis build/other/*.whl
	cp -r tests build/other/tests
	cd build/other && venv/bin/python -m effkern.info && venv/bin/python -m pytest -q -p no:cacheprovider -m "not slow" tests/ops

clean: ## remove .venv and everything built; results under runs/ stay
	rm -rf $(VENV) build dist effkern.egg-info effkern/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.13 with venv found; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Holds the choices made last; it changes, and so what follows runs again, only when a choice changes.
$(VENV)/.choices: FORCE | $(BIN)/python
	@echo '$(TORCH) EFFKERN_CUDA=$(EFFKERN_CUDA)' | cmp -s - $@ || echo '$(TORCH) EFFKERN_CUDA=$(EFFKERN_CUDA)' > $@

$(VENV)/.torch: $(VENV)/.choices
	$(BIN)/python -m pip install --disable-pip-version-check '$(TORCH)' numpy 'setuptools>=77' wheel 'pybind11>=2.12' ninja
	@touch $@

# pip shows nothing of a build, so what it wrote is kept and the one line about CUDA repeated. After a change in csrc
# alone only the changed files are compiled.
$(VENV)/.built: $(NATIVE) setup.py pyproject.toml effkern/_version.py $(VENV)/.torch
	@echo "building effkern (a minute or two; with nvcc up to four; written to $(VENV)/build.log)"
	@$(if $(filter-out csrc/%,$?),\
	    $(BIN)/python -m pip install -v --no-build-isolation --disable-pip-version-check -e .,\
	    $(BIN)/python setup.py build_ext --inplace) > $(VENV)/build.log 2>&1 \
	    || { tail -n 60 $(VENV)/build.log; echo "the build failed; all of it is in $(VENV)/build.log" >&2; exit 1; }
	@grep -h -o -m 1 'effkern: .*CUDA.*' $(VENV)/build.log || true
	@touch $@

$(VENV)/.tested: $(VENV)/.built pyproject.toml
	$(PIP) pytest hypothesis scikit-learn pillow
	$(PIP) '$(TRITON)' || echo "$(TRITON) could not be installed: the tests of the Triton kernels are skipped" >&2
	@touch $@

$(VENV)/.linters: pyproject.toml | $(BIN)/python
	$(PIP) ruff mypy clang-format
	@touch $@

# One by one: an engine that has no wheel for this machine is reported by the benchmark and must not stop the others.
$(VENV)/.peers: $(VENV)/.built
	for peer in onnx onnxruntime openvino ncnn pnnx MNN; do $(PIP) $$peer || echo "$$peer could not be installed" >&2; done
	@touch $@

# Reads machine code. Without it, or without nvcc, the static checks are skipped and say so.
$(VENV)/.gpu-tools: $(VENV)/.tested
	$(PIP) nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm || echo "cuobjdump and nvdisasm could not be installed" >&2
	@touch $@

FORCE:
