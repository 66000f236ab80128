"""Damage at every file of a checkpoint, disks that are full, folders that cannot be written."""

import collections
import contextlib
import io
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from killing import Victim
from test_launch import CONFIG
from test_soak_kills import params, rows

from refusion_jax import sample, train
from refusion_jax.checkpoints import orbax_io

STEPS = ("--config.train.steps=6", "--config.train.keep=2")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
    """A run with checkpoints of the steps 3 and 6."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train.main([f"--config={config_file}", f"--workdir={folder}", *STEPS]) == 0
    return folder


def command(main, *arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def answer(folder: Path) -> tuple[int, str, str]:
    flags = ("--prompt=a=1", "--gen_length=8", "--slot_size=4", "--num_blocks=1", "--dtype=float32")
    return command(sample.main, f"--checkpoint={folder}", *flags)


def remove(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [remove, flip, cut])
@pytest.mark.parametrize("most", [1, pytest.param(1000, marks=pytest.mark.soak)])
def test_damage_at_every_file(most, damage, config_file, finished, tmp_path):
    """Training ends with the bits of the undisturbed run. Sampling answers as before, or names the damage."""
    _, wanted, _ = answer(finished)
    step = finished / orbax_io.FOLDER / "6"
    files = sorted(path.relative_to(finished) for path in step.rglob("*") if path.is_file())
    seen = collections.Counter()
    for number, file in enumerate(random.Random(0).sample(files, min(most, len(files)))):
        folder = tmp_path / str(number)
        shutil.copytree(finished, folder)
        damage(folder / file)
        code, out, err = answer(folder)
        assert (code, out) == (0, wanted) or (code == 2 and "6" in err and err.count("\n") == 1), (file, err)
        seen["sample refuses" if code else "sample answers as before"] += 1
        code, out, err = command(train.main, f"--config={config_file}", f"--workdir={folder}", *STEPS)
        assert code == 0, (file, err)
        assert rows(folder) == rows(finished), file
        for name, array in params(finished).items():
            assert (params(folder)[name] == array).all(), (file, name)
        seen["set aside" if "set aside" in err else "restored"] += 1
        shutil.rmtree(folder)
    print(f"\n{damage.__name__}: {len(files) if most > 1 else most} files: {dict(seen)}")


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """A file system of this size at `folder`, or a skipped test."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    "kilobytes", [pytest.param(size, marks=pytest.mark.soak) for size in range(60, 900, 60)]
)
def test_a_full_disk(kilobytes, config_file, finished, tmp_path):
    """One line, and with more room the run goes on to the same bits."""
    folder = tmp_path / "disk"
    with small_disk(folder, f"{kilobytes}k"):
        flags = [f"--config={config_file}", f"--workdir={folder}", *STEPS]
        victim = Victim(1, *flags, devices=8)
        text = victim.end()
        assert "Traceback" not in text, text
        assert victim.process.returncode in (0, 1, 2), text
        print(f"\n{kilobytes} kB: exit {victim.process.returncode}: {text.strip().splitlines()[-1][-150:]}")
        assert subprocess.run(["mount", "-o", "remount,size=64m", folder]).returncode == 0
        assert train.main(flags) == 0
        assert rows(folder) == rows(finished)


@pytest.mark.soak
def test_a_folder_that_cannot_be_written(config_file, finished, tmp_path):
    """Sampling from it works; training ends with one line."""
    folder = tmp_path / "disk"
    with small_disk(folder, "64m"):
        shutil.copytree(finished, folder / "run")
        assert subprocess.run(["mount", "-o", "remount,ro", folder]).returncode == 0
        assert answer(folder / "run")[:2] == answer(finished)[:2]
        for workdir in (folder / "run", folder / "new"):
            victim = Victim(1, f"--config={config_file}", f"--workdir={workdir}", *STEPS, devices=8)
            text = victim.end()
            assert victim.process.returncode in (1, 2) and "Traceback" not in text, text
            print(f"\nread-only: exit {victim.process.returncode}: {text.strip().splitlines()[-1]}")
