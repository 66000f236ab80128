"""Shares of accepted drafts by offset, from results of `sample --input` with traces of exact verification.

    python -m refusion_jax.sample --checkpoint=DIR --input=asked.jsonl --output=exact.jsonl --resume
    python -m refusion_jax.sample --checkpoint=DIR --method=ar --input=asked.jsonl --output=ar.jsonl --resume
    python docs/acceptance.py exact.jsonl ar.jsonl

Each request has `"trace": true`. The draft at offset i of a pass is the i-th token after those committed
before it. The table has a row per offset: the drafts verified there, the share accepted, and the share
accepted of those whose earlier drafts in the same pass were all accepted. The second file is optional: with
results of `--method=ar` for the same requests, the last line counts the answers that have the same ids.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Result = Mapping[str, Any]


class Offset(NamedTuple):
    """The drafts at one offset.

    Attributes:
      drafts: drafts verified there.
      reached: those of them whose earlier drafts in the same pass were all accepted.
      accepted: those that were accepted.
    """

    drafts: int
    reached: int
    accepted: int


def results(path: str) -> list[Result]:
    """The results in a file, without those of requests that could not be served."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [answer for answer in map(json.loads, lines) if "error" not in answer]


def passes(answers: Sequence[Result]) -> list[tuple[int, int]]:
    """(drafts verified, drafts accepted) of every pass. Raises ValueError if there is none, or no trace."""
    found = []
    for answer in answers:
        trace = answer.get("trace")
        if not trace or trace[0]["branch"] != "exact":
            raise ValueError(f'id {answer["id"]!r} must have the trace of an exact decode ("trace": true)')
        found += [(step["drafted"], step["accepted"]) for step in trace]
    if not found:
        raise ValueError("the file must hold at least one answer, found none")
    return found


def by_offset(found: Sequence[tuple[int, int]]) -> list[Offset]:
    """The drafts at offset 1, 2, ... up to the most drafts of a pass."""
    most = max(drafted for drafted, _ in found)
    return [
        Offset(
            drafts=sum(drafted >= offset for drafted, _ in found),
            reached=sum(drafted >= offset and accepted >= offset - 1 for drafted, accepted in found),
            accepted=sum(accepted >= offset for _, accepted in found),
        )
        for offset in range(1, most + 1)
    ]


def report(exact: Sequence[Result], ar: Sequence[Result] = ()) -> Iterator[str]:
    """The lines to print."""
    found = passes(exact)
    tokens, idle = sum(answer["num_tokens"] for answer in exact), sum(not drafted for drafted, _ in found)
    yield f"{tokens:,} tokens in {len(found):,} passes: {tokens / len(found):.2f} tokens per pass"
    yield f"{idle / len(found):.1%} of the passes had no drafts to verify"
    yield f"{'offset':>6} {'drafts':>8} {'accepted':>9} {'if reached':>11}"
    for offset, (drafts, reached, accepted) in enumerate(by_offset(found), 1):
        if_reached = f"{accepted / reached:.1%}" if reached else "-"
        yield f"{offset:>6} {drafts:>8,} {accepted / drafts:>9.1%} {if_reached:>11}"
    if ar:
        ids = {answer["id"]: answer["ids"] for answer in ar}
        same = sum(ids.get(answer["id"]) == answer["ids"] for answer in exact)
        yield f"{same} of {len(exact)} answers have the ids of left-to-right decoding"


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python docs/acceptance.py EXACT.jsonl [AR.jsonl]")
    try:
        print(*report(*map(results, sys.argv[1:])), sep="\n")
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"error: {error}")
