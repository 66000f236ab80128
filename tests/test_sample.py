"""The sample command: what it is asked and answers, and what it says of mistakes.

In this process, as `sample.main([...])`, but for one run as users start it.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refusion_jax import decode, load, opening, sample, serving
from refusion_jax.baselines import ar, bd3, mdm
from refusion_jax.config import Parser
from refusion_jax.feed import tokens_ahead
from refusion_jax.requests import DecodeConfig, Shape

ROOT = Path(__file__).parent.parent
ORACLE = ROOT / "tests" / "data" / "oracle" / "tiny_a"
WEIGHTS = "model.safetensors"
# Where nothing else is asked for.
FLAGS = [
    "--gen_length=32",
    "--slot_size=4",
    "--slot_threshold=0.6",
    "--token_threshold=0.1",
    "--batch_size=4",
]
OF_OTHERS = ["--gen_length=32", "--batch_size=4"]  # of any method
DEFAULTS = {"gen_length": 32, "slot_size": 4, "slot_threshold": 0.6, "token_threshold": 0.1}
FIELDS = {
    "id",
    "text",
    "ids",
    "raw_ids",
    "finish_reason",
    "num_tokens",
    "num_forwards",
    "tokens_per_forward",
    "num_iterations",
}


class Ran(NamedTuple):
    """An exit code and what was printed."""

    code: int
    out: str
    err: str


def command(*arguments: str) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = sample.main([str(argument) for argument in arguments])
    return Ran(code, out.getvalue(), err.getvalue())


def assert_refused(ran: Ran, message: str) -> None:
    """Exit code 2 and one line, no traceback."""
    assert ran.code == 2, ran
    (line,) = ran.err.splitlines()
    assert line.startswith("error: ") and re.search(message, line), line


def copied(folder: Path) -> Path:
    """The checkpoint without its recordings, in a folder of its own, with a chat template."""
    folder.mkdir()
    for name in ("config.json", WEIGHTS, "tokenizer.json"):
        (folder / name).write_bytes((ORACLE / name).read_bytes())
    # What this model was trained on: <bos>26+0+10=
    template = (
        "{% for m in messages %}<bos>{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return copied(tmp_path_factory.mktemp("sample") / "model")


@pytest.fixture(scope="module")
def opened(checkpoint):
    return load(checkpoint)


def lines(path_or_text: Path | str) -> list[dict[str, Any]]:
    text = path_or_text if isinstance(path_or_text, str) else path_or_text.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


# Requests from a file.

SUM = [1, 6, 10, 40, 4, 40, 5, 4, 41]  # <bos>26+0+10=


def recordings() -> dict[str, dict[str, Any]]:
    """By request id: recorded decodes of the authors' code that are as short as the requests here."""
    cases = json.loads((ORACLE / "decode.json").read_text())["cases"]
    short = [c for c in cases if c["params"]["gen_length"] == 32 and len(c["prompt"]) <= 24]
    assert len(short) >= 5
    return {f"recorded-{i}": case for i, case in enumerate(short)}


def recorded_request(name: str, case: dict[str, Any]) -> dict[str, Any]:
    settings = dict(case["params"])
    settings["num_blocks"] = settings.pop("serial_num_blocks")
    return {"id": name, "prompt_ids": case["prompt"], "semantics": "release", "trace": True} | settings


