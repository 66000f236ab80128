"""The model that ships: it is there, answers, and is as good as docs/small_model.md says."""

import ast
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from refusion_jax import bench, evaluate, loader, sample
from refusion_jax.benchmarks import decode as bench_decode
from refusion_jax.decode.batch import Shape
from refusion_jax.decode.config import DecodeConfig
from refusion_jax.decode.replay import read_courses, replay

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "small_model.md").read_text(encoding="utf-8")
MEASURE = runpy.run_path(str(ROOT / "docs" / "small" / "measure.py"))
RESULTS = {
    method: json.loads((ROOT / "docs" / "small" / f"{method}.json").read_text())
    for method in MEASURE["METHODS"]
}
FILES = {"config.json", "model.safetensors", "tokenizer_config.json"}


def flags(command: str) -> list[str]:
    """Those of the page's command."""
    return shlex.split(re.search(rf"python -m refusion_jax\.{command} (.*)", PAGE)[1])


def test_its_files_are_small():
    assert {path.name for path in loader.SMALL.iterdir()} == FILES
    assert sum(path.stat().st_size for path in loader.SMALL.iterdir()) <= 12e6


def test_sample_answers_as_on_the_page(capsys):
    assert sample.main([*flags("sample"), "--batch_size=1"]) == 0
    (expected,) = re.findall(r"```\n(.*?)```", PAGE.split("```sh")[1].split("```", 1)[1], flags=re.DOTALL)
    assert capsys.readouterr().out == expected


def test_the_pages_table_is_that_of_the_results():
    begin, end = MEASURE["MARKS"]
    assert PAGE.split(begin)[1].split(end)[0] == MEASURE["table"](RESULTS)


def test_what_was_measured_is_what_the_page_says():
    asked = set(flags("evaluate"))
    assert {f"--config={MEASURE['CONFIG']}", "--gen_length=256", *MEASURE["METHODS"]["exact"]} <= asked
    for name, results in RESULTS.items():
        assert results["method"] == ("ar" if name == "ar" else "refusion") and results["dtype"] == "float32"
        assert name == "ar" or results["settings"]["verify"] == name
        assert f"--gen_length={results['settings']['gen_length']}" in asked


def assert_as_right_as_stated(folder: Path, tasks: set[str]) -> None:
    """What evaluate found of a few problems, whose intervals are wide, is compatible with the page's."""
    found = json.loads((folder / "results.json").read_text())["tasks"]
    assert set(found) == tasks
    for task, figures in found.items():
        (lower, upper), (least, most) = figures["interval"], RESULTS["exact"]["tasks"][task]["interval"]
        assert lower <= most and least <= upper, task


