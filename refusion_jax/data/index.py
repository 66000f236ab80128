"""Encoded examples of a finite source, in files that all processes of a host map into memory.

An index is a folder below `cache_folder()`, named by what determines its content: the source, the tokenizer
and the settings of the encoder. So it is built once per host, and a file that changed or another tokenizer
gets another index.

    meta.json      Meta; written last
    tokens.bin     tokens of all examples, one after another
    ends.npy       int64 [N + 1], where the tokens of each example begin and end
    prompts.npy    int32 [N], tokens of each prompt
    broken.jsonl   the lines of the source that cannot be read, {"where", "error"}
    *.npy          what others derive from it (`Index.derived`)
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from refusion_jax.data.encoding import Encoder
from refusion_jax.data.sources.example import Broken, Example
from refusion_jax.errors import BadInput
from refusion_jax.files import write_atomically

FORMAT = 1  # of the files; another number makes all indexes anew
BATCH = 1024  # examples encoded at a time
UNUSED_DAYS = 30  # after which an index is deleted when another is built
SAY_SECONDS = 10  # between lines that say how far the building is


class Source(Protocol):
    """A finite sequence of examples, read from the first to the last.

    Attributes:
      name: for messages.
    """

    name: str

    def fingerprint(self, cache: Path) -> str:
        """A text that changes with the content; `cache` is a folder for what it takes long to find."""

    def __iter__(self) -> Iterator[Example | Broken]: ...

    def progress(self) -> float:
        """The fraction of the source that the iteration has read."""


@dataclasses.dataclass(frozen=True)
class Meta:
    """What an index says of itself.

    Attributes:
      examples: N.
      tokens: number of tokens of all examples.
      dtype: of a token.
      sha256: of the tokens, see `Identity`.
      broken: number of lines that cannot be read.
      first_broken: messages of the first of them.
    """

    examples: int
    tokens: int
    dtype: str
    sha256: str
    broken: int
    first_broken: list[str]


class Index:
    """The examples of an index that is complete. `index[number]` is (tokens [length], tokens of the prompt).

    Attributes:
      meta: Meta.
      lengths: int64 [N], tokens of each example; 0 if its response is empty.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.meta = Meta(**json.loads((folder / "meta.json").read_text()))
        self._ends = np.load(folder / "ends.npy", mmap_mode="r")
        self._prompts = np.load(folder / "prompts.npy", mmap_mode="r")
        self._tokens = np.zeros(0, self.meta.dtype)
        if self.meta.tokens:
            self._tokens = np.memmap(folder / "tokens.bin", self.meta.dtype, "r", shape=(self.meta.tokens,))
        if not len(self._ends) - 1 == len(self._prompts) == self.meta.examples:
            raise ValueError("its files do not belong together")
        self.lengths = np.diff(self._ends)
        os.utime(folder / "meta.json")  # it was used

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        return self._tokens[self._ends[number] : self._ends[number + 1]], int(self._prompts[number])

    @property
    def broken_lines(self) -> Path | None:
        """A file that lists the lines that cannot be read; None if there are none."""
        return self._folder / "broken.jsonl" if self.meta.broken else None

    def derived(self, name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Arrays that `make` computes from the examples, kept with the index under a name and mapped."""
        folder = self._folder / name
        if not folder.is_dir():
            made = make()
            partial = Path(tempfile.mkdtemp(dir=self._folder))
            try:
                for key, array in made.items():
                    np.save(partial / f"{key}.npy", array)
                partial.rename(folder)
            except OSError:  # the disk is full, or another process was faster
                shutil.rmtree(partial, ignore_errors=True)
                return made
        return {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}


def cache_folder() -> Path:
    """Where indexes are: XDG_CACHE_HOME/refusion_jax/examples, or ~/.cache/refusion_jax/examples."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refusion_jax" / "examples"


def open_index(encoder: Encoder, source: Source, max_broken_share: float) -> Index:
    """The index of a source, built now if it is not there. Several processes may call this at once.

    Args:
      encoder: encodes the examples.
      source: the examples.
      max_broken_share: largest share of lines that cannot be read.

    Raises:
      BadInput: the source cannot be read, holds no example, or more of its lines are broken.
    """
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        index = _cached(cache, encoder, source, max_broken_share)
    except OSError as error:
        index = _uncached(cache, error, encoder, source, max_broken_share)
    _check_broken(source, index.meta.broken, index.meta, max_broken_share)
    return index


def _cached(cache: Path, encoder: Encoder, source: Source, max_broken_share: float) -> Index:
    """The index in the cache. Raises OSError if the cache cannot be written."""
    fingerprint = source.fingerprint(cache)
    key = hashlib.sha256(f"{FORMAT} {fingerprint} {encoder.fingerprint()}".encode()).hexdigest()
    folder = cache / key[:32]
    with _one_at_a_time(cache / f"{key[:32]}.lock", source.name):
        with contextlib.suppress(OSError, ValueError, TypeError, EOFError):
            return Index(folder)
        shutil.rmtree(folder, ignore_errors=True)  # damaged
        _delete_unused(cache)
        partial = Path(tempfile.mkdtemp(dir=cache))
        try:
            _build(partial, encoder, source, max_broken_share)
            if source.fingerprint(cache) != fingerprint:
                raise BadInput(f"{source.name}: changed while it was read; start again")
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return Index(folder)


def _uncached(cache: Path, why: OSError, encoder: Encoder, source: Source, max_broken_share: float) -> Index:
    """An index in a temporary folder that ends with this process."""
    print(f"{cache}: cannot be written ({why.strerror}), examples are encoded anew", file=sys.stderr)
    temporary = tempfile.TemporaryDirectory(prefix="examples-")
    _build(Path(temporary.name), encoder, source, max_broken_share)
    index = Index(Path(temporary.name))
    index.temporary = temporary  # deleted with the index
    return index


@contextlib.contextmanager
def _one_at_a_time(path: Path, name: str) -> Iterator[None]:
    """A context that one process of the host is in; it frees itself if the process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waits_since = time.monotonic()
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if time.monotonic() > waits_since + SAY_SECONDS:
                    print(f"{name}: another process of this host encodes it, waiting", file=sys.stderr)
                    waits_since = float("inf")
                time.sleep(0.05)
        yield


def _delete_unused(cache: Path) -> None:
    for meta in cache.glob("*/meta.json"):
        with contextlib.suppress(OSError):
            if time.time() - meta.stat().st_mtime > UNUSED_DAYS * 86400:
                shutil.rmtree(meta.parent, ignore_errors=True)
                Path(f"{meta.parent}.lock").unlink(missing_ok=True)


def _build(folder: Path, encoder: Encoder, source: Source, max_broken_share: float) -> None:
    """Writes the files of an index into an empty folder."""
    dtype = np.dtype(np.uint16 if encoder.highest_id < 2**16 else np.uint32)
    digest, ends, prompts, batch = hashlib.sha256(), [0], [], []
    broken, first_broken = 0, []
    say = _Progress(source)

    def write(file: IO[bytes]) -> None:
        for encoded in encoder.encode(batch, range(len(prompts), len(prompts) + len(batch))):
            tokens = np.array([len(encoded.prompt), *encoded.prompt, *encoded.response], np.int64)
            digest.update(tokens)
            file.write(tokens[1:].astype(dtype))
            ends.append(ends[-1] + encoded.length)
            prompts.append(len(encoded.prompt))
        batch.clear()
        say(len(prompts))

    with (folder / "tokens.bin").open("wb") as tokens, (folder / "broken.jsonl").open("w") as report:
        for example in source:
            if isinstance(example, Broken):
                broken += 1
                report.write(json.dumps(example._asdict()) + "\n")
                if len(first_broken) < 3:
                    first_broken.append(f"{example.where}: {example.error}")
                if broken == BATCH and not prompts and not batch and max_broken_share < 1:
                    raise BadInput(f"{first_broken[0]}, and so are the {BATCH - 1:,} lines after it")
                continue
            batch.append(example)
            if len(batch) == BATCH:
                write(tokens)
        write(tokens)
    np.save(folder / "ends.npy", np.array(ends, np.int64))
    np.save(folder / "prompts.npy", np.array(prompts, np.int32))
    meta = Meta(len(prompts), ends[-1], dtype.name, digest.hexdigest(), broken, first_broken)
    _check_broken(source, broken, meta, max_broken_share)
    if not prompts:
        raise BadInput(f"{source.name}: holds no examples")
    write_atomically(folder / "meta.json", json.dumps(dataclasses.asdict(meta)))


def _check_broken(source: Source, broken: int, meta: Meta, most: float) -> None:
    if broken > most * (broken + meta.examples):
        raise BadInput(
            f"{meta.first_broken[0]}; {broken:,} of {broken + meta.examples:,} lines of {source.name} are "
            f"broken, at most a share of {most:g} may be (data.max_broken_share)"
        )


class _Progress:
    """Prints a line every SAY_SECONDS."""

    def __init__(self, source: Source):
        self._source, self._last = source, time.monotonic()

    def __call__(self, examples: int) -> None:
        if time.monotonic() > self._last + SAY_SECONDS:
            self._last = time.monotonic()
            share = self._source.progress()
            print(
                f"{self._source.name}: {examples:,} examples encoded, {share:.0%}",
                file=sys.stderr,
                flush=True,
            )
