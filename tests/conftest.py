"""Set before anything imports JAX: eight simulated devices for every test, one cache of compiled programs.

Processes that tests start find in the cache what others have compiled. It goes with the run, unless
JAX_COMPILATION_CACHE_DIR names a folder: then the next run need not compile again what has not changed.

Most test programs run a few times only, so XLA is told to make little effort. jaxlib 0.10 compiles without
LLVM optimisation and fusion emitters, which halves compile time. Later versions have no such flag and at
level 0 round differently by shape, so they take level 1. Setting XLA_FLAGS replaces these flags:
XLA_FLAGS=--xla_backend_optimization_level=3 is what users get.
"""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
flags = os.environ.get("XLA_FLAGS", "")
if "xla_backend_optimization_level" not in flags:
    if version("jaxlib").startswith("0.10."):
        flags += " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    else:
        flags += " --xla_backend_optimization_level=1"
os.environ["XLA_FLAGS"] = flags + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)

cache = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache-")  # encoded examples
atexit.register(shutil.rmtree, cache, ignore_errors=True)

pytest.register_assert_rewrite("decoding", "noising", "sampling")

# With the others after them, no process is left with much at the end.
LONGEST = (
    "test_train",
    "test_parity",
    "test_bench",
    "test_blocks",
    "test_launch",
    "test_convert_guide",
    "test_lora_training",
    "test_triton_attention",
    "test_sample",
    "test_readme",
    "test_evaluate",
    "test_decode",
    "test_decode_loop",
    "test_ablations",
)


def pytest_collection_modifyitems(items):
    """Files that take long come first; the rest as before."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


# What tests of several files share. What imports JAX is imported when it is asked for.


@pytest.fixture(scope="session")
def eventful():
    """The batch of slot decoding in which most happens."""
    from decoding import eventful_batch

    return eventful_batch()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a trained model."""
    from sampling import copied

    return copied(tmp_path_factory.mktemp("sample") / "model")


@pytest.fixture(scope="session")
def opened(checkpoint):
    """Its model, parameters and tokenizer."""
    from refusion_jax import load

    return load(checkpoint)


@pytest.fixture(scope="session")
def served(checkpoint, tmp_path_factory):
    """What `sample` makes of a file of requests."""
    from sampling import serve

    return serve(checkpoint, tmp_path_factory.mktemp("served"))
