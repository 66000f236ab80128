"""Requests of a file by length and by memory."""

import dataclasses
import json

import jax.numpy as jnp
import pytest
from test_sample_methods import command

from refusion_jax.baselines.decoders.config import ARConfig, MDMConfig
from refusion_jax.errors import BadInput
from refusion_jax.model.config import ModelConfig
from refusion_jax.serving import admission
from refusion_jax.serving.admission import by_length, bytes_needed, check_fits, rows_that_fit
from refusion_jax.serving.requests import Request

CONFIG = ModelConfig(260, 2, 16, 4, 2, 8, 32)
CACHED = 2 * 2 * 2 * 8 * 4  # bytes of keys and values of a token in float32


def request(prompt: int, gen_length: int = 100) -> Request:
    return Request(0, [5] * prompt, ARConfig(3, 2, gen_length))


def test_requests_of_about_the_same_length_share_a_batch():
    lengths = [400, 5, 413, 5000, 412, 3996, 3997]
    assert by_length([request(n) for n in lengths]) == [[0, 1, 4], [2, 5], [3, 6]]


def test_memory_of_a_request():
    assert bytes_needed(request(50), CONFIG, jnp.float32) == 150 * (CACHED + 3 * 4 * 4 * 50)


def test_a_long_prompt_needs_memory_for_a_chunk_alone():
    """But MDM, where every token sees every other, feeds it whole."""
    assert bytes_needed(request(9900), CONFIG, jnp.float32) == 10_000 * (CACHED + 3 * 4 * 4 * 1024)
    whole = dataclasses.replace(request(9900), config=MDMConfig(3, 2, 100))
    assert bytes_needed(whole, CONFIG, jnp.float32) == 10_000 * (CACHED + 3 * 4 * 4 * 9900)


def test_what_does_not_fit_is_refused(monkeypatch):
    needed = bytes_needed(request(50), CONFIG, jnp.float32)
    for free in (None, needed):
        monkeypatch.setattr(admission, "free_bytes", lambda free=free: free)
        check_fits(request(50), CONFIG, jnp.float32)
    monkeypatch.setattr(admission, "free_bytes", lambda: needed - 1)
    with pytest.raises(BadInput, match=r"a prompt of 50 tokens and gen_length 100 need about 0\.0 GiB"):
        check_fits(request(50), CONFIG, jnp.float32)


def test_as_many_rows_as_there_is_memory_for(monkeypatch):
    needed = bytes_needed(request(50), CONFIG, jnp.float32)
    for more, rows in ((0, 1), (149 * CACHED, 1), (150 * CACHED, 2), (10**9, 8)):
        monkeypatch.setattr(admission, "free_bytes", lambda more=more: needed + more)
        assert rows_that_fit([request(1), request(50)], 8, CONFIG, jnp.float32) == rows


def test_free_memory(monkeypatch, tmp_path):
    assert admission.free_bytes() > 2**20
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:   12 kB\n")
    monkeypatch.setattr(admission, "MEMINFO", tmp_path / "meminfo")
    assert admission.free_bytes() == 12 * 1024
    monkeypatch.setattr(admission, "MEMINFO", tmp_path / "none")
    assert admission.free_bytes() is None


def test_one_request_too_long_loses_no_other(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(admission, "free_bytes", lambda: 2**30)
    asked = tmp_path / "requests.jsonl"
    prompts = {"a": [5, 6], "long": [5] * 200_000, "middle": [5] * 600, "b": [6, 7]}
    lines = [json.dumps({"id": name, "prompt_ids": ids, "gen_length": 4}) for name, ids in prompts.items()]
    asked.write_text("\n".join(lines) + "\n")
    ran = command(f"--checkpoint={checkpoint}", "--method=ar", "--first_token=next", f"--input={asked}")
    answers = [json.loads(line) for line in ran.out.splitlines()]
    assert ran.code == 2 and [answer["id"] for answer in answers] == list(prompts)
    assert [name for answer, name in zip(answers, prompts, strict=True) if "error" in answer] == ["long"]
    assert "a prompt of 200,000 tokens and gen_length 4 need about" in answers[1]["error"]