GOOD = [
    {"id": "templated", "prompt": "26+0+10"},
    {"id": "messages", "messages": [{"role": "user", "content": "26+0+10"}]},
    {"id": "ids", "prompt_ids": SUM},
    {"id": 7, "prompt_ids": SUM, "gen_length": 16, "slot_size": 2, "num_blocks": 2},
    {"id": "always", "prompt_ids": SUM, "slot_threshold": -1, "token_threshold": -1},
    {"id": "never", "prompt_ids": SUM, "slot_threshold": 1, "token_threshold": 2.5, "trace": True},
    {
        "id": "hot",
        "prompt_ids": SUM,
        "temperature": 2.0,
        "seed": 3,
        "slot_threshold": -1,
        "token_threshold": -1,
    },
    {
        "id": "hotter",
        "prompt_ids": SUM,
        "temperature": 2.0,
        "seed": 4,
        "slot_threshold": -1,
        "token_threshold": -1,
    },
    {"id": "quiet", "prompt": "26+0+10", "trace": False},
    {"id": "empty", "prompt_ids": [], "slot_threshold": -1},
    *(recorded_request(*item) for item in recordings().items()),
]
# A line, and what must be said of it.
BAD = [
    ('{"id": "x", "prompt": ', "not JSON"),
    ("[1, 2]", "must be a JSON object, found list"),
    ("17", "must be a JSON object, found int"),
    ('{"prompt": "1+1"}', "id must be text or a whole number, found None"),
    ('{"id": true, "prompt": "1+1"}', "id must be text or a whole number, found True"),
    (
        '{"id": "x", "prompt": "1+1", "gen_length": 32768, "slot_size": 32768}',
        "gen_length / num_blocks must be at most 4096 tokens, found 32768",
    ),
    ('{"id": "x"}', "exactly one of prompt, messages, prompt_ids is needed, found none"),
    ('{"id": "x", "prompt": "1", "prompt_ids": [1]}', "exactly one of .* found \\['prompt', 'prompt_ids'\\]"),
    ('{"id": "x", "prompt": 1}', "prompt must be text, found 1"),
    ('{"id": "x", "prompt": "\\ud800"}', "lone surrogate"),
    ('{"id": "x", "messages": "hello"}', "messages must be a list of messages, found 'hello'"),
    ('{"id": "x", "messages": [{"role": "user"}]}', "messages\\[0\\].content is None, expected text"),
    ('{"id": "x", "prompt_ids": "12"}', "prompt_ids must be a list of token ids, found str"),
    ('{"id": "x", "prompt_ids": [64]}', "whole number from 0 to 63, found 64"),
    ('{"id": "x", "prompt_ids": [-1]}', "found -1"),
    ('{"id": "x", "prompt_ids": [true]}', "found True"),
    ('{"id": "x", "prompt": "1", "gen_len": 8}', "unknown field 'gen_len'"),
    ('{"id": "x", "prompt": "1", "mask_id": 8}', "unknown field 'mask_id'"),
    ('{"id": "x", "prompt": "1", "gen_length": 30}', "gen_length must be a multiple .* found gen_length 30"),
    ('{"id": "x", "prompt": "1", "num_blocks": 5}', "gen_length must be a multiple .* = 20"),
    ('{"id": "x", "prompt": "1", "gen_length": 0}', "gen_length must be a whole number from 1 .* found 0"),
    ('{"id": "x", "prompt": "1", "gen_length": -4}', "found -4"),
    ('{"id": "x", "prompt": "1", "gen_length": 8.0}', "found 8.0"),
    ('{"id": "x", "prompt": "1", "slot_size": "4"}', "slot_size .* found '4'"),
    ('{"id": "x", "prompt": "1", "num_blocks": null}', "num_blocks .* found None"),
    (
        '{"id": "x", "prompt": "1", "slot_threshold": NaN}',
        "slot_threshold must be a finite number, found nan",
    ),
    ('{"id": "x", "prompt": "1", "token_threshold": Infinity}', "token_threshold .* found inf"),
    ('{"id": "x", "prompt": "1", "token_threshold": true}', "token_threshold .* found True"),
    ('{"id": "x", "prompt": "1", "temperature": -0.5}', "temperature must be 0 or above, found -0.5"),
    ('{"id": "x", "prompt": "1", "seed": -1}', "seed .* found -1"),
    ('{"id": "x", "prompt": "1", "semantics": "paper"}', "semantics must be one of .* found 'paper'"),
    ('{"id": "x", "prompt": "1", "trace": "yes"}', "trace must be true or false, found 'yes'"),
]


class Served(NamedTuple):
    """One run over all of GOOD and BAD, interleaved, with blank lines."""

    ran: Ran
    input: Path
    output: Path
    line_numbers: list[int]
    results: list[dict[str, Any]]


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory) -> Served:
    folder = tmp_path_factory.mktemp("served")
    text, line_numbers = "\n", []
    for i in range(max(len(GOOD), len(BAD))):
        for line in [json.dumps(x) for x in GOOD[i : i + 1]] + [line for line, _ in BAD[i : i + 1]]:
            text += line + "\n" * (1 + i % 2)
            line_numbers.append(text[: text.rindex(line)].count("\n") + 1)
    (folder / "requests.jsonl").write_text(text, encoding="utf-8")
    ran = command(
        f"--checkpoint={checkpoint}",
        *FLAGS,
        f"--input={folder / 'requests.jsonl'}",
        f"--output={folder / 'results.jsonl'}",
    )
    return Served(
        ran,
        folder / "requests.jsonl",
        folder / "results.jsonl",
        line_numbers,
        lines(folder / "results.jsonl"),
    )


def of(served: Served, name: str | int) -> dict[str, Any]:
    (result,) = [r for r in served.results if r["id"] == name and "error" not in r]
    return result


def test_results_come_in_the_order_of_the_requests(served):
    asked = [json.loads(line)["id"] for line in served.input.read_text().splitlines() if is_good(line)]
    assert [r["id"] for r in served.results if "error" not in r] == asked == [g["id"] for g in GOOD]
    assert len(served.results) == len(GOOD) + len(BAD)


def is_good(line: str) -> bool:
    return bool(line.strip()) and line not in [bad for bad, _ in BAD]


def test_a_request_that_cannot_be_served_says_why_and_the_others_go_on(served):
    assert_refused(served.ran, rf"{len(BAD)} of {len(BAD) + len(GOOD)} requests could not be served")
    assert served.ran.out == ""
    failed = [(n, r) for n, r in zip(served.line_numbers, served.results, strict=True) if "error" in r]
    assert len(failed) == len(BAD)
    for (number, result), (line, message) in zip(failed, BAD, strict=True):
        assert result.keys() == {"id", "error"}
        assert result["id"] == ("x" if '"x"' in line and "not JSON" not in message else None)
        assert result["error"].startswith(f"{served.input}:{number}: "), result
        assert re.search(message, result["error"]) and "\n" not in result["error"], result
    assert failed[0][1]["error"] in served.ran.err


