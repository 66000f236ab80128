"""Recorded decodes ("courses"), read from results of `sample`. A decoder repeats them whatever its logits.

A model with random weights does not accept the drafts that a trained model accepts. Repeating the course of a
trained model makes a model of any size, with any weights, execute the same plans, refills and commits, so
that their cost can be measured. EOS is not replayed as a token: a course ends where its recording ends.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refusion_jax.decode.batch import ExactReplay, Replay, Requests, Shape
from refusion_jax.decode.config import DecodeConfig, quoted
from refusion_jax.errors import BadInput

Course = Sequence[Mapping[str, Any]]  # the "trace" of a result
KEYS = ("start", "planned", "branch", "accepted", "committed")
EXACT_KEYS = ("branch", "start", "drafted", "accepted", "committed")


def read_courses(path: Path) -> list[Course]:
    """The traces in a file of results, one JSON object per line.

    Raises:
      BadInput: the file cannot be read, a line has no trace in the format of `sample`, or a trace is empty.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--replay={path}: cannot be read ({error})") from None
    courses = []
    for number, line in enumerate(filter(str.strip, lines), 1):
        try:
            course = json.loads(line)["trace"]
            keys = EXACT_KEYS if course and course[0]["branch"] == "exact" else KEYS
            courses.append([{key: step[key] for key in keys} for step in course])
        except (ValueError, KeyError, TypeError):
            wanted = 'a result of `sample` for a request with "trace": true'
            raise BadInput(f"{path}:{number}: must be {wanted}, found {quoted(line)}") from None
    if not all(courses) or not courses:
        raise BadInput(f"--replay={path}: must hold results with plans, found none")
    return courses


def replayed(requests: Requests, courses: Sequence[Course], config: DecodeConfig, shape: Shape) -> Requests:
    """Requests whose rows repeat the courses; arguments and errors as in `replay` and `exact_replay`."""
    if config.exact:
        return requests.replace(exact=requests.exact.replace(replay=exact_replay(courses, config, shape)))
    return requests.replace(replay=replay(courses, config, shape))


def exact_replay(courses: Sequence[Course], config: DecodeConfig, shape: Shape) -> ExactReplay:
    """Courses of exact decoding as rows of a batch, repeated in order until there are `shape.rows`.

    Raises:
      BadInput: a course was recorded with `verify` "threshold" or does not fit the settings.
    """
    drafted = np.zeros((shape.rows, shape.gen + 1), np.int32)
    accepted = np.zeros((shape.rows, shape.gen), np.int32)
    lengths = np.zeros(shape.rows, np.int32)
    for row in range(shape.rows):
        course = courses[row % len(courses)]
        if course[0]["branch"] != "exact":
            raise BadInput('--replay: must hold traces of verify "exact", found "threshold"')
        most, tokens = max(step["drafted"] for step in course), sum(step["accepted"] + 1 for step in course)
        if most > config.draft_length or tokens > config.gen_length:
            raise BadInput(
                f"--replay: a course of {tokens} tokens with {most} drafts per pass needs at least that "
                f"gen_length and draft_length, found {config.gen_length} and {config.draft_length}"
            )
        lengths[row] = len(course)
        for i, step in enumerate(course):
            drafted[row, i], accepted[row, i] = step["drafted"], step["accepted"]
    return ExactReplay(drafted, accepted, lengths)


def replay(courses: Sequence[Course], config: DecodeConfig, shape: Shape) -> Replay:
    """The courses as rows of a batch, repeated in order until there are `shape.rows`.

    Args:
      courses: recorded with the slot size and block length of `config`.
      config: the settings of every row.
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
        if course[0]["branch"] == "exact":
            raise BadInput('--replay: must hold traces of verify "threshold", found "exact"')
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
    """Per slot of a plan: (slot, [tokens accepted by the verification, then after each refill])."""
    committed, size = set(step["committed"]), config.slot_size
    for place, runs in zip(step["planned"], step["accepted"], strict=True):
        slot, offset = divmod(place - step["start"], size)
        committed_here = committed & set(range(place, place + size))
        if offset or not runs or max(runs) > size or place - step["start"] >= config.block_len:
            raise BadInput(
                f"--replay: no slot of {size} tokens in a block of {config.block_len}: {quoted(step)}"
            )
        # A slot that ended with EOS, or was dropped because of one, is replayed as complete, because a replay
        # has no EOS to find.
        if committed_here or step["branch"] == "iterative":
            runs = [*runs[:-1], size]
        yield slot, runs
