"""Many requests of all kinds in one file: each is answered once, in order, alike in any company."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
WARM = 500  # results after which memory must stay
ALONE = 200  # requests that are repeated one at a time
BROKEN = (
    "{",
    "[]",
    '{"id": "x"}',
    '{"id": "x", "prompt": "1+1=", "gen_length": -1}',
    '{"id": "x", "prompt": "1+1=", "slot_size": "many"}',
    '{"id": "x", "prompt": "1+1=", "unknown": 1}',
    '{"id": "x", "prompt_ids": [99999]}',
)


def a_request(number: int, chance: random.Random) -> dict[str, Any]:
    """A request with random settings, some of them at their limits."""
    numbers = [
        str(chance.randrange(10 ** chance.choice((1, 2, 4)))) for _ in range(chance.choice((1, 2, 3, 12)))
    ]
    request = {"id": number, "prompt": "+".join(numbers)}
    request["gen_length"] = chance.choice((16, 32, 64))
    request["slot_size"] = chance.choice((2, 4, 8, 16))
    request["num_blocks"] = chance.choice(
        [n for n in (1, 2, 4) if request["gen_length"] % (n * request["slot_size"]) == 0]
    )
    request["slot_threshold"] = chance.choice((-1.0, 0.3, 0.6, 0.9, 1.0))
    request["token_threshold"] = chance.choice((-1.0, 0.1, 0.5, 1.0))
    if chance.random() < 0.5:
        request |= {"temperature": chance.choice((0.2, 1.0, 3.0)), "seed": chance.randrange(2**31)}
    if chance.random() < 0.3:
        request["verify"] = "exact"
    if chance.random() < 0.05:
        request["trace"] = True
    return request


def write(path: Path, count: int, chance: random.Random) -> dict[int, dict[str, Any]]:
    """Writes requests, a fiftieth of them broken; returns those that are not, by line."""
    lines, good = [], {}
    for number in range(count):
        if chance.random() < 0.02:
            lines.append(chance.choice(BROKEN))
        else:
            good[number] = a_request(number, chance)
            lines.append(json.dumps(good[number]))
    path.write_text("\n".join(lines) + "\n")
    return good


def served(
    checkpoint: Path, asked: Path, output: Path, batch_size: int
) -> tuple[list[dict[str, Any]], list[int]]:
    """The results of a file of requests, and the memory of the process in bytes after every WARM results."""
    flags = [
        f"--checkpoint={checkpoint}",
        f"--input={asked}",
        f"--output={output}",
        f"--batch_size={batch_size}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "refusion_jax.sample", *flags, "--dtype=float32"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    partial, memory = output.with_name(output.name + ".partial"), []
    while process.poll() is None:
        time.sleep(0.2)
        written = partial.read_bytes().count(b"\n") if partial.exists() else 0
        if written >= WARM * (len(memory) + 1):
            status = Path(f"/proc/{process.pid}/status").read_text().split("VmRSS:")
            if len(status) > 1:
                memory.append(1024 * int(status[1].split()[0]))
    assert process.returncode in (0, 2)
    return [json.loads(line) for line in output.read_text().splitlines()], memory


@pytest.mark.parametrize(
    "count", [pytest.param(120, marks=pytest.mark.long), pytest.param(10_000, marks=pytest.mark.soak)]
)
def test_mixed_requests(count, checkpoint, tmp_path):
    chance = random.Random(count)
    good = write(tmp_path / "asked.jsonl", count, chance)
    results, memory = served(checkpoint, tmp_path / "asked.jsonl", tmp_path / "results.jsonl", 16)
    assert len(results) == count
    for number, result in enumerate(results):
        if number in good:
            assert result["id"] == number and "error" not in result, result
            assert len(result["ids"]) <= len(result["raw_ids"]) <= good[number]["gen_length"]
        else:
            assert f"asked.jsonl:{number + 1}: " in result["error"]
    for later in memory[1:]:
        assert later < 1.1 * memory[0], memory
    alone = chance.sample(sorted(good), min(ALONE, count // 10))
    (tmp_path / "alone.jsonl").write_text("".join(json.dumps(good[number]) + "\n" for number in alone))
    again, _ = served(checkpoint, tmp_path / "alone.jsonl", tmp_path / "again.jsonl", 1)
    timed = ("num_forwards", "tokens_per_forward", "trace", "tokens_fed")
    for number, result in zip(alone, again, strict=True):
        there, here = ({k: v for k, v in r.items() if k not in timed} for r in (results[number], result))
        assert there == here
    spread = f"{max(memory) / memory[0]:.2f} times the first" if memory else "not measured"
    print(f"\n{count} requests, {count - len(good)} broken, {len(alone)} again alone; memory {spread}")