@pytest.mark.long
def test_the_pages_command_finds_its_accuracies(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert evaluate.main([*flags("evaluate"), "--limit=40", f"--output={tmp_path}"]) == 0
    assert_as_right_as_stated(tmp_path, set(RESULTS["exact"]["tasks"]))


@pytest.mark.long
def test_short_problems_are_as_often_right_as_the_page_says(tmp_path):
    """Those whose prompts share `sample`'s compilation."""
    stated = RESULTS["exact"]["tasks"]
    settings = {task: stated[task]["task_settings"] for task in ("arithmetic", "multiplication", "countdown")}
    asked = [f"--task={','.join(settings)}", f"--task_settings={json.dumps(settings)}"]
    assert evaluate.main([*asked, "--limit=30", "--batch_size=1", f"--output={tmp_path}"]) == 0
    assert_as_right_as_stated(tmp_path, set(settings))


def test_without_its_files_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("refusion_jax.serving.flags.SMALL", tmp_path / "small")
    assert sample.main(["--prompt=1+1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'small'} is not a folder" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--task and --config: give one of the two"),
        (["--task=paths", "--config=configs/small.py"], "--task and --config: give one of the two"),
        (["--config=missing.py"], "--config=missing.py: no such file"),
        (["--config=configs/small.py", "--task_settings={}"], "--task_settings is for --task alone"),
        ([f"--config={ROOT}/configs/qwen3_8b.py"], "must train on tasks, found data.source 'jsonl'"),
    ],
)
def test_mistakes_in_what_to_evaluate(capsys, arguments, message):
    assert evaluate.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_exact_answers_are_as_often_right_as_those_left_to_right():
    """They are the same answers; the tokens of both per answer are too."""
    for task, figures in RESULTS["exact"]["tasks"].items():
        assert figures["accuracy"] == RESULTS["ar"]["tasks"][task]["accuracy"], task
        assert figures["response_tokens"] == RESULTS["ar"]["tasks"][task]["response_tokens"], task


SLOT_SIZES = {"small_slots8_blocks4": 8, "small_slots32_blocks4": 32}
TRACES = pytest.mark.parametrize("name", SLOT_SIZES)


def trace_file(name: str) -> Path:
    return loader.SMALL.with_name("traces") / f"{name}.jsonl"


@TRACES
def test_its_courses_fit_the_settings_of_their_name(name):
    config = DecodeConfig(0, 1, gen_length=256, num_blocks=4, slot_size=SLOT_SIZES[name])
    courses = read_courses(trace_file(name))
    assert len(courses) == MEASURE["COURSES"] * len(RESULTS["exact"]["tasks"])
    rows = len(courses)
    followed = replay(courses, config, Shape.exact([[2]] * rows, [config] * rows).padded())
    assert followed.length.tolist() == [len(course) for course in courses]
    assert trace_file(name).stat().st_size < 300e3


@TRACES
@pytest.mark.long
def test_its_courses_are_followed(tmp_path, monkeypatch, name):
    """By weights of no meaning, which commit whole slots where an EOS cut short what was recorded."""
    monkeypatch.setattr(bench_decode, "memory_bandwidth", lambda: 1e10)
    figures, size = tmp_path / "figures.json", SLOT_SIZES[name]
    courses = read_courses(trace_file(name))[:4]
    shape = [f"--config={ROOT}/configs/tiny.py", "--config.model.num_layers=1", "--dtype=float32"]
    settings = ["--gen_length=256", "--num_blocks=4", f"--slot_size={size}", "--prompt_length=8"]
    work = ["--method=refusion", f"--batch_size={len(courses)}", "--repeats=1"]
    work += [f"--replay={trace_file(name)}", f"--output={figures}"]
    assert bench.main(["decode", *shape, *settings, *work]) == 0
    (row,) = json.loads(figures.read_text())

    def begun(plan) -> int:
        """Slots of a plan that something was committed of."""
        iterative = plan["branch"] == "iterative"
        return sum(
            iterative or not {*range(at, at + size)}.isdisjoint(plan["committed"]) for at in plan["planned"]
        )

    assert row["tokens"] == size * sum(begun(plan) for course in courses for plan in course)


@pytest.mark.long
def test_its_exact_courses_are_followed(tmp_path, monkeypatch):
    """By weights of no meaning, through the command: as many passes and tokens as were recorded."""
    monkeypatch.setattr(bench_decode, "memory_bandwidth", lambda: 1e10)
    figures, courses = tmp_path / "figures.json", read_courses(trace_file("small_exact"))
    assert set(SLOT_SIZES) | {"small_exact"} == set(MEASURE["TRACES"])
    assert len(courses) == MEASURE["COURSES"] * len(RESULTS["exact"]["tasks"])
    work = [f"--config={ROOT}/configs/tiny.py", "--config.model.num_layers=1", "--dtype=float32"]
    work += ["--verify=exact", "--gen_length=256", "--prompt_length=8", "--method=refusion", "--repeats=1"]
    work += ["--batch_size=8", f"--replay={trace_file('small_exact')}", f"--output={figures}"]
    assert bench.main(["decode", *work]) == 0
    (row,) = json.loads(figures.read_text())
    assert row["passes"] == max(len(course) for course in courses[:8])
    assert row["tokens"] == sum(step["accepted"] + 1 for course in courses[:8] for step in course)


def test_what_is_no_python_is_packed():
    """setup.py names by its patterns every such file of the package."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (data,) = (node.value for node in ast.walk(tree) if getattr(node, "arg", None) == "package_data")
    package = ROOT / "refusion_jax"
    packed = {path for pattern in ast.literal_eval(data)["refusion_jax"] for path in package.glob(pattern)}
    there = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert packed == {path for path in there if path.suffix != ".py"}
