"""The bench command: what it measures, and what it says of mistakes."""

import json
import re
from pathlib import Path

import pytest

from refusion_jax import bench, bench_train

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
    """Random rows, full but for the packed ones of real data."""
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--devices=9"], "--devices=9: must be numbers with commas, 1 to 8"),
        (["--devices=0"], "--devices=0: must be"),
        (["--devices=two"], "--devices=two: must be"),
        (["--steps=0"], "--steps=0: must be at least 1"),
        (["--config.no_such=1"], "no_such"),
        (["--output=missing/figures.json"], "--output=missing/figures.json: cannot be written"),
        (["--config.train.microbatches=3"], "train.batch_size must be a multiple of"),
    ],
)
def test_mistakes_are_one_line(capsys, flags, message):
    assert run(*flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(re.escape(message), line), line
