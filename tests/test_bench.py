"""The bench command: its figures, and its error messages."""

import functools
import json
import re
from pathlib import Path

import pytest

from refusion_jax import bench, sample
from refusion_jax.benchmarks import decode as bench_decode
from refusion_jax.benchmarks import train as bench_train

TINY = str(Path(__file__).parents[1] / "configs" / "tiny.py")
SMALL = [
    "--config.model.num_layers=1",
    "--config.train.batch_size=4",
    "--config.train.microbatches=1",
    "--steps=2",
]


def run(*arguments: str) -> int:
    return bench.main(["train", f"--config={TINY}", *arguments])


def test_a_row_for_each_number_of_devices(tmp_path, capsys):
    """Rows of random tokens are full."""
    file = tmp_path / "figures.json"
    assert run(*SMALL, "--devices=1,4", f"--output={file}") == 0
    rows = json.loads(file.read_text())
    assert [(row["devices"], row["rows"]) for row in rows] == [(1, 4), (4, 16)]
    for row in rows:
        assert set(bench_train.COLUMNS) <= row.keys() and row["mfu"] is None and row["padding"] == 0
        assert all(row[name] > 0 for name in bench_train.COLUMNS.keys() - {"mfu", "padding"})
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == list(bench_train.COLUMNS) and len(lines) == 2
    assert [len(line.split()) for line in lines] == [len(bench_train.COLUMNS)] * 2


def test_real_data_and_packing(tmp_path):
    file = tmp_path / "figures.json"
    packed = ["--config.data.packing=True", "--config.data.max_length=256", "--config.train.loss_chunks=2"]
    assert run(*SMALL, *packed, "--real_data", "--devices=1", f"--output={file}") == 0
    (row,) = json.loads(file.read_text())
    assert 0 < row["padding"] < 0.1


@pytest.mark.long
@pytest.mark.parametrize("objective", ["ar", "mdm", "bd3"])
def test_other_objectives(tmp_path, objective):
    file = tmp_path / "figures.json"
    flags = ["--config.train.batch_size=2", f"--config.objective={objective}", f"--output={file}"]
    assert run(*SMALL, *flags, "--devices=1", "--steps=1") == 0
    (row,) = json.loads(file.read_text())
    assert row["step_ms"] > 0 and row["noise_ms"] > 0


ORACLE = Path(__file__).parent / "data" / "oracle" / "tiny_a"
DECODING = ["--gen_length=32", "--slot_size=8", "--num_blocks=2", "--repeats=1", "--dtype=float32"]


@pytest.fixture(autouse=True)
def copies_of_16_mb(monkeypatch):
    """A CPU would take a minute for copies of 2 GB."""
    smaller = functools.partial(bench_decode.memory_bandwidth, 1 << 24)
    monkeypatch.setattr(bench_decode, "memory_bandwidth", smaller)


def run_decode(*arguments: str) -> int:
    return bench.main(["decode", *DECODING, *arguments])


def test_decoding_of_a_shape(tmp_path, capsys, monkeypatch):
    """Passes when nothing is accepted: refusion takes one verification and seven rounds per slot, ar one pass
    per token, mdm and bd3 commit tokens_per_step per pass."""
    monkeypatch.setattr(bench_decode, "memory_bandwidth", lambda: 1e10)
    file = tmp_path / "figures.json"
    flags = ["--prompt_length=8", "--slot_threshold=2", "--token_threshold=2", f"--output={file}"]
    flags += ["--method=refusion,ar,mdm,bd3", "--tokens_per_step=4", "--cache=dual", "--block_len=8"]
    assert run_decode(f"--config={TINY}", "--config.model.num_layers=1", *flags) == 0
    rows = json.loads(file.read_text())
    assert [row["method"] for row in rows] == ["refusion", "ar", "mdm", "bd3"]
    assert [row["passes"] for row in rows] == [1 + 4 * 8, 32, 8, 8]
    for row in rows:
        assert row["tokens"] == 32
        assert row["tokens_s"] > 0 and row["limit_ms"] > 0 and row["of_limit"] > 0
        assert row["per_pass"] == pytest.approx(row["tokens"] / row["passes"])
    _, header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == list(bench_decode.COLUMNS) and len(lines) == 4


@pytest.mark.long
def test_a_recorded_course_is_replayed_by_another_model(tmp_path):
    """With meaningless weights, replaying the decode of a trained model takes as many passes and tokens."""
    requests, results, file = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "figures.json"))
    asked = {"gen_length": 32, "slot_size": 8, "num_blocks": 2, "token_threshold": 0.6, "trace": True}
    prompts = [record["prompt"] for record in json.loads((ORACLE / "ar.json").read_text())["cases"][:3]]
    lines = [json.dumps({"id": i, "prompt_ids": p} | asked) + "\n" for i, p in enumerate(prompts)]
    requests.write_text("".join(lines))
    folder = [f"--checkpoint={ORACLE}", f"--input={requests}", f"--output={results}", "--ahead=64"]
    assert sample.main([*folder, "--batch_size=1"]) == 0
    recorded = [json.loads(line) for line in results.read_text().splitlines()]
    flags = ["--batch_size=3", "--method=refusion", f"--replay={results}", "--ahead=64", f"--output={file}"]
    assert run_decode(f"--config={TINY}", "--config.model.num_layers=1", *flags) == 0
    (row,) = json.loads(file.read_text())
    # The replay has no EOS, which could discard a speculative plan or cut a slot short.
    assert 0 <= max(result["num_forwards"] for result in recorded) - row["passes"] <= 2
    assert 0 <= row["tokens"] - sum(result["num_tokens"] for result in recorded) < 3 * 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--checkpoint and --config: give one of the two"),
        ([f"--config={TINY}", "--batch_size=0"], "--batch_size: must be a whole number above 0, found '0'"),
        ([f"--config={TINY}", "--repeats=-1"], "--repeats: must be a whole number above 0, found '-1'"),
        ([f"--config={TINY}", "--method=llada"], "--method=llada: must be of refusion, ar, mdm, bd3"),
        ([f"--config={TINY}", "--gen_length=20"], "gen_length must be a multiple"),
        ([f"--config={TINY}", "--replay=missing.jsonl"], "--replay=missing.jsonl: cannot be read"),
        ([f"--config={TINY}", f"--replay={TINY}"], ":1: must be a result of `sample`"),
    ],
)
def test_mistakes_of_decode_are_one_line(capsys, flags, message):
    assert run_decode(*flags) == 2
    assert re.search(re.escape(message), capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--devices=9"], "--devices must be 1 to the 8 available devices, found 9"),
        (["--devices=0"], "--devices: must be a whole number above 0, found '0'"),
        (["--devices=two"], "--devices: must be a whole number above 0, found 'two'"),
        (["--steps=0"], "--steps: must be a whole number above 0, found '0'"),
        (["--config.no_such=1"], "no_such"),
        (["--output=missing/figures.json"], "--output=missing/figures.json: cannot be written"),
        (["--config.train.microbatches=3"], "train.batch_size must be a multiple of"),
    ],
)
def test_mistakes_are_one_line(capsys, flags, message):
    assert run(*flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(re.escape(message), line), line
