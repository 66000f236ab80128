"""`--resume` and `--overwrite`: what a stopped run decoded is kept, and what differs is refused."""

import json
import os

import pytest
from sampling import FLAGS, assert_refused, command, copied, lines
from test_evaluate import run as evaluate

from refusion_jax.serving import engine
from refusion_jax.serving.progress import Progress

SHORT = [{"id": i, "prompt": f"{i}+{i}=", "gen_length": 8, "trace": i == 3} for i in range(4)]
LONG = {"id": "long", "prompt_ids": [5] * 600, "gen_length": 8}  # decoded last, and asked for first
ASKED = [LONG, *SHORT[:2], {"id": "wrong", "prompt": 5}, *SHORT[2:]]


class Killed(Exception):
    """Stands for SIGKILL: nothing handles it."""


def killed_after(monkeypatch, count: int) -> None:
    """Makes the next run die while it writes the result after `count` of them."""
    add = Progress.add

    def add_some(self, index, answer):
        if len(self._places) == count:
            self._file.write(b'{"request": 3, "id": 3, "te')
            self._file.flush()
            monkeypatch.undo()
            raise Killed
        add(self, index, answer)

    monkeypatch.setattr(Progress, "add", add_some)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return copied(tmp_path_factory.mktemp("resume") / "model")


@pytest.fixture
def asked(tmp_path):
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(request) + "\n" for request in ASKED))
    return tmp_path / "requests.jsonl"


def sample(model, asked, output, *flags):
    return command(f"--checkpoint={model}", *FLAGS, f"--input={asked}", f"--output={output}", *flags)


