"""Exact verification through the sample command: files of requests, defaults, several EOS ids, devices."""

import io
import json

import pytest
from rich.console import Console
from sampling import SUM, assert_refused, change_config, command, copied, lines

from refusion_jax.serving import opened as opening
from refusion_jax.serving.engine import fitting_shape, serve
from refusion_jax.serving.requests import parse
from refusion_jax.serving.terminal import live_view
from refusion_jax.tokenizer import load_tokenizer

LENGTH = ["--gen_length=32"]
SMALL = [*LENGTH, "--draft_length=8"]
PROMPTS = [SUM, [*SUM[:-3], 41], SUM[:-1], [*SUM, 9]]


def write(path, requests):
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return path


@pytest.fixture(scope="module")
def exact_requests():
    """Greedy and sampled, of several lengths, with every way to read the first token and borders."""
    requests = []
    for i in range(10):
        request = {"id": i, "prompt_ids": PROMPTS[i % 4], "gen_length": 32 - 3 * i, "draft_length": 1 + i % 8}
        request |= {"first_token": ("mask", "next")[i // 2 % 2], "border": ("ar", "draft")[i % 2]}
        request |= {"temperature": (0, 0, 0.8)[i % 3], "seed": i, "verify": "exact", "trace": i % 2 == 0}
        requests.append(request)
    return requests


def of_file(checkpoint, path, *flags):
    ran = command(f"--checkpoint={checkpoint}", f"--input={path}", *flags)
    assert (ran.code, ran.err) == (0, "")
    return lines(ran.out)


def test_a_file_that_mixes_exact_and_threshold_requests(checkpoint, tmp_path, exact_requests):
    """Exact answers are those of --method=ar at any batch size; the others are as without them."""
    by_slots = [
        {
            "id": f"slots-{i}",
            "prompt_ids": PROMPTS[i],
            "slot_size": 4,
            "token_threshold": 0.1,
            "gen_length": 32,
        }
        for i in range(3)
    ]
    order = [*exact_requests[:4], by_slots[0], *exact_requests[4:], *by_slots[1:]]
    asked = write(tmp_path / "mixed.jsonl", order)
    mixed = {result["id"]: result for result in of_file(checkpoint, asked, *SMALL, "--batch_size=4")}
    left_to_right = of_file(
        checkpoint, write(tmp_path / "exact.jsonl", exact_requests), "--method=ar", "--batch_size=4"
    )
    for want in left_to_right:
        ours = mixed[want["id"]]
        for field in ("text", "ids", "raw_ids", "finish_reason", "num_tokens"):
            assert ours[field] == want[field], want["id"]
        assert ours["num_forwards"] <= want["num_forwards"]
        if ours.get("trace"):
            assert len(ours["trace"]) == ours["num_forwards"]
            places = [place for made in ours["trace"] for place in made["committed"]]
            start = len(PROMPTS[want["id"] % 4])
            assert places == list(range(start, start + ours["num_tokens"]))
            assert all(made["accepted"] <= made["drafted"] <= 8 for made in ours["trace"])
            for made in ours["trace"]:
                last = ours["raw_ids"][made["committed"][-1] - start]
                assert made["bonus"] in (last, None) and made["branch"] == "exact"
    alone = of_file(checkpoint, write(tmp_path / "slots.jsonl", by_slots), "--batch_size=4")
    for want in alone:
        assert mixed[want["id"]]["raw_ids"] == want["raw_ids"]
        assert mixed[want["id"]]["num_iterations"] == want["num_iterations"]


@pytest.mark.long
@pytest.mark.parametrize("flags", [["--tensor=2"], ["--int8"]], ids=str)
def test_on_several_devices_and_in_int8(checkpoint, tmp_path, exact_requests, flags):
    asked = write(tmp_path / "exact.jsonl", exact_requests[:4])
    ours = of_file(checkpoint, asked, *SMALL, "--batch_size=4", *flags)
    want = of_file(checkpoint, asked, "--method=ar", "--batch_size=4", *flags)
    assert [result["raw_ids"] for result in ours] == [result["raw_ids"] for result in want]


def test_config_json_chooses_the_defaults(tmp_path):
    folder = copied(tmp_path / "model")
    change_config(folder, verify="exact", first_token="next", border="draft", slot_sizes=[2, 3])
    settings = opening.asked_settings(str(folder), "refusion", {})
    expected = {"verify": "exact", "first_token": "next", "border": "draft", "slot_sizes": (2, 3)}
    assert expected.items() <= settings.items()
    assert opening.asked_settings(str(folder), "refusion", {"verify": "threshold"})["verify"] == "threshold"
    of_ar = opening.asked_settings(str(folder), "ar", {})
    assert (of_ar["first_token"], of_ar["border"], of_ar["slot_sizes"]) == ("next", "draft", (2, 3))
    assert "verify" not in of_ar
    change_config(folder, verify="sometimes")
    assert_refused(command(f"--checkpoint={folder}", "--prompt=1+1"), "verify must be .* found 'sometimes'")


@pytest.mark.long
def test_an_answer_ends_at_any_eos_id(checkpoint, tmp_path):
    """Of config.json and of generation_config.json; `release` knows the tokenizer's only."""
    (plain,) = of_file(
        checkpoint, write(tmp_path / "one.jsonl", [{"id": 1, "prompt_ids": SUM}]), *LENGTH, "--method=ar"
    )
    middle = plain["ids"][len(plain["ids"]) // 2]
    first = plain["ids"].index(middle)
    folder = copied(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, middle]}))
    assert load_tokenizer(folder).eos_ids == (2, middle)
    requests = [{"id": v, "prompt_ids": SUM, "verify": v, "slot_size": 8} for v in ("exact", "threshold")]
    asked = write(tmp_path / "two.jsonl", requests)
    for flags in (["--method=ar"], ["--draft_length=8", "--slot_threshold=-1", "--token_threshold=-1"]):
        for result in of_file(folder, asked, *LENGTH, *flags, "--batch_size=2"):
            if result["id"] == "exact" or "--method=ar" in flags:
                assert result["ids"] == plain["ids"][:first] and result["finish_reason"] == "eos"
            else:
                assert middle not in result["ids"]
    release = write(tmp_path / "release.jsonl", [requests[1] | {"semantics": "release"}])
    settings = [*LENGTH, "--slot_size=8", "--slot_threshold=0.6", "--token_threshold=0.1"]
    assert of_file(folder, release, *settings)[0]["ids"] == of_file(checkpoint, release, *settings)[0]["ids"]
    for wrong in (True, 10**6, 3):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, wrong]}))
        assert_refused(
            command(f"--checkpoint={folder}", "--prompt=1"), "generation_config.json: eos_token_id is"
        )


def test_the_terminal_view(checkpoint):
    """Shows the answer as it grows, and dots for the tokens drafted."""
    opened = opening.open_by([f"--checkpoint={checkpoint}", "--verify=exact", *SMALL])
    raw = {"id": 0, "prompt_ids": SUM}
    request = parse(raw, opened.defaults, opened.tokenizer, opened.model.config.vocab_size)
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=200)
    shape = fitting_shape([request], 1)
    with live_view(console, opened.tokenizer, request) as watch:
        (result,) = serve(opened.model, opened.params, opened.tokenizer, [request], shape, watch=watch)
    text = shown.getvalue()
    assert "·" in text
    assert opened.tokenizer.decode(result["ids"][:1]) in text
