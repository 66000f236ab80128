"""A checkpoint of any mesh is restored on any other, bit for bit."""

import itertools
from pathlib import Path

import pytest
from killing import Victim
from test_launch import CONFIG
from test_soak_disks import command

from refusion_jax import train
from refusion_jax.checkpoints import orbax_io

MESHES = {
    "1": (1, 1, 1),
    "data 8": (8, 1, 1),
    "fsdp 8": (1, 8, 1),
    "2 x 2 x 2": (2, 2, 2),
    "2 processes": (1, 2, 1),
}
ALONE = ("1", "2 processes")  # not in this process, which has 8 devices
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """Sizes that every mesh divides."""
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(
        CONFIG.replace("ModelConfig(260, 1, 16, 2, 1, 8, 32)", "ModelConfig(264, 1, 16, 2, 2, 8, 32)")
    )
    return path


def trained(config_file: Path, folder: Path, mesh: str, dtype: str, steps: int) -> str:
    """Runs training to `steps` on a mesh, in this process or in two; returns what it printed."""
    axes = zip(("data", "fsdp", "tensor"), MESHES[mesh], strict=True)
    flags = [f"--config={config_file}", f"--workdir={folder}", f"--config.train.dtype={dtype}"]
    flags += [f"--config.train.steps={steps}", *(f"--config.mesh.{axis}={size}" for axis, size in axes)]
    if mesh in ALONE:
        victim = Victim(2 if mesh == "2 processes" else 1, *flags)
        text, code = victim.end(), victim.process.returncode
    else:
        code, out, err = command(train.main, *flags)
        text = out + err
    assert code == 0, text
    return text


PAIRS = list(itertools.product(MESHES, MESHES))
QUICK = [("fsdp 8", "2 x 2 x 2"), ("data 8", "fsdp 8")]


@pytest.fixture(scope="module")
def saved(config_file, tmp_path_factory):
    """saved(mesh, dtype): the folder of a run of 3 steps, made once."""
    made = {}

    def of(mesh: str, dtype: str) -> Path:
        if (mesh, dtype) not in made:
            made[mesh, dtype] = tmp_path_factory.mktemp("saved")
            trained(config_file, made[mesh, dtype], mesh, dtype, 3)
        return made[mesh, dtype]

    return of


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("before", "after"),
    [pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.soak) for pair in PAIRS],
)
def test_restored_on_another_mesh(before, after, dtype, saved, config_file):
    """Restoring compares the checksum of every array with the saved one; it does not depend on the mesh."""
    if dtype == "bfloat16" and (before, after) in QUICK[1:]:
        pytest.skip("as in float32")
    folder = saved(before, dtype)
    text = trained(config_file, folder, after, dtype, 3)
    assert "resuming from step 3 of 3" in text and "set aside" not in text
    assert orbax_io._read_checksums(folder / orbax_io.FOLDER / "3")
