"""Checksums of arrays and of checkpoints: one changed bit is found, and the checkpoint before is used."""

import json
import os
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_train import config_file  # noqa: F401 (a fixture)

from refusion_jax import sample
from refusion_jax.checkpoints import orbax_io
from refusion_jax.checkpoints.checksums import checksum, checksums
from refusion_jax.checkpoints.orbax_io import Checkpoints, Damaged
from refusion_jax.train import main

ARRAYS = {
    "float32": np.random.default_rng(0).normal(size=(8, 6, 4)).astype(np.float32),
    "bfloat16": np.arange(64, dtype=np.float32).astype(jnp.bfloat16).reshape(16, 4),
    "int8": np.arange(-64, 64, dtype=np.int8).reshape(8, 16),
    "int32": np.int32(7),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_changed_bit_changes_the_checksum(name):
    array = np.asarray(ARRAYS[name])
    for _ in range(20):
        changed = np.frombuffer(array.tobytes(), np.uint8).copy()
        changed[random.randrange(changed.size)] ^= 1 << random.randrange(8)
        changed = changed.view(array.dtype).reshape(array.shape)
        assert checksum(changed) != checksum(array) == checksum(array.copy())


def test_places_count():
    array = ARRAYS["int8"]
    assert len({checksum(array), checksum(array[::-1].copy()), checksum(array.reshape(16, 8)[::-1])}) == 3
    assert checksum(np.zeros(3, np.int8)) != checksum(np.zeros(4, np.int8))


@pytest.mark.parametrize("spec", [("a", "b"), ("b", None), (("a", "b"),), (None, "a")])
def test_every_mesh_finds_the_same(spec):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    array = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)
    spread = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    assert int(checksums({"x": spread})["x"]) == checksum(array)


# Checkpoints


def flip(step: Path, item: str, values_alone: bool = False) -> None:
    """Changes a bit in the middle of every file of an item's arrays, or of the largest, which has values."""
    files = [path for path in (step / item).rglob("*") if path.is_file() and path.parent.name == "d"]
    for path in [max(files, key=lambda path: path.stat().st_size)] if values_alone else files:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 16
        path.write_bytes(content)


TREE = {"params": {"x": jnp.asarray(np.random.default_rng(2).normal(size=(64, 64)), jnp.float32)}}


@pytest.fixture
def written(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, TREE, {"next_index": step})
    return tmp_path


def restored(folder: Path, step: int):
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), TREE)
    with Checkpoints(folder, keep=2) as checkpoints:
        return checkpoints.restore(step, abstract)


def test_a_flipped_bit_is_found(written):
    assert restored(written, 2)[1] == {"next_index": 2}
    flip(written / "checkpoints" / "2", "params", values_alone=True)
    expected = rf"{written}/checkpoints/2.*x is not what was saved.*delete {written}/checkpoints/2 to use"
    with pytest.raises(Damaged, match=expected):
        restored(written, 2)
    with pytest.raises(Damaged, match=expected):
        orbax_io.saved_params(written)["x"].whole()
    assert restored(written, 1)[1] == {"next_index": 1}


def test_a_checkpoint_of_an_older_version_has_no_checksums(written):
    path = written / "checkpoints" / "2" / "data" / "metadata"
    data = json.loads(path.read_text())
    del data["checksums"]
    path.write_text(json.dumps(data))
    np.testing.assert_array_equal(restored(written, 2)[0]["params"]["x"], TREE["params"]["x"])
    np.testing.assert_array_equal(orbax_io.saved_params(written)["x"].whole(), TREE["params"]["x"])
    shutil.rmtree(path.parent)
    np.testing.assert_array_equal(orbax_io.saved_params(written)["x"].whole(), TREE["params"]["x"])


def test_a_converted_checkpoint_is_compared_too(written, tmp_path):
    orbax_io.write_params(tmp_path / "converted", orbax_io.saved_params(written))
    assert np.isfinite(orbax_io.saved_params(tmp_path / "converted")["x"].whole()).all()
    flip(tmp_path / "converted" / "checkpoints" / "0", "params")
    with pytest.raises(Damaged):
        orbax_io.saved_params(tmp_path / "converted")["x"].whole()


@pytest.mark.parametrize("item", ["params", "optimizer"])
def test_training_uses_the_checkpoint_before(config_file, tmp_path, capsys, item):  # noqa: F811
    flags = [f"--config={config_file}", f"--workdir={tmp_path}"]
    assert main([*flags, "--config.train.steps=9"]) == 0
    newest = tmp_path / "checkpoints" / "9"
    flip(newest, item)
    if item == "params":
        assert sample.main([f"--checkpoint={tmp_path}", "--prompt=a", "--gen_length=8"]) == 2
        assert f"{newest}/params: damaged checkpoint" in capsys.readouterr().err
    capsys.readouterr()
    assert main([*flags, "--config.train.steps=12"]) == 0
    told = capsys.readouterr()
    assert "resuming from step 6 of 12" in told.out
    assert f"{newest}/{item}: damaged checkpoint" in told.err and "set aside" in told.err
    assert [name.partition("-")[0] for name in os.listdir(tmp_path / "damaged")] == ["9"]


def test_where_all_are_damaged_nothing_is_lost(config_file, tmp_path, capsys):  # noqa: F811
    flags = [f"--config={config_file}", f"--workdir={tmp_path}", "--config.train.steps=3"]
    assert main(flags) == 0
    flip(tmp_path / "checkpoints" / "3", "params", values_alone=True)
    assert main([*flags[:2], "--config.train.steps=6"]) == 2
    assert "damaged checkpoint" in capsys.readouterr().err
    assert os.listdir(tmp_path / "checkpoints") == ["3"]
