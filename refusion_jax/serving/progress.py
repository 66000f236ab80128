"""Outputs that a stopped run can continue: `--resume` and `--overwrite`.

A run writes each result to OUTPUT.partial as soon as it is there, in any order, with the index of its
request in front, and OUTPUT in the order of the requests at the end. OUTPUT.run.json records what the results
depend on and stays beside OUTPUT. A run that resumes must agree with it.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax.numpy as jnp

from refusion_jax.checkpoints.checksums import fingerprint
from refusion_jax.errors import BadInput
from refusion_jax.files import open_atomically, read_json, write_atomically
from refusion_jax.serving.opened import Opened
from refusion_jax.serving.requests import Request
from refusion_jax.serving.results import to_json

FIRST = '{{"request": {}, '  # what a line of OUTPUT.partial begins with


class Progress:
    """The results so far of a run, and the record of what they depend on.

    `check` before anything slow, `start` once the requests are known, `add` for each result, then `finish`.

    Attributes:
      path: the output, a regular file or none yet.
      partial, record: OUTPUT.partial and OUTPUT.run.json.
      is_whole: whether the output was complete when the run started; then `start` opened nothing.
    """

    def __init__(self, path: str | Path, *, resume: bool = False, overwrite: bool = False):
        self.path = Path(os.path.realpath(path))
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.record = self.path.with_name(f"{self.path.name}.run.json")
        self.is_whole = False
        self._resume, self._overwrite = resume, overwrite
        self._file: IO[bytes] | None = None
        self._places: dict[int, tuple[int, int]] = {}  # index of a request -> its line's start and length

    def check(self, *others: Path) -> None:
        """Raises BadInput if there is an output and neither flag says what to do with it.

        Args:
          others: files that belong to the output besides `path` and `partial`.
        """
        if self._resume and self._overwrite:
            raise BadInput("--resume and --overwrite: give one of the two")
        if self._overwrite:
            return
        there = [path for path in (self.path, self.partial, *others) if has_content(path)]
        if there and not self._resume:
            raise BadInput(
                f"--output: {there[0]} exists, expected --resume to continue the run that wrote it or "
                "--overwrite to replace it"
            )
        if there and not self.record.exists():
            raise BadInput(
                f"--resume: {there[0]} exists without {self.record.name}, which tells what it was made from; "
                "expected --overwrite"
            )

    def start(self, run: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        """Opens the output for `add` and returns the results in `partial`, by index of their request.

        Args:
          run: what the results depend on, JSON values by name; `requests` is a list of digests.

        Raises:
          BadInput: the results that are there were made from something else.
        """
        run = json.loads(json.dumps(run))
        if self._resume and self.partial.exists() and self.record.exists():
            require_same(read_json(self.record), run)
            return self._continue()
        if self._resume and has_content(self.path):
            require_same(read_json(self.record), run)
            self.is_whole = True
            return {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # In this order no record is ever beside results of another run that it could be taken for.
        self._file = self.partial.open("wb")
        write_atomically(self.record, json.dumps(run, ensure_ascii=False) + "\n")
        return {}

    def _continue(self) -> dict[int, dict[str, Any]]:
        """The results in `partial`, which is opened after them. A line cut short by a kill is dropped."""
        kept = {}
        self._file = self.partial.open("r+b")
        start = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                answer = json.loads(line)
                index = answer.pop("request")
                kept[index] = answer
                self._places[index] = start, len(line)
            except (ValueError, KeyError, TypeError, AttributeError):
                pass  # after a loss of power a block may hold anything; its requests are decoded again
            start += len(line)
        self._file.truncate(start)
        self._file.seek(start)
        return kept

    def add(self, index: int, answer: Mapping[str, Any]) -> None:
        """Writes a result at once."""
        line = f"{to_json({'request': index} | dict(answer))}\n".encode()
        self._places[index] = self._file.tell(), len(line)
        self._file.write(line)
        self._file.flush()

    def finish(self) -> None:
        """Writes the output, in the order of the requests, and removes `partial`."""
        with open_atomically(self.path) as file:
            for line in self._in_order():
                file.write(line)
        self.discard()

    def discard(self) -> None:
        """Removes `partial`, for a caller that wrote the output itself."""
        self._file.close()
        self.partial.unlink()

    def _in_order(self) -> Iterator[bytes]:
        with self.partial.open("rb") as file:
            for index in sorted(self._places):
                start, length = self._places[index]
                file.seek(start)
                yield b"{" + file.read(length)[len(FIRST.format(index)) :]


def has_content(path: Path) -> bool:
    """Whether a file at `path` holds anything."""
    return path.is_file() and path.stat().st_size > 0


def require_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises BadInput that names the first difference of two records of a run, unless they are the same."""
    for name in dict.fromkeys((*now, *before)):
        was, found = before.get(name), now.get(name)
        if was == found or name == "checkpoint":
            continue
        advice = "expected what it was or --overwrite"
        if name == "requests":
            raise BadInput(f"--resume: {_first_difference(was or [], found)}; {advice}")
        if name == "model":
            checkpoint = before.get("checkpoint")
            raise BadInput(f"--resume: the model was another, in {checkpoint} at that time; {advice}")
        raise BadInput(f"--resume: {name} was {json.dumps(was)}, found {json.dumps(found)}; {advice}")


def _first_difference(before: list[str], now: list[str]) -> str:
    for number, (was, found) in enumerate(zip(before, now, strict=False), 1):
        if was != found:
            return f"request {number} was another"
    return f"there were {len(before)} requests, found {len(now)}"


def digest(*parts: Any) -> str:
    """16 hexadecimal digits that tell JSON values apart."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def request_digest(request: Request) -> str:
    """A digest of the prompt's token ids and all settings."""
    prompt = [int(token) for token in request.prompt]
    return digest(request.id, prompt, dataclasses.asdict(request.config), request.trace)


def run_record(checkpoint: str, opened: Opened) -> dict[str, Any]:
    """What the results depend on, besides the requests, for `Progress.start`.

    The number of devices and --batch_size are not in it: they never change the tokens.
    """
    defaults = opened.defaults
    return {
        "checkpoint": checkpoint,
        "method": defaults.method,
        "dtype": jnp.dtype(opened.model.dtype).name,
        "int8": opened.model.int8,
        **defaults.settings,
        "raw": defaults.raw,
        **defaults.template,
        "stop": list(defaults.stop),
        "ahead": defaults.ahead,
        "model": fingerprint(opened.params),
    }
