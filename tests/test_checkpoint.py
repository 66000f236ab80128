"""Saving and restoring on 8 simulated devices, and the errors for damaged or other checkpoints."""

import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from whole_params import restore_params

from refusion_jax.checkpoints import orbax_io as checkpoint
from refusion_jax.checkpoints.orbax_io import Checkpoints
from refusion_jax.errors import BadInput
from refusion_jax.sharding import MeshConfig, make_mesh
from refusion_jax.training.signals import Preemption

OPTIMIZER = optax.adamw(1e-3)


def spread(tree, *sizes, axes=("fsdp", "tensor")):
    """The tree with its matrices sharded over a mesh of these sizes, all else replicated."""
    mesh = make_mesh(MeshConfig(*sizes))
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, P(*axes) if x.ndim == 2 else P())), tree
    )


def trees(seed: int = 0, width: int = 256):
    params = {"a": {"kernel": jax.random.normal(jax.random.key(seed), (16, width))}, "scale": jnp.ones(4)}
    return {"params": params, "optimizer": (jnp.int32(seed), OPTIMIZER.init(params))}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder with the checkpoints of steps 3 and 7."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(3, spread(trees(3), 2, 2, 2), {"next_index": 3})
        checkpoints.save(7, spread(trees(7), 2, 2, 2), {"next_index": 7})
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_restores_the_same_bits_on_another_mesh(saved):
    for sizes in [(2, 2, 2), (1, 4, 2), (8, 1, 1)]:
        wanted = spread(trees(7), *sizes, axes=("tensor", "fsdp"))
        with Checkpoints(saved, keep=2) as checkpoints:
            assert checkpoints.latest_step() == 7
            found, data = checkpoints.restore(7, abstract(wanted))
        assert_same(found, wanted)
        assert data == {"next_index": 7}
        assert found["params"]["a"]["kernel"].sharding == wanted["params"]["a"]["kernel"].sharding


def test_parameters_alone(saved):
    wanted = trees(7)["params"]
    assert checkpoint.latest_step(saved) == 7
    shapes = checkpoint.saved_params(saved)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), wanted
    )
    assert_same(restore_params(saved, abstract(spread(wanted, 1, 2, 4))), wanted)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wanted)
    assert_same(restore_params(saved, abstract(half)), half)


def test_keeps_the_newest(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, trees(step), {})
        checkpoints.finish()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["4", "5"]


def test_a_save_is_not_touched_by_what_follows(tmp_path):
    """Training continues in the same buffers while a checkpoint is written."""
    state = spread(jnp.arange(2.0**20).reshape(2**10, -1), 2, 2, 2)
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in range(4):
            checkpoints.save(step, {"params": {"x": state}}, {})
            state = overwrite(state)
            jax.block_until_ready(state)
            state = jax.jit(lambda x, step: jnp.full_like(x, step), donate_argnums=0)(state, step + 1.0)
    restored = restore_params(tmp_path, {"x": jax.ShapeDtypeStruct((2**10, 2**10), jnp.float32)})
    np.testing.assert_array_equal(restored["x"], 3.0)


def test_half_written_and_half_deleted_checkpoints_are_not_there(copy):
    folder = copy / "checkpoints"
    shutil.copytree(folder / "7", folder / "9.orbax-checkpoint-tmp")
    shutil.copytree(folder / "7", folder / ".outdated" / "8")
    shutil.copytree(folder / "7", folder / ".outdated-123" / "8")
    assert checkpoint.latest_step(copy) == 7
    with Checkpoints(copy, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 7
        checkpoints.save(8, trees(8), {})
        checkpoints.finish()
    assert sorted(os.listdir(folder)) == ["7", "8"]


def test_no_checkpoint(tmp_path):
    assert checkpoint.latest_step(tmp_path) is None
    for read in (checkpoint.saved_params, lambda folder: restore_params(folder, {})):
        with pytest.raises(BadInput, match=f"{tmp_path}.*no checkpoint"):
            read(tmp_path)


DAMAGE = {
    "cut short": lambda folder: [
        os.truncate(path, path.stat().st_size // 2) for path in folder.glob("params/**/d/*")
    ],
    "arrays cut short": lambda folder: [
        os.truncate(path, 10) for path in folder.glob("params/ocdbt.process_0/d/*")
    ],
    "no data": lambda folder: [path.unlink() for path in folder.glob("params/d/*")],
    "no params": lambda folder: shutil.rmtree(folder / "params"),
    "bad metadata": lambda folder: (folder / "params" / "_METADATA").write_text("{"),
    "no manifest": lambda folder: (folder / "params" / "manifest.ocdbt").unlink(),
    "empty": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from Orbax's other reads
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(copy, damage):
    DAMAGE[damage](copy / "checkpoints" / "7")
    wanted = trees(7)
    with Checkpoints(copy, keep=2) as checkpoints, pytest.raises(BadInput, match=f"{copy}/checkpoints/7"):
        checkpoints.restore(7, abstract(wanted))
    with pytest.raises(BadInput, match=f"{copy}/checkpoints/7"):
        restore_params(copy, abstract(wanted["params"]))


@pytest.mark.parametrize("item", ["optimizer", "data"])
def test_training_needs_all_of_a_checkpoint_and_sampling_its_parameters(copy, item):
    shutil.rmtree(copy / "checkpoints" / "7" / item)
    wanted = trees(7)
    with Checkpoints(copy, keep=2) as checkpoints, pytest.raises(BadInput, match=f"{copy}/checkpoints/7"):
        checkpoints.restore(7, abstract(wanted))
    assert_same(restore_params(copy, abstract(wanted["params"])), wanted["params"])


def test_another_models_checkpoint(saved):
    other = trees(7, width=96)
    with (
        Checkpoints(saved, keep=2) as checkpoints,
        pytest.raises(BadInput, match=r"a/kernel.*16, 256.*16, 96"),
    ):
        checkpoints.restore(7, abstract(other))
    other["params"]["more"] = jnp.ones(2)
    del other["params"]["a"]
    with pytest.raises(BadInput, match="more is missing"):
        restore_params(saved, abstract(other["params"]))
    del other["params"]["more"]
    with pytest.raises(BadInput, match=r"a/kernel is \(16, 256\)"):
        restore_params(saved, abstract(other["params"]))


def test_sigterm_is_noted_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert not preemption.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached(1)
    assert signal.getsignal(signal.SIGTERM) is before
