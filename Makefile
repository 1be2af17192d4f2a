# Every target makes the environment that it needs, once: `make help` lists them.
# PYTHON names the interpreter to make it with, VENV the folder to make it in.
PYTHON ?= python3
VENV   ?= .venv

# A small build for CPUs in most places; the tests that compare with a framework run where it is installed. These are the
# versions tested; all but the first line need Python 3.11.
FRAMEWORKS = torch==2.13.0 expecttest onnx==1.23.2 'dask[array]==2026.8.0' $(foreach p, \
  onnxruntime==1.31.1 jax==0.10.2 flax==0.12.8 equinox==0.13.8 keras==3.15.1 tensorflow-cpu==2.21.0, '$(p); python_version >= "3.11"')
# Kernels for GPUs are compiled, and their machine code looked at, without a GPU; these are most of what is installed.
LINUX = sys_platform == "linux" and python_version >= "3.11"
CUDA = 'numba-cuda[cu13]>=0.28,<1; $(LINUX)' 'nvidia-cuda-nvdisasm>=13,<14; $(LINUX)'

# Linkers for every system, of the machine code that a wheel carries.
LINKERS = 'ziglang>=0.13'

# What `make bench` measures, each merged into benchmarks/results/<machine>.json.
SUITE = compare limits growth memory start disturbed training

BIN = $(VENV)/bin
TESTS = $(BIN)/python -m pytest tests benchmarks --benchmark-disable
# On every core, and then alone what measures time or wants every core; 5 says that ARGS has left nothing to run.
RUN_TESTS = { $(TESTS) -n auto --maxprocesses 8 --dist worksteal $(SHOW) $(ARGS) || [ $$? = 5 ]; } && \
            { $(TESTS) -m serial $(SHOW) $(ARGS) || [ $$? = 5 ]; }
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input

.PHONY: help demo examples test test-all test-gpu test-arm bench bench-gpu bench-layers bench-report check wheel clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## train a character-level language model on Python's own sources and let it write (about a minute)
	@$(BIN)/python -m fastrnn demo

examples: $(VENV)/.test-all ## run every example and write the table in examples/README.md (ARGS=--quick: small runs, nothing written)
	@$(BIN)/python examples/run.py $(ARGS)

test: $(VENV)/.test ## run the tests, those with many cases by a sample of them (FASTRNN_TEST_SEED chooses it)
	@$(RUN_TESTS)

test-all: SHOW = -rs
test-all: $(VENV)/.test-all ## run all cases of the tests, with every optional package: PyTorch, ONNX Runtime, JAX, numba-cuda, matplotlib, safetensors
	@export FASTRNN_TEST_ALL=1 FASTRNN_FUZZ_SECONDS=30; $(RUN_TESTS)

test-gpu: $(VENV)/.test-all ## run the tests that need an NVIDIA GPU
	@$(BIN)/python -m pytest tests -m gpu -rs $(ARGS)

test-arm: $(VENV)/.test ## run a few tests on an emulated 64-bit ARM processor, on Linux with apt (ARGS=tests/test_kernels.py: those)
	@VENV=$(VENV) tests/arm.sh $(ARGS)

bench: $(VENV)/.test-all ## measure everything, beside PyTorch, ONNX Runtime and JAX (half an hour; ARGS=--quick: 3 minutes)
	@for script in $(SUITE); do $(BIN)/python benchmarks/$$script.py $(ARGS) || exit; done

bench-gpu: $(VENV)/.test-all ## measure an NVIDIA GPU, beside cuDNN (ARGS='--limit-seconds 500', or --quick)
	@for script in gpu_limits gpu; do $(BIN)/python benchmarks/$$script.py $(ARGS) || exit; done

bench-layers: $(VENV)/.test-all ## time the layers with pytest-benchmark, in one process (ARGS=--quick for a few shapes)
	@$(BIN)/python -m pytest benchmarks --benchmark-sort=name --benchmark-columns=median,iqr,rounds $(ARGS)

bench-report: $(VENV)/.test-all ## write the README's figures, benchmarks/RESULTS.md and the pictures from the results
	@$(BIN)/python benchmarks/pictures.py
	@$(BIN)/python benchmarks/report.py

check: $(VENV)/.check ## lint, formatting and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

wheel: $(VENV)/.wheel ## make the wheel, with machine code for x86-64-v3, x86-64-v4 and 64-bit ARM (some minutes), in dist/
	@FASTRNN_SHIPPED=0 $(BIN)/python -m fastrnn.kernels.shipped.build $(ARGS)
	@$(PIP) --upgrade pip && $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls -l dist/*.whl

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) build dist kernels/shipped/*.so kernels/shipped/*.dylib kernels/shipped/manifest.json *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find fastrnn kernels tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

# One stamp for each set of packages: newer than pyproject.toml means that it is installed.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'fastrnn needs Python 3.10 or later. Name one: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip --version >/dev/null || \
	  { echo '$(PYTHON) cannot make an environment with pip in $(VENV). On Debian and Ubuntu: apt install python3-venv.' >&2; exit 1; }
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml
	@echo 'Installing fastrnn into $(VENV) (once)'
	@$(PIP) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.installed
	@echo 'Installing what the tests need into $(VENV) (once)'
	@$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.test-all: $(VENV)/.test
	@echo 'Installing the optional packages into $(VENV) (once)'
	@$(PIP) --editable '.[test,bench,examples,safetensors]' $(FRAMEWORKS) $(CUDA) $(LINKERS)
	@touch $@

$(VENV)/.wheel: $(VENV)/.installed
	@echo 'Installing linkers into $(VENV) (once)'
	@$(PIP) $(LINKERS)
	@touch $@

$(VENV)/.check: $(VENV)/.installed
	@echo 'Installing the checkers into $(VENV) (once)'
	@$(PIP) --editable '.[check]'
	@touch $@
