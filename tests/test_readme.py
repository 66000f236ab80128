"""The README's commands, as pasted, in order; only the training and the evaluation are cut short."""

import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = {
    "train": " --config.train.steps=2 --config.train.save_every=2 --config.train.log_every=1",
    "evaluate": " --limit=1",
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


def run(line: str) -> None:
    """Runs a command of the README in this process, where JAX has started already."""
    python, dash_m, module, *arguments = shlex.split(line)
    assert (python, dash_m) == ("python", "-m"), line
    assert importlib.import_module(module).main(arguments) == 0, line


def test_every_module_command_works(clone, monkeypatch, capsys):
    monkeypatch.chdir(clone)
    ran = []
    for line in (line for line in commands() if line.startswith("python -m refusion_jax.")):
        name = re.match(r"python -m refusion_jax\.(\w+)", line)[1]
        run(line + SHORT.get(name, ""))
        assert capsys.readouterr().out.strip(), line
        ran.append(name)
    assert ran == ["sample", "train", "sample", "convert", "bench", "evaluate", "evaluate"]
    results = ("runs/small_eval/results.json", "runs/eval/results.json")
    for written in ("runs/tiny/metrics.csv", "runs/exported/model.safetensors", *results):
        assert (clone / written).exists()
    (snippet,) = blocks("python")
    (clone / "snippet.py").write_text(snippet)
    runpy.run_path("snippet.py")


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
