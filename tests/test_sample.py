"""The sample command with a file of requests, good and bad.

Called in this process as `sample.main([...])`, except for one run as a command.
"""

import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from sampling import (
    BAD,
    DEFAULTS,
    FIELDS,
    FLAGS,
    GOOD,
    ROOT,
    SUM,
    Ran,
    assert_passes_add_up,
    assert_refused,
    command,
    lines,
    of,
    recorded_request,
    recordings,
)

from refusion_jax import compilation
from refusion_jax.decode import loop as decode
from refusion_jax.decode.batch import Shape
from refusion_jax.decode.config import DecodeConfig
from refusion_jax.decode.inputs import tokens_ahead


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


def test_nothing_but_the_results_and_their_record_is_left(served):
    left = sorted(os.listdir(served.output.parent))
    assert left == ["requests.jsonl", "results.jsonl", "results.jsonl.run.json"]


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
    """The settings of a request apply, and the flags where it has none."""
    model, params, tokenizer = opened
    # One row, in the shape in which the command starts requests and another test writes a trace.
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
    # The settings change the results; otherwise the comparison would show nothing.
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


def test_a_trace_adds_up(served):
    result = of(served, "never")  # one slot per plan, one forced token per round
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
    """The text is cut before the first stop text; tokens and counts do not change."""
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
    """The settings of some requests given as flags, in the shape that is compiled already."""
    for name in (7, "always", "hot"):
        (request,) = [request for request in GOOD if request["id"] == name]
        flags = [f"--{k}={v}" for k, v in request.items() if k not in ("id", "prompt_ids")]
        # The other requests set every field themselves, which keeps the shape the same.
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
    """In a separate process: exit code 2 for one bad request, no other output, and the same answers."""
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
    compilation.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before  # as set by the environment
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation.use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "refusion_jax")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


# Several devices, other passes, and int8.


@pytest.mark.parametrize(
    "flags",
    [["--tensor=2"], ["--ahead=0", "--batch_size=1"], ["--int8", "--ahead=32", "--batch_size=1"]],
    ids=" ".join,
)
def test_answers_whatever_decodes_them(checkpoint, served, tmp_path, flags):
    """The tokens are the same on two devices, and with one phase per pass and one request at a time. int8
    weights change some answers by rounding."""
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