def test_nothing_but_the_results_is_left_beside_them(served):
    assert sorted(os.listdir(served.output.parent)) == ["requests.jsonl", "results.jsonl"]


def test_fields_of_a_result(served):
    for request in GOOD:
        result = of(served, request["id"])
        assert result.keys() == (FIELDS | {"trace"} if request.get("trace") else FIELDS)
        ids, raw_ids = result["ids"], result["raw_ids"]
        assert ids == (raw_ids[: raw_ids.index(2)] if 2 in raw_ids else raw_ids)
        assert result["finish_reason"] == ("eos" if 2 in raw_ids else "length")
        assert result["num_tokens"] == len(raw_ids) > 0
        assert result["tokens_per_forward"] == pytest.approx(len(raw_ids) / result["num_forwards"], abs=1e-4)
        assert 0 < result["num_iterations"] < result["num_forwards"]
    assert {r["finish_reason"] for r in served.results if "error" not in r} == {"eos", "length"}


def test_results_are_those_of_the_library(served, opened):
    """Every setting of a request, and the flags where it has none."""
    model, params, tokenizer = opened
    # One at a time, in the shape in which the run begins them and another test writes a trace.
    shape = Shape(
        rows=1, prompt=64, gen=32, block=32, slots=8, iterations=8, trace=True, ahead=tokens_ahead(1)
    )
    for request in GOOD:
        own = {
            k: v for k, v in request.items() if k not in ("id", "trace", "prompt", "messages", "prompt_ids")
        }
        config = DecodeConfig(mask_id=3, eos_id=2, **DEFAULTS | own)
        prompt, result = request.get("prompt_ids", SUM), of(served, request["id"])
        samples = jax.device_get(decode.sample(model, params, [prompt], config, shape=shape))
        assert result["raw_ids"] == samples.raw_ids[0, : samples.num_raw[0]].tolist(), request
        assert result["text"] == tokenizer.decode(result["ids"])
        assert result["num_forwards"] == samples.num_forwards[0]
        assert result["num_iterations"] == samples.num_iterations[0]
    # The settings matter, or nothing were shown by this.
    names = ("ids", 7, "always", "never", "hot")
    assert len({(tuple(of(served, n)["raw_ids"]), of(served, n)["num_forwards"]) for n in names}) == len(
        names
    )


def test_text_messages_and_ids_are_the_same_prompt(served):
    results = [of(served, name) | {"id": None} for name in ("templated", "messages", "ids", "quiet")]
    assert results == [results[0]] * 4
    assert results[0]["text"].startswith("26+0=")


def test_recorded_requests_get_the_recorded_answers(served):
    for name, case in recordings().items():
        result = of(served, name)
        assert result["raw_ids"] == case["x"][len(case["prompt"]) :]
        assert 0 < result["num_forwards"] <= case["n_forward"]
        assert len(result["trace"]) == result["num_iterations"]
        for got, step in zip(result["trace"], case["steps"], strict=True):
            want = {name: step[name] for name in ("block", "branch")}
            want |= {"planned": step["chosen"], "rounds": step["loops"], "committed": step["pos"]}
            assert {name: got[name] for name in want} == want
            np.testing.assert_allclose(list(got["confidences"].values()), step["conf"], atol=1e-4)
            assert [int(place) for place in got["confidences"]] == step["slots_left"]


def assert_passes_add_up(result) -> None:
    """At best every plan but the first and every refill rides along; at worst none does."""
    steps = result["trace"]
    least = 1 + sum(1 + step["rounds"] for step in steps)
    assert least <= result["num_forwards"] <= sum(2 + 2 * step["rounds"] for step in steps)


def test_a_trace_adds_up(served):
    result = of(served, "never")  # one slot a plan, one forced token a round
    assert [len(plan["planned"]) for plan in result["trace"]] == [1] * result["num_iterations"]
    places = [place for plan in result["trace"] for place in plan["committed"]]
    assert len(places) == len(set(places)) == result["num_tokens"] and min(places) == len(SUM)
    assert_passes_add_up(result)
    assert result["trace"][-1]["forwards"] == result["num_forwards"]


def test_seeds_decide_where_there_is_a_temperature(served):
    assert of(served, "hot")["raw_ids"] != of(served, "hotter")["raw_ids"]


def test_without_output_results_go_to_stdout(checkpoint, served):
    ran = command(f"--checkpoint={checkpoint}", *FLAGS, f"--input={served.input}")
    assert ran.code == 2 and len(ran.err.splitlines()) == 1
    assert lines(ran.out) == served.results


