"""Set before anything imports JAX: eight simulated devices for every test, one cache of compiled programs.

Processes that tests start find in the cache what others have compiled. It goes with the run, unless
JAX_COMPILATION_CACHE_DIR names a folder: then the next run need not compile again what has not changed.
"""

import atexit
import os
import shutil
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)

pytest.register_assert_rewrite("decoding", "sampling")


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
