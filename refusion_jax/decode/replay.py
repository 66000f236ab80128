"""Courses of decoding read from results of `sample`, for a decoder to follow whatever its logits say.

With random weights nothing is accepted that a trained model would accept. A course recorded from a trained
model makes a model of any size and any weights run the same plans, refills and commits, so that what they
cost can be measured. EOS is not replayed as a token: a course ends where its record does.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refusion_jax.decode.batch import Replay, Shape
from refusion_jax.decode.config import DecodeConfig, quoted
from refusion_jax.errors import BadInput

Course = Sequence[Mapping[str, Any]]  # the "trace" of a result
KEYS = ("start", "planned", "branch", "accepted", "committed")


def read_courses(path: Path) -> list[Course]:
    """The traces in a file of results, one JSON object a line.

    Raises:
      BadInput: it cannot be read, or a line has no trace as `sample` writes it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--replay={path}: cannot be read ({error})") from None
    courses = []
    for number, line in enumerate(filter(str.strip, lines), 1):
        try:
            course = json.loads(line)["trace"]
            courses.append([{key: step[key] for key in KEYS} for step in course])
        except (ValueError, KeyError, TypeError):
            wanted = 'a result of `sample` for a request with "trace": true'
            raise BadInput(f"{path}:{number}: must be {wanted}, found {quoted(line)}") from None
    if not all(courses) or not courses:
        raise BadInput(f"--replay={path}: must hold results with plans, found none")
    return courses


def replay(courses: Sequence[Course], config: DecodeConfig, shape: Shape) -> Replay:
    """The courses as rows of a batch, repeated from the first until there are `shape.rows`.

    Args:
      courses: recorded with the slot size and the block length of `config`.
      config: of every row.
      shape: the padded sizes.

    Raises:
      BadInput: a course does not fit the settings.
    """
    planned = np.zeros((shape.rows, shape.iterations, shape.slots), bool)
    accepted = np.zeros((shape.rows, shape.iterations, shape.block), np.int32)
    lengths = np.zeros(shape.rows, np.int32)
    size = config.slot_size
    for row in range(shape.rows):
        course = courses[row % len(courses)]
        most = config.response_len // size
        if len(course) > most:
            raise BadInput(f"--replay: at most {most} plans fit the settings, found {len(course)}")
        lengths[row] = len(course)
        for i, step in enumerate(course):
            for slot, runs in _runs(step, config):
                planned[row, i, slot] = True
                accepted[row, i, slot * size :][: len(runs)] = runs
    return Replay(planned, accepted, lengths)


def _runs(step: Mapping[str, Any], config: DecodeConfig) -> Iterator[tuple[int, list[int]]]:
    """(slot, tokens accepted when verified and after each refill) of the slots of a plan."""
    committed, size = set(step["committed"]), config.slot_size
    for place, runs in zip(step["planned"], step["accepted"], strict=True):
        slot, offset = divmod(place - step["start"], size)
        whole = committed & set(range(place, place + size))
        if offset or not runs or max(runs) > size or place - step["start"] >= config.block_len:
            raise BadInput(
                f"--replay: no slot of {size} tokens in a block of {config.block_len}: {quoted(step)}"
            )
        # A slot that ended with EOS, or left because of one, counts as whole: there is no EOS to find.
        if whole or step["branch"] == "iterative":
            runs = [*runs[:-1], size]
        yield slot, runs