def test_stop_texts(checkpoint, served, tmp_path):
    """The text ends before the earliest of them; tokens and counts are as they were."""
    asked = tmp_path / "requests.jsonl"
    asked.write_text("".join(json.dumps(request) + "\n" for request in GOOD))
    ran = command(
        f"--checkpoint={checkpoint}", *FLAGS, f"--input={asked}", "--stop=;", "--stop=0=2", "--stop=zzz"
    )
    assert (ran.code, ran.err) == (0, "")
    stopped = 0
    for result in lines(ran.out):
        before = of(served, result["id"])
        cut = min(
            [len(before["text"]), *(before["text"].find(s) for s in (";", "0=2") if s in before["text"])]
        )
        assert result["text"] == before["text"][:cut]
        assert (result["finish_reason"] == "stop") == (cut < len(before["text"]))
        stopped += result["finish_reason"] == "stop"
        same = result.keys() - {"text", "finish_reason"}
        assert {name: result[name] for name in same} == {name: before[name] for name in same}
    assert 0 < stopped < len(GOOD)
    assert lines(ran.out)[0]["text"] == "26+"


def test_flags_are_what_requests_leave_out(checkpoint, served, tmp_path):
    """The settings of some requests as flags, in the shape compiled already."""
    for name in (7, "always", "hot"):
        (request,) = [request for request in GOOD if request["id"] == name]
        flags = [f"--{k}={v}" for k, v in request.items() if k not in ("id", "prompt_ids")]
        # The others keep the shape what it was: they say everything themselves.
        others = [
            DEFAULTS | {"num_blocks": 1, "temperature": 0.0} | other for other in GOOD if other["id"] != name
        ]
        asked = tmp_path / "requests.jsonl"
        bare = {"id": name, "prompt_ids": request["prompt_ids"]}
        asked.write_text("".join(json.dumps(line) + "\n" for line in [bare, *others]))
        ran = command(f"--checkpoint={checkpoint}", *FLAGS, *flags, f"--input={asked}")
        assert ran.code == 0
        assert lines(ran.out)[0] == of(served, name)


