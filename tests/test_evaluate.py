"""The evaluate command on a tiny model that answers no problem right: figures, several tasks, mistakes."""

import json
import re
from pathlib import Path

import jax
import pytest

from refusion_jax import evaluate
from refusion_jax.serving import engine as serving
from refusion_jax.serving.score import wilson

ORACLE = Path(__file__).parent / "data" / "oracle" / "tiny_a"


def run(*flags: str) -> int:
    return evaluate.main([f"--checkpoint={ORACLE}", "--gen_length=8", "--limit=3", "--batch_size=2", *flags])


def test_one_task(tmp_path, capsys):
    assert run("--task=arithmetic", '--task_settings={"digits": 1}', "--raw", f"--output={tmp_path}") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == {"accuracy", "tokens_per_forward", "seconds"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert printed.items() <= results.items()
    assert results["method"] == "refusion" and results["task_settings"]["digits"] == 1
    assert results["settings"]["slot_size"] == 8 and results["dtype"] == "float32"
    answers = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [answer["task"] for answer in answers] == ["arithmetic"] * 3
    useful = sum(len(a["ids"]) + (a["finish_reason"] == "eos") for a in answers)
    assert results["response_tokens"] == pytest.approx(useful / 3, abs=1e-4)
    assert results["tokens_per_second"] == pytest.approx(useful / results["seconds"], rel=0.01)
    assert results["latency"] == pytest.approx(results["seconds"] * 2 / 3, abs=1e-3)
    lower, upper = results["interval"]
    assert lower <= results["accuracy"] <= upper


def test_several_tasks_take_one_compilation(tmp_path, capsys, monkeypatch):
    warmed = []
    warm_up = serving.warm_up
    monkeypatch.setattr(serving, "warm_up", lambda *a: warmed.append(a) or warm_up(*a))
    decoder = serving.DECODERS[serving.METHODS["mdm"]]
    before = decoder.resume._cache_size()
    flags = ["--method=mdm", "--num_blocks=2", "--cache=dual", "--raw", f"--output={tmp_path}"]
    settings = json.dumps({"extraction": {"fields": 1, "distractors": 0}, "arithmetic": {"digits": 1}})
    assert run("--task=arithmetic,extraction", f"--task_settings={settings}", *flags) == 0
    assert len(warmed) == 1 and decoder.resume._cache_size() == before + 1
    printed = json.loads(capsys.readouterr().out)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(printed) == list(results["tasks"]) == ["arithmetic", "extraction"]
    assert results["tasks"]["extraction"]["task_settings"]["fields"] == 1
    assert results["settings"]["cache"] == "dual"
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize("method", serving.METHODS)
@pytest.mark.parametrize("tensor", [1, pytest.param(2, marks=pytest.mark.long)])
def test_nothing_is_compiled_after_warming_up(caplog, monkeypatch, method, tensor):
    """The timed part only decodes, also where rows start new requests several times."""
    warm_up, compiling = serving.warm_up, re.compile(r"Compiling jit\((\w+)\)")

    def warmed(*arguments):
        warm_up(*arguments)
        assert "_inserted" in compiling.findall(caplog.text)
        caplog.clear()

    monkeypatch.setattr(serving, "warm_up", warmed)
    flags = [f"--method={method}", f"--tensor={tensor}", "--gen_length=32", "--batch_size=3", "--raw"]
    with jax.log_compiles(), caplog.at_level("WARNING"):
        assert run("--task=arithmetic", '--task_settings={"digits": 1}', *flags, "--limit=7") == 0
    assert compiling.findall(caplog.text) == []


def test_the_interval_of_an_accuracy():
    """Wilson's interval of 8 out of 10, computed by hand from the formula."""
    assert wilson(0.8, 10) == pytest.approx((0.4901, 0.9433), abs=1e-4)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(1.0, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task=chess"], "task is 'chess', expected one of"),
        (["--task=arithmetic,chess"], "task is 'chess', expected one of"),
        (["--task=arithmetic,arithmetic"], "--task must name each task once, found arithmetic,arithmetic"),
        (
            ["--task=arithmetic,extraction", '--task_settings={"digits": 1}'],
            "--task_settings of several tasks are by their names arithmetic,extraction, found 'digits'",
        ),
        (["--task=arithmetic", "--task_settings=1"], "--task_settings must be a JSON object"),
        (["--task=arithmetic", "--limit=0"], "--limit must be at least 1 problem, found 0"),
        (["--task=arithmetic", "--cache=dual"], "--cache is for --method=mdm alone, found --method=refusion"),
    ],
)
def test_mistakes_are_one_line(capsys, flags, message):
    assert run(*flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