def decoded(monkeypatch) -> list:
    """The ids of the requests that are decoded from here on."""
    ids, served = [], engine.decoded
    monkeypatch.setattr(
        engine, "decoded", lambda m, p, r, *a: ids.extend(q.id for q in r) or served(m, p, r, *a)
    )
    return ids


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> bytes:
    """The output of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "requests.jsonl").write_text("".join(json.dumps(request) + "\n" for request in ASKED))
    ran = sample(model, folder / "requests.jsonl", folder / "results.jsonl")
    assert_refused(ran, "1 of 6 requests could not be served, first .*requests.jsonl:4: prompt must be text")
    assert sorted(os.listdir(folder)) == ["requests.jsonl", "results.jsonl", "results.jsonl.run.json"]
    answers = lines(folder / "results.jsonl")
    assert [answer["id"] for answer in answers] == [request["id"] for request in ASKED]
    return (folder / "results.jsonl").read_bytes().replace(str(folder).encode(), b"FOLDER")


@pytest.mark.parametrize(
    "count", [pytest.param(0, marks=pytest.mark.long), 3, pytest.param(5, marks=pytest.mark.long)]
)
def test_a_killed_run_goes_on_to_the_same_bytes(model, asked, whole, monkeypatch, count):
    output = asked.with_name("results.jsonl")
    killed_after(monkeypatch, count)
    with pytest.raises(Killed):
        sample(model, asked, output)
    partial = asked.with_name("results.jsonl.partial")
    kept = [json.loads(line)["id"] for line in partial.read_text().splitlines()[:-1]]
    assert len(kept) == count and not output.exists()
    assert kept[:1] in ([], ["wrong"])  # an error is written before anything is decoded
    assert_refused(sample(model, asked, output), r"results.jsonl.partial exists, expected --resume")
    ids = decoded(monkeypatch)
    assert_refused(sample(model, asked, output, "--resume"), "1 of 6 requests .*:4: prompt must be text")
    assert sorted(map(str, ids + kept)) == sorted(
        str(request["id"]) for request in ASKED if request["id"] != "wrong" or kept
    )
    assert output.read_bytes().replace(str(asked.parent).encode(), b"FOLDER") == whole
    assert not partial.exists()


def test_a_whole_output_is_kept_and_checked(model, asked, whole, monkeypatch):
    output = asked.with_name("results.jsonl")
    sample(model, asked, output)
    content = output.read_bytes()
    ids = decoded(monkeypatch)
    assert_refused(
        sample(model, asked, output), f"--output: {output} exists, expected --resume .* or --overwrite"
    )
    assert sample(model, asked, output, "--resume").code == 2  # for the request with a mistake
    for flags, message in (
        (["--temperature=0.5"], r"temperature was 0.0, found 0.5; expected what it was or --overwrite"),
        (["--stop=x"], r'stop was \[\], found \["x"\]'),
        (["--int8"], "int8 was false, found true"),
        (["--overwrite"], "--resume and --overwrite: give one of the two"),
    ):
        assert_refused(sample(model, asked, output, "--resume", *flags), message)
    asked.write_text(asked.read_text() + json.dumps(SHORT[0]))
    assert_refused(sample(model, asked, output, "--resume"), "there were 6 requests, found 7")
    asked.write_text(asked.read_text().replace("1+1=", "1+2="))
    assert_refused(sample(model, asked, output, "--resume"), "--resume: request 3 was another")
    assert ids == [] and output.read_bytes() == content
    sample(model, asked, output, "--overwrite")
    assert len(lines(output)) == 7 and len(ids) == 6


def test_another_model_is_refused(model, asked, tmp_path):
    output = asked.with_name("results.jsonl")
    asked.write_text(json.dumps(SHORT[0]))
    assert sample(model, asked, output).code == 0
    other = copied(tmp_path / "other")
    assert sample(other, asked, output, "--resume").code == 0  # the same, elsewhere
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    assert_refused(
        sample(other, asked, output, "--resume"), f"--resume: the model was another, in {model} at that time"
    )


def test_without_a_record_nothing_is_resumed(model, asked):
    output = asked.with_name("results.jsonl")
    output.write_text("{}\n")
    assert_refused(sample(model, asked, output, "--resume"), "exists without results.jsonl.run.json")
    for flag in ("--resume", "--overwrite"):
        assert_refused(sample(model, asked, "-", flag), f"{flag} needs --output=FILE")
    assert_refused(sample(model, asked, os.devnull, "--resume"), "--output=/dev/null must be a regular file")
    assert output.read_text() == "{}\n"


def test_lines_that_a_loss_of_power_left_are_decoded_again(tmp_path):
    run = {"requests": ["a", "b", "c"]}
    before = Progress(tmp_path / "out")
    before.start(run)
    for index in (2, 0):
        before.add(index, {"id": index, "text": "ü"})
    before._file.write(b"\0\0\0\n7\n" + b'{"request": 1, "id"')
    before._file.close()
    after = Progress(tmp_path / "out", resume=True)
    assert after.start(run) == {2: {"id": 2, "text": "ü"}, 0: {"id": 0, "text": "ü"}}
    after.add(1, {"id": 1, "text": ""})
    after.finish()
    assert [answer["id"] for answer in lines(tmp_path / "out")] == [0, 1, 2]


EVALUATION = [
    "--task=arithmetic,extraction",
    "--raw",
    "--task_settings",
    json.dumps({"extraction": {"fields": 1, "distractors": 0}, "arithmetic": {"digits": 1}}),
]
TIMES = ("seconds", "tokens_per_second", "latency", "compile_seconds")


def figures(folder) -> tuple[dict, list]:
    """results.json without its times, and samples.jsonl."""
    found = json.loads((folder / "results.json").read_text())
    for of_task in found["tasks"].values():
        assert all(of_task.pop(name) > 0 for name in TIMES)
    return found, lines(folder / "samples.jsonl")


@pytest.mark.parametrize("count", [2, 4])
def test_a_killed_evaluation_goes_on_to_the_same_figures(tmp_path, monkeypatch, capsys, count):
    assert evaluate(*EVALUATION, f"--output={tmp_path / 'whole'}") == 0
    output = f"--output={tmp_path / 'killed'}"
    killed_after(monkeypatch, count)
    with pytest.raises(Killed):
        evaluate(*EVALUATION, output)
    assert evaluate(*EVALUATION, output) == 2
    assert "samples.jsonl.partial exists" in capsys.readouterr().err
    ids = decoded(monkeypatch)
    assert evaluate(*EVALUATION, output, "--resume") == 0
    assert len(ids) == 6 - count + 1  # one to compile
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "killed")) == [
        "results.json",
        "samples.jsonl",
        "samples.jsonl.run.json",
    ]


def test_a_whole_evaluation_is_kept_and_checked(tmp_path, capsys):
    flags = ["--task=arithmetic", "--raw", f"--output={tmp_path}"]
    assert evaluate(*flags) == 0
    printed = capsys.readouterr().out
    assert evaluate(*flags) == 2 and "samples.jsonl exists" in capsys.readouterr().err
    assert evaluate(*flags, "--resume") == 0 and capsys.readouterr().out == printed
    assert evaluate(*flags, "--resume", "--limit=2") == 2
    assert "--resume: limit was 3, found 2" in capsys.readouterr().err
    assert evaluate(*flags, "--overwrite", "--limit=2") == 0
    assert len(lines(tmp_path / "samples.jsonl")) == 2
    assert evaluate("--task=arithmetic", "--resume") == 2
    assert "--resume needs --output" in capsys.readouterr().err
