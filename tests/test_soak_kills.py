"""Runs that are killed at random moments end with the bits of an undisturbed run."""

import collections
import random
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from killing import Victim
from test_buckets import bucket, config_file  # noqa: F401 (fixtures)

from refusion_jax.buckets import files_below, is_remote, location
from refusion_jax.checkpoints import orbax_io

FLAGS = (
    *("--config.train.steps=40", "--config.train.save_every=2", "--config.train.keep=2"),
    *("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.data.workers=1"),
)


def params(folder: Path) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(orbax_io.saved_params(folder))[0]
    return {jax.tree_util.keystr(key): leaf.whole() for key, leaf in leaves}


def rows(folder: Path) -> list[list[str]]:
    """Columns of metrics.csv that do not depend on time."""
    return [line.split(",")[:7] for line in (folder / "metrics.csv").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(config_file, tmp_path_factory):  # noqa: F811
    """(folder, seconds) of a run that nobody kills."""
    folder = tmp_path_factory.mktemp("undisturbed")
    start = time.monotonic()
    text = Victim(1, f"--config={config_file}", f"--workdir={folder}", *FLAGS, devices=2).end()
    assert orbax_io.latest_step(folder) == 40, text
    return folder, time.monotonic() - start


def assert_undisturbed(folder: Path, wanted: Path, text: str) -> None:
    assert rows(folder) == rows(wanted), text
    found = params(folder)
    for name, array in params(wanted).items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    names = [path.name for path in (folder / orbax_io.FOLDER).iterdir()]
    assert sorted(names) == ["38", "40"]
    assert not [path for path in files_below(folder) if "tmp" in str(path.relative_to(folder))]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("place", ["local", "bucket"])
@pytest.mark.parametrize("kills", [1, pytest.param(13, marks=pytest.mark.soak)])
def test_kills(kills, place, processes, undisturbed, config_file, request, tmp_path):  # noqa: F811
    """A run that ends between two kills is compared, and the next one begins in a new folder."""
    if kills == 1 and (place, processes) != ("local", 1):
        pytest.skip("left to make soak")
    wanted, seconds = undisturbed
    base = (
        location(f"{request.getfixturevalue('bucket')}/kills{processes}") if place == "bucket" else tmp_path
    )
    chance, seen, ended = random.Random(f"{place} {processes}"), collections.Counter(), 0
    text = ""
    while True:
        folder = base / f"run{ended}"
        flags = [f"--config={config_file}", f"--workdir={folder}", *FLAGS]
        victim = Victim(processes, *flags, devices=2 // processes)
        killed = sum(seen.values()) < kills and victim.kill_one(chance.uniform(0.5, 1.3 * seconds), chance)
        text = victim.end()
        if killed:
            seen[moment(folder, text)] += 1
        elif orbax_io.latest_step(folder) == 40:
            assert victim.process.returncode == 0, text
            assert_undisturbed(folder, wanted, text)
            ended += 1
            if sum(seen.values()) == kills:
                break
        else:
            assert victim.process.returncode != 0 and killed, text
    print(f"\n{kills} kills, {place}, {processes} processes: {dict(seen)}; {ended} runs, all bit-equal")


def moment(folder: Path, text: str) -> str:
    """What a run was doing when it was killed."""
    if "\nstep " not in text:
        return "start-up"
    steps = (folder / orbax_io.FOLDER).iterdir()
    if is_remote(folder):
        is_saving = any(not (step / orbax_io.MARKER).exists() for step in steps)
    else:
        is_saving = any("tmp" in step.name for step in steps)
    return "saving" if is_saving else "steps"