def test_as_users_start_it(checkpoint, served, tmp_path):
    """A process of its own: exit code 2 for one bad request, no noise, and the answers are the same."""
    asked, answered = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    good = [request for request in GOOD if request["id"] in ("messages", "hot")]
    asked.write_text("".join(line + "\n" for line in (json.dumps(good[0]), BAD[0][0], json.dumps(good[1]))))
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "refusion_jax.sample",
                f"--checkpoint={checkpoint}",
                *FLAGS,
                "--batch_size=1",
            ),
            *(f"--input={asked}", f"--output={answered}"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert_refused(Ran(done.returncode, done.stdout, done.stderr), f"1 of 3 requests .*{asked}:2: not JSON")
    assert done.stdout == ""
    first, failed, second = lines(answered)
    assert [first, second] == [of(served, request["id"]) for request in good]
    assert failed.keys() == {"id", "error"}


def test_compiled_programs_are_kept_in_the_home_directory(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    opening.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before  # as the environment says
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        opening.use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "refusion_jax")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


# Prompts from the command line and from a terminal.


def test_prompts_as_flags(checkpoint, served):
    ran = command(f"--checkpoint={checkpoint}", *FLAGS, "--prompt=26+0+10", "--prompt=23+3+28")
    assert ran.code == 0
    first, second = ran.out.splitlines()
    assert first == of(served, "templated")["text"] and second.startswith("23+3=")
    about = ran.err.splitlines()
    assert len(about) == 2
    tokens, forwards = (of(served, "templated")[name] for name in ("num_tokens", "num_forwards"))
    assert about[0].startswith(
        f"[{tokens} tokens in {forwards} forwards, {tokens / forwards:.2f} tokens per forward"
    )


def test_a_trace_file(checkpoint, opened, served, tmp_path):
    """What the one --prompt gave, as a request with a trace gets it, and what it was made of."""
    path = tmp_path / "trace.json"
    ran = command(f"--checkpoint={checkpoint}", *FLAGS, "--prompt=26+0+10", f"--trace={path}")
    assert ran.code == 0 and os.listdir(tmp_path) == ["trace.json"]
    trace, answer = json.loads(path.read_text(encoding="utf-8")), of(served, "templated")
    assert {name: trace[name] for name in FIELDS - {"id"}} == {name: answer[name] for name in FIELDS - {"id"}}
    assert (trace["prompt"], trace["prompt_ids"]) == ("26+0+10", SUM)
    assert_passes_add_up(trace)
    assert "".join(trace["token_texts"]) == opened[2].decode(answer["raw_ids"])


def test_raw_prompts_are_fed_as_they_are(checkpoint, served):
    ran = command(f"--checkpoint={checkpoint}", *FLAGS, "--raw", "--prompt=<bos>26+0+10=", "--prompt=26+0+10")
    rendered, bare = ran.out.splitlines()
    assert ran.code == 0 and rendered == of(served, "templated")["text"] != bare


def test_a_terminal(checkpoint, served, monkeypatch):
    """Line by line until it is closed; a line that cannot be served does not end it."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("26+0+10\n\ud800\n23+3+28\n"))
    ran = command(f"--checkpoint={checkpoint}", *FLAGS)
    assert ran.code == 0
    answers = ran.out.replace("> ", "").split()
    assert (
        answers[0] == of(served, "templated")["text"] and answers[1].startswith("23+3=") and len(answers) == 2
    )
    assert "error: text has a lone surrogate" in ran.err and "Traceback" not in ran.err


def test_a_closed_terminal(checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    ran = command(f"--checkpoint={checkpoint}")
    assert ran.code == 0 and ran.out == "> "


# Several devices, and fewer bytes.


@pytest.mark.parametrize(
    "flags",
    [["--tensor=2"], ["--ahead=0", "--batch_size=1"], ["--int8", "--ahead=32", "--batch_size=1"]],
    ids=" ".join,
)
def test_answers_whatever_decodes_them(checkpoint, served, tmp_path, flags):
    """The tokens are the same on two devices, with passes of one phase and one request at a time; int8
    weights round some answers differently."""
    asked, output = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    requests = [recorded_request(*item) for item in recordings().items()]
    asked.write_text("".join(json.dumps(request) + "\n" for request in requests))
    ran = command(f"--checkpoint={checkpoint}", *FLAGS, f"--input={asked}", f"--output={output}", *flags)
    assert (ran.code, ran.err) == (0, "")
    equal = [result["raw_ids"] == of(served, result["id"])["raw_ids"] for result in lines(output)]
    assert len(equal) == len(requests) and (all(equal) or "--int8" in flags) and sum(equal) > len(equal) / 2
    passes = [result["num_forwards"] for result in lines(output)]
    if "--ahead=0" in flags:
        assert passes == [case["n_forward"] for case in recordings().values()]
    else:
        assert sum(passes) < sum(case["n_forward"] for case in recordings().values())


# Left to right.


@pytest.mark.parametrize(("flag", "first_token"), [([], "mask"), (["--first_token=next"], "next")])
def test_left_to_right(checkpoint, opened, tmp_path, flag, first_token):
    """By default the first token is read as the checkpoint's objective trained it."""
    model, params, _ = opened
    prompts = [SUM, [*SUM[:-3], 41]]
    asked = tmp_path / "requests.jsonl"
    requests = [{"id": i, "prompt_ids": prompt, "slot_size": 8} for i, prompt in enumerate(prompts)]
    asked.write_text("".join(json.dumps(request) + "\n" for request in requests))
    ran = command(f"--checkpoint={checkpoint}", *OF_OTHERS, "--method=ar", *flag, f"--input={asked}")
    assert (ran.code, ran.err) == (0, "")
    config = ar.ARConfig(3, 2, gen_length=32, first_token=first_token)
    shape = Shape(rows=2, prompt=64, gen=32)
    samples = jax.device_get(ar.sample(model, params, prompts, config, shape=shape))
    for row, result in enumerate(lines(ran.out)):
        assert result["raw_ids"] == samples.raw_ids[row, : samples.num_raw[row]].tolist()
        assert result["num_forwards"] == result["num_tokens"] == result["num_iterations"]
        assert result["tokens_per_forward"] == 1


@pytest.mark.parametrize(
    ("fields", "first_token"),
    [
        ({}, "mask"),
        ({"objective": "ar"}, "next"),
        ({"objective": "refusion"}, "mask"),
        ({"objective": "mdm"}, "mask"),
    ],
)
def test_the_objective_decides_where_the_first_token_is_read(tmp_path, fields, first_token):
    folder = copied(tmp_path / "model")
    change_config(folder, **fields)
    assert open_model(folder, "--method=ar").settings["first_token"] == first_token


@pytest.mark.parametrize(
    ("fields", "method", "settings"),
    [
        ({}, "refusion", {"token_threshold": 0.4, "slot_size": 8}),
        ({"objective": "ar"}, "ar", {"first_token": "next"}),
        ({"objective": "mdm"}, "mdm", {"token_threshold": 1.0, "num_blocks": 1, "cache": "none"}),
        ({"objective": "bd3", "block_len": 4}, "bd3", {"token_threshold": 1.0, "block_len": 4}),
        ({"objective": "bd3"}, "bd3", {"block_len": 32}),
    ],
    ids=str,
)
def test_the_objective_decides_how_to_decode(tmp_path, fields, method, settings):
    folder = copied(tmp_path / "model")
    change_config(folder, **fields)
    defaults = open_model(folder)
    assert defaults.method == method
    assert settings.items() <= defaults.settings.items()


def test_an_objective_of_no_method(tmp_path):
    folder = copied(tmp_path / "model")
    change_config(folder, objective="sedd")
    ran = command(f"--checkpoint={folder}", "--prompt=1+1")
    assert_refused(ran, "config.json: objective must be one of refusion, ar, mdm, bd3, found 'sedd'")


@pytest.mark.parametrize(
    ("method", "flags", "config"),
    [
        (
            "mdm",
            ["--num_blocks=4", "--cache=dual"],
            mdm.MDMConfig(3, 2, 32, 2, 0.5, num_blocks=4, cache="dual"),
        ),
        ("bd3", ["--block_len=8"], bd3.BD3Config(3, 2, 32, 2, 0.5, block_len=8)),
    ],
)
@pytest.mark.long
def test_block_by_block(checkpoint, opened, tmp_path, method, flags, config):
    """Settings of other methods in a request are passed over, its own count."""
    model, params, _ = opened
    prompts = [SUM, [*SUM[:-3], 41], SUM]
    asked = tmp_path / "requests.jsonl"
    requests = [
        {"id": i, "prompt_ids": p, "slot_size": 5, "first_token": "next"} for i, p in enumerate(prompts)
    ]
    requests[2] |= {"tokens_per_step": 32, "trace": True}
    asked.write_text("".join(json.dumps(request) + "\n" for request in requests))
    flags = [*OF_OTHERS, "--tokens_per_step=2", "--token_threshold=0.5", *flags]
    ran = command(f"--checkpoint={checkpoint}", f"--method={method}", *flags, f"--input={asked}")
    assert (ran.code, ran.err) == (0, "")
    configs = [config, config, dataclasses.replace(config, tokens_per_step=32)]
    decoder = serving.METHODS[method].decoder
    shape = decoder.exact_shape(prompts, configs).padded(
        4, trace=True, ahead=tokens_ahead(4)
    )  # the command's
    samples = jax.device_get(decoder.sample(model, params, prompts, configs, shape=shape))
    for row, result in enumerate(lines(ran.out)):
        assert result["raw_ids"] == samples.raw_ids[row, : samples.num_raw[row]].tolist()
        assert result["num_forwards"] == samples.num_forwards[row]
    assert result["trace"] == [] and result["num_forwards"] <= 4


def test_a_model_without_a_mask_decodes_left_to_right(checkpoint, tmp_path):
    """As one decoded it before a mask token was added to it."""
    folder = shutil.copytree(checkpoint, tmp_path / "base")
    change_config(folder, mask_token_id=None)
    ran = command(f"--checkpoint={folder}", "--method=ar", "--prompt=26+0+10", *OF_OTHERS)
    assert ran.code == 0, ran.err
    masked = command(
        f"--checkpoint={checkpoint}", "--method=ar", "--first_token=next", "--prompt=26+0+10", *OF_OTHERS
    )
    assert ran.out == masked.out
    assert_refused(
        command(f"--checkpoint={folder}", "--method=refusion", "--prompt=26+0+10", *FLAGS),
        "mask_token_id is missing.*--add_tokens",
    )
    asked_nothing = command(f"--checkpoint={folder}", "--prompt=26+0+10", *OF_OTHERS)
    assert asked_nothing.out == ran.out
    assert_refused(
        command(f"--checkpoint={folder}", "--method=ar", "--first_token=mask", "--prompt=1", *OF_OTHERS),
        "mask_token_id is missing",
    )


def test_thinking_is_told_to_the_template(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    template = (
        "<bos>{{ messages[0].content }}={% if enable_thinking is not defined %}1"
        "{% elif enable_thinking %}2{% else %}3{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    for flags, told in ([], "1"), (["--enable_thinking=true"], "2"), (["--enable_thinking=false"], "3"):
        trace = tmp_path / f"{told}.json"
        command(f"--checkpoint={folder}", "--prompt=26+0+10", f"--trace={trace}", *FLAGS, *flags)
        assert json.loads(trace.read_text())["prompt_ids"] == [*SUM, int(told) + 4]
    assert_refused(command(f"--checkpoint={folder}", "--enable_thinking=no"), "--enable_thinking")


def open_model(folder: Path, *flags: str):
    parser = Parser()
    opening.add_decoding_flags(parser)
    return opening.open_model(parser.parse_args([f"--checkpoint={folder}", *flags])).defaults


def test_dtype(checkpoint):
    parser = Parser()
    opening.add_decoding_flags(parser)
    for flags, dtype in (
        ([], jnp.float32),
        (["--dtype=bfloat16"], jnp.bfloat16),
        (["--dtype=float32"], jnp.float32),
    ):
        model, params, *_ = opening.open_model(parser.parse_args([f"--checkpoint={checkpoint}", *flags]))
        assert model.dtype == model.param_dtype == dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


# Mistakes in flags.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gen_length=many"], "--gen_length: invalid int value: 'many'"),
        (["--slot_threshold=high"], "--slot_threshold: invalid float value: 'high'"),
        (["--gen_length=0"], "gen_length must be a whole number from 1 .* found 0"),
        (["--gen_length=-8"], "gen_length .* found -8"),
        (["--slot_size=0"], "slot_size .* found 0"),
        (["--num_blocks=-1"], "num_blocks .* found -1"),
        (
            ["--gen_length=30"],
            "gen_length must be a multiple of num_blocks x slot_size = 4, found gen_length 30",
        ),
        (["--slot_threshold=nan"], "slot_threshold must be a finite number, found nan"),
        (["--token_threshold=-inf"], "token_threshold must be a finite number, found -inf"),
        (["--temperature=-1"], "temperature must be 0 or above, found -1.0"),
        (["--seed=-1"], "seed .* found -1"),
        (["--batch_size=0"], "--batch_size must be at least 1 request, found 0"),
        (["--ahead=-1"], "--ahead must be 0 to 4096 tokens, found -1"),
        (["--tensor=9"], "--tensor must be 1 to the 8 devices there are, found 9"),
        (["--semantics=paper"], "--semantics: invalid choice: 'paper'"),
        (["--method=guess"], "--method: invalid choice: 'guess'"),
        (["--dtype=float8"], "--dtype: invalid choice: 'float8'"),
        (["--first_token=next"], "--first_token is for --method=ar alone, found --method=refusion"),
        (["--tokens_per_step=2"], "--tokens_per_step is for --method=mdm or bd3 alone"),
        (["--cache=dual"], "--cache is for --method=mdm alone"),
        (["--cache=all"], "--cache: invalid choice: 'all'"),
        (["--method=bd3", "--first_token=mask"], "--slot_size is for --method=refusion alone"),
        (["--method=mdm"], "--slot_size is for --method=refusion alone, found --method=mdm"),
        (["--method=ar", "--first_token=last"], "--first_token: invalid choice: 'last'"),
        (["--gen_len=8"], "unrecognized arguments: --gen_len=8"),
        (["surplus"], "unrecognized arguments: surplus"),
        (["--input=requests.jsonl"], "--prompt and --input: give one of the two"),
        (["--output=results.jsonl"], "--output needs --input"),
        (["--prompt=2+2", "--trace=trace.json"], "--trace needs exactly one --prompt"),
        (["--method=ar", "--trace=trace.json"], "--trace needs .* --method=refusion"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_in_flags(checkpoint, flags, message):
    ran = command(f"--checkpoint={checkpoint}", *FLAGS, "--prompt=1+1", *flags)
    assert_refused(ran, message)
    assert ran.out == ""


def test_a_prompt_that_is_no_text(checkpoint):
    assert_refused(command(f"--checkpoint={checkpoint}", "--prompt=\ud800"), "lone surrogate")


def test_the_checkpoint_must_be_named():
    assert_refused(command("--prompt=1+1"), "--checkpoint")


def test_help_names_every_flag_with_its_default():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stopped:
        sample.main(["--help"])
    assert stopped.value.code == 0
    text = " ".join(out.getvalue().split())
    for flag in ("checkpoint", "prompt", "input", "output", "stop", "raw", "dtype", "first_token"):
        assert f"--{flag}" in text
    of = DecodeConfig(mask_id=0, eos_id=0)
    for flag in (
        "gen_length",
        "slot_size",
        "num_blocks",
        "slot_threshold",
        "temperature",
        "seed",
    ):
        assert re.search(rf"--{flag} [NX] [^-]*\(default {re.escape(str(getattr(of, flag)))}\)", text), flag
    assert "(default {'refusion': 0.4, 'mdm': 1.0, 'bd3': 1.0})" in text
    for flag, default in (
        ("semantics", "fixed"),
        ("batch_size", "8"),
        ("block_len", "32"),
        ("cache", "none"),
    ):
        assert re.search(rf"--{flag} .*?\(default {default}\)", text), flag


# Mistakes in files.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "holds no request"),
        (b"\n \n", "holds no request"),
        (b"\xff\xfe", "cannot be read"),
    ],
    ids=["missing", "empty", "blank", "not UTF-8"],
)
def test_inputs_that_hold_no_requests(checkpoint, tmp_path, content, message):
    asked, answered = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    if content is not None:
        asked.write_bytes(content)
    ran = command(f"--checkpoint={checkpoint}", f"--input={asked}", f"--output={answered}")
    assert_refused(ran, f"--input={asked}: {message}")
    assert not answered.exists()


def change_config(folder: Path, **fields: Any) -> None:
    """Sets fields of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def truncate(folder: Path, length: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])


NORM = "model.norm.weight"
DAMAGES = {
    # name: (what is done to the folder, what must be said)
    "no folder": (shutil.rmtree, "is no folder, expected one with config.json and weights"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not readable as JSON"),
    "config is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "config.json: must hold a JSON object",
    ),
    "config lacks a field": (
        lambda f: change_config(f, vocab_size=None),
        "config.json: field 'vocab_size' must be int",
    ),
    "another architecture": (
        lambda f: change_config(f, model_type="gpt2"),
        "model_type must be one of .* found 'gpt2'",
    ),
    "odd heads": (
        lambda f: change_config(f, num_attention_heads=3),
        "config.json: num_heads must be a multiple",
    ),
    "no EOS id": (lambda f: change_config(f, eos_token_id=None), "config.json: eos_token_id is missing"),
    "no mask id": (
        lambda f: change_config(f, mask_token_id=None, objective="mdm"),
        "config.json: mask_token_id is missing",
    ),
    "mask outside": (
        lambda f: change_config(f, mask_token_id=64),
        "mask_token_id is 64, expected an id .* 0 to 63",
    ),
    "mask is EOS": (lambda f: change_config(f, mask_token_id=2), "mask_token_id and eos_token_id are both 2"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer found"),
    "no weights": (
        lambda f: (f / WEIGHTS).unlink(),
        "holds neither model.safetensors nor model.safetensors.index",
    ),
    "weights cut short": (lambda f: truncate(f, 1_000_000), f"{WEIGHTS}: cut short"),
    "header cut short": (lambda f: truncate(f, 100), f"{WEIGHTS}: cut short"),
    "empty weights": (lambda f: truncate(f, 0), f"{WEIGHTS}: cut short"),
    "an extra tensor": (
        lambda f: change_tensors(f, lambda tensors: tensors.update(extra=np.zeros(3, np.float32))),
        f"{WEIGHTS}: tensor 'extra' belongs to no part of this model",
    ),
    "a missing tensor": (
        lambda f: change_tensors(f, lambda tensors: tensors.pop(NORM)),
        f"tensor '{NORM}' missing",
    ),
    "a misshapen tensor": (
        lambda f: change_tensors(f, lambda tensors: tensors.update({NORM: np.zeros(127, np.float32)})),
        rf"tensor '{NORM}' has shape \(127,\), config.json makes it \(128,\)",
    ),
    "layers missing": (lambda f: change_config(f, num_hidden_layers=5), "tensor 'model.layers.4.* missing"),
    "layers too many": (
        lambda f: change_config(f, num_hidden_layers=3),
        "tensor 'model.layers.3.* belongs to no part",
    ),
    "a missing shard": (
        lambda f: (f / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "shard.safetensors"}}'),
        "names the file 'shard.safetensors', which is not in",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints(tmp_path, name):
    damage, message = DAMAGES[name]
    folder = copied(tmp_path / "model")
    damage(folder)
    asked, answered = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    asked.write_text(json.dumps(GOOD[0]))
    answered.write_text("of another run")
    ran = command(f"--checkpoint={folder}", f"--input={asked}", f"--output={answered}")
    assert_refused(ran, message)
    assert str(folder) in ran.err and ran.out == ""
    assert answered.read_text() == "of another run" and not (tmp_path / "results.jsonl.partial").exists()


def test_an_output_appears_whole_or_not_at_all(tmp_path):
    """Not even a part of it where nothing could be read."""
    asked = tmp_path / "requests.jsonl"
    asked.write_text(json.dumps(GOOD[0]))
    ran = command(
        f"--checkpoint={tmp_path / 'nowhere'}", f"--input={asked}", f"--output={tmp_path / 'results.jsonl'}"
    )
    assert_refused(ran, "nowhere is no folder")
    assert os.listdir(tmp_path) == ["requests.jsonl"]


def test_results_take_their_name_when_they_are_whole(tmp_path):
    """A run that is stopped half-way leaves what was there before."""
    answered = tmp_path / "results.jsonl"
    answered.write_text("of another run")

    def stopped():
        yield {"id": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample.write_results(stopped(), str(answered))
    assert answered.read_text() == "of another run"
    sample.write_results(iter([{"id": 1}, {"id": "ü"}]), str(answered))
    assert lines(answered) == [{"id": 1}, {"id": "ü"}] and os.listdir(tmp_path) == ["results.jsonl"]


@pytest.mark.parametrize("output", ["missing/results.jsonl", "folder"])
def test_outputs_that_cannot_be_written(checkpoint, served, tmp_path, output):
    (tmp_path / "folder").mkdir()
    asked = tmp_path / "requests.jsonl"
    asked.write_text("".join(json.dumps(request) + "\n" for request in GOOD))
    ran = command(f"--checkpoint={checkpoint}", *FLAGS, f"--input={asked}", f"--output={tmp_path / output}")
    assert_refused(ran, f"--output={tmp_path / output}: cannot be written")
    assert sorted(os.listdir(tmp_path)) == ["folder", "requests.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"id": "x", "prompt": "1", "slot_threshold": 1' + "0" * 400 + "}",
            "slot_threshold must be a finite number",
        ),
        ("[" * 100_000, "not JSON"),
        ('{"id": "\\ud800", "prompt_ids": "1"}', "prompt_ids must be a list"),
    ],
    ids=["an integer beyond float", "nested too deep", "a lone surrogate as id"],
)
def test_lines_that_are_hard_to_read(checkpoint, tmp_path, line, message):
    asked, answered = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    asked.write_text(line + "\n")
    ran = command(f"--checkpoint={checkpoint}", *FLAGS, f"--input={asked}", f"--output={answered}")
    assert_refused(ran, f"1 of 1 requests could not be served.*{message}")
    (result,) = lines(answered)
    assert re.search(message, result["error"])
