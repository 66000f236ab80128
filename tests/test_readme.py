"""The README's commands, as pasted, in order; only the training and the evaluation are cut short."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = {
    "train": " --config.train.steps=2 --config.train.save_every=2 --config.train.log_every=1",
    "evaluate": " --limit=3",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = "\n".join(blocks("sh")).splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with the files the README's commands name, to run them in."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


def run(line: str, folder: Path) -> str:
    assert line.startswith("python "), line
    line = line.replace("python ", f"{sys.executable} ", 1)
    done = subprocess.run(
        line, shell=True, cwd=folder, capture_output=True, text=True, env=_environment(), timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0"}


def test_every_module_command_works(clone):
    run_lines = [line for line in commands() if line.startswith("python -m refusion_jax.")]
    ran = []
    for line in run_lines:
        name = re.match(r"python -m refusion_jax\.(\w+)", line)[1]
        output = run(line + SHORT.get(name, ""), clone)
        assert output.strip(), line
        ran.append(name)
    assert ran == ["sample", "train", "sample", "convert", "bench", "evaluate", "evaluate"]
    results = ("runs/small_eval/results.json", "runs/eval/results.json")
    for written in ("runs/tiny/metrics.csv", "runs/exported/model.safetensors", *results):
        assert (clone / written).exists()
    (snippet,) = blocks("python")
    (clone / "snippet.py").write_text(snippet)
    run("python snippet.py", clone)


def test_make_and_pip_lines_name_what_exists():
    makefile, setup = (ROOT / "Makefile").read_text(), (ROOT / "setup.py").read_text()
    others = [line for line in commands() if not line.startswith("python ")]
    assert others[:2] == ["python3 -m venv .venv", ". .venv/bin/activate"]
    others = others[2:]
    assert {"make demo", "make test", "pip install ."} <= set(others)
    for line in others:
        if target := re.fullmatch(r"make (\w+)", line):
            assert re.search(rf"^{target[1]}:", makefile, flags=re.MULTILINE), line
        else:
            assert line == "pip install .", line
    extras = re.findall(r"pip install '\.\[(\w+)\]'", README)
    assert len(extras) >= 3
    for extra in extras:
        assert f'"{extra}":' in setup, extra


def test_the_folder_map_is_complete():
    table = README.split("| what lives there |")[1].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)/`", table))
    there = {path.parent.name for path in (ROOT / "refusion_jax").glob("*/__init__.py")}
    assert there == named
    assert len(table.strip().splitlines()) <= 15
