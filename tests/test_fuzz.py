"""Mutated files: a reader accepts them or refuses them with a line, and does nothing else.

`make fuzz` reads 100,000 per reader, in worker processes that may crash or hang; here are a few hundred.
"""

import os

import pytest

pytest.importorskip("gguf")
from fuzzing.readers import READERS
from fuzzing.runner import Tally, outcomes, run

QUICK = 200  # cases per reader


@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_is_accepted_or_refused_with_a_line(name):
    tally = Tally()
    for number, found in enumerate(outcomes(READERS[name], 0, QUICK)):
        tally.add(number, found)
    assert not tally.faults
    assert min(tally.outcomes["refused"], tally.outcomes["accepted"]) > QUICK // 50


@pytest.mark.fuzz
@pytest.mark.parametrize("name", READERS)
def test_very_many(name, capsys):
    cases, seed = int(os.environ.get("FUZZ_CASES", 100_000)), int(os.environ.get("FUZZ_SEED", 1))
    with capsys.disabled():
        tally = run(name, cases, seed)
        refused, accepted = tally.outcomes["refused"], tally.outcomes["accepted"]
        print(
            f"| {name} | {tally.tried:,} | {refused:,} | {accepted:,} | {len(tally.faults):,} |", flush=True
        )
    assert not tally.faults
