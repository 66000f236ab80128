"""Builds the files of an index (see `index`): encodes a source, once."""

import dataclasses
import hashlib
import json
import os
import sys
import time
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from refusion_jax.data.encoding import Encoded, Encoder
from refusion_jax.data.sources.example import Broken, Example
from refusion_jax.errors import BadInput
from refusion_jax.files import write_atomically

BATCH = 1024  # examples encoded at a time
SAY_SECONDS = 10  # between lines that say how far the building is


class Source(Protocol):
    """A finite sequence of examples, read from the first to the last.

    Attributes:
      name: for messages.
    """

    name: str

    def fingerprint(self, cache: Path) -> str:
        """A text that changes with the content; `cache` is a folder for what it takes long to find."""

    def entries(self) -> Iterator[tuple[str, Example] | Broken]:
        """Yields ("FILE:LINE", example), or what cannot be read."""

    def progress(self) -> float:
        """The fraction of the source that `entries` has read."""


@dataclasses.dataclass(frozen=True)
class Meta:
    """What an index says of itself.

    Attributes:
      examples: N.
      tokens: number of tokens of all examples.
      dtype: of a token.
      sha256: of the tokens, see `Identity`.
      broken: number of lines that cannot be used.
      first_broken: message of the first of them; empty if there are none.
    """

    examples: int
    tokens: int
    dtype: str
    sha256: str
    broken: int
    first_broken: str


def build(folder: Path, encoder: Encoder, source: Source, max_broken_share: float) -> None:
    """Writes the files of an index into an empty folder.

    Raises:
      BadInput: the source cannot be read, has no example, or more than `max_broken_share` of it are broken.
      OSError: the disk is full.
    """
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "broken.jsonl").open("w") as broken:
        builder = _Builder(encoder, source, tokens, broken)
        for entry in source.entries():
            builder.add(entry)
            if builder.broken == BATCH and not builder.has_examples and max_broken_share < 1:
                raise BadInput(f"{builder.first_broken}, and so are the {BATCH - 1:,} lines after it")
        builder.write()
        _sync(tokens)
    meta = builder.meta()
    report = folder.with_name(f"{folder.stem}-broken.jsonl")
    if meta.broken:
        report.write_bytes((folder / "broken.jsonl").read_bytes())
    check_broken(source, meta, max_broken_share, report)
    report.unlink(missing_ok=True)
    if not meta.examples:
        raise BadInput(f"{source.name}: holds no examples")
    for name, values in builder.arrays().items():
        save(folder / f"{name}.npy", values)
    write_atomically(folder / "meta.json", json.dumps(dataclasses.asdict(meta)))


def check_broken(source: Source, meta: Meta, most: float, report: Path | None) -> None:
    """Raises BadInput if more than the share `most` of a source is broken; `report` lists what."""
    lines = meta.broken + meta.examples
    if meta.broken > most * lines:
        raise BadInput(
            f"{meta.first_broken}; {meta.broken:,} of {lines:,} lines of {source.name} are broken, at most a "
            f"share of {most:g} may be (data.max_broken_share); {report} lists them"
        )


def save(path: Path, values: np.ndarray) -> None:
    """Writes a .npy file that is on the disk when this returns."""
    with path.open("wb") as file:
        np.save(file, values)
        _sync(file)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


class _Builder:
    """Takes the entries of a source one by one and writes their tokens.

    Attributes:
      broken: number of broken lines so far.
      first_broken: message of the first.
    """

    def __init__(self, encoder: Encoder, source: Source, tokens: IO[bytes], report: IO[str]):
        self.broken, self.first_broken = 0, ""
        self._encoder, self._source, self._tokens, self._report = encoder, source, tokens, report
        self._dtype = np.dtype(np.uint16 if encoder.highest_id < 2**16 else np.uint32)
        self._digest = hashlib.sha256()
        self._ends, self._prompts, self._sums = array("q", [0]), array("i"), array("I")
        self._waiting: list[tuple[str, Example]] = []
        self._said_at = time.monotonic()

    @property
    def has_examples(self) -> bool:
        return bool(self._prompts or self._waiting)

    def add(self, entry: tuple[str, Example] | Broken) -> None:
        if isinstance(entry, Broken):
            self._add_broken(entry)
            return
        self._waiting.append(entry)
        if len(self._waiting) == BATCH:
            self.write()

    def write(self) -> None:
        """Encodes and writes the examples that wait."""
        waiting, self._waiting = self._waiting, []
        first = len(self._prompts)
        try:
            encoded = self._encoder.encode(
                [example for _, example in waiting], range(first, first + len(waiting))
            )
        except BadInput:  # of the chat template: one by one, to find which
            for where, example in waiting:
                try:
                    (one,) = self._encoder.encode([example], [len(self._prompts)])
                except BadInput as error:
                    self._add_broken(Broken(where, str(error)))
                else:
                    self._write(one)
        else:
            for one in encoded:
                self._write(one)
        if time.monotonic() > self._said_at + SAY_SECONDS:
            self._said_at = time.monotonic()
            done = f"{len(self._prompts):,} examples encoded, {self._source.progress():.0%}"
            print(f"{self._source.name}: {done}", file=sys.stderr, flush=True)

    def _write(self, encoded: Encoded) -> None:
        tokens = np.array([len(encoded.prompt), *encoded.prompt, *encoded.response], np.int64)
        self._digest.update(tokens)
        content = tokens[1:].astype(self._dtype)
        self._tokens.write(content)
        self._ends.append(self._ends[-1] + encoded.length)
        self._prompts.append(len(encoded.prompt))
        self._sums.append(zlib.crc32(content))

    def _add_broken(self, line: Broken) -> None:
        self.broken += 1
        self.first_broken = self.first_broken or f"{line.where}: {line.error}"
        self._report.write(json.dumps(line._asdict()) + "\n")

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the index, by the names of their files."""
        return {
            "ends": np.array(self._ends, np.int64),
            "prompts": np.array(self._prompts, np.int32),
            "sums": np.array(self._sums, np.uint32),
        }

    def meta(self) -> Meta:
        sha256, dtype = self._digest.hexdigest(), self._dtype.name
        return Meta(len(self._prompts), self._ends[-1], dtype, sha256, self.broken, self.first_broken)
