"""Encoded examples of a finite source, in files that all processes of a host map into memory.

An index is a folder below `cache_folders()`, named by what determines its content: the source, the tokenizer
and the settings of the encoder. So it is built once per host, and a file that changed or another tokenizer
gets another index.

    meta.json      Meta; written last
    tokens.bin     tokens of all examples, one after another
    ends.npy       int64 [N + 1], where the tokens of each example begin and end
    prompts.npy    int32 [N], tokens of each prompt
    sums.npy       uint32 [N], CRC-32 of the bytes of the tokens of each example
    broken.jsonl   the lines of the source that cannot be used, {"where", "error"}
    NAME/*.npy     what others derive from it (`Index.derived`)
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from refusion_jax.data.encoding import Encoder
from refusion_jax.data.index_builder import Meta, Source, build, check_broken, save
from refusion_jax.errors import BadInput, Failed

FORMAT = 2  # of the files; another number makes all indexes anew
UNUSED_DAYS = 90  # after which an index that nobody opened is deleted when another is built
SAY_SECONDS = 10  # of waiting until a line says so
DAMAGED = (OSError, ValueError, TypeError, KeyError, EOFError)  # what opening broken files may raise


class Index:
    """The examples of an index that is complete. `index[number]` is (tokens [length], tokens of the prompt).

    Attributes:
      meta: Meta.
      lengths: int64 [N], tokens of each example; 0 if its response is empty.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.meta = Meta(**json.loads((folder / "meta.json").read_text()))
        self._ends, self._prompts, self._sums = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ends", "prompts", "sums")
        )
        self._tokens = np.zeros(0, self.meta.dtype)
        if self.meta.tokens:
            self._tokens = np.memmap(folder / "tokens.bin", self.meta.dtype, "r", shape=(self.meta.tokens,))
        if not len(self._ends) - 1 == len(self._prompts) == len(self._sums) == self.meta.examples:
            raise ValueError("its files do not belong together")
        self.lengths = np.diff(self._ends)
        with contextlib.suppress(OSError):  # a cache may be filled by another user
            os.utime(folder / "meta.json")  # it was used

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        """Raises Failed if the tokens are not those that were written."""
        tokens = self._tokens[self._ends[number] : self._ends[number + 1]]
        if zlib.crc32(tokens) != self._sums[number]:
            raise Failed(f"{self._folder}: damaged; delete this folder, it will be made anew")
        return tokens, int(self._prompts[number])

    @property
    def broken_lines(self) -> Path | None:
        """A file that lists the lines that cannot be used; None if there are none."""
        return self._folder / "broken.jsonl" if self.meta.broken else None

    def derived(self, name: str, make: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        """Arrays that `make` computes from the examples, kept with the index under a name and mapped."""
        folder = self._folder / name
        with contextlib.suppress(*DAMAGED):
            keys = json.loads((folder / "keys.json").read_text())
            return {key: np.load(folder / f"{key}.npy", mmap_mode="r") for key in keys}
        made = make()
        with contextlib.suppress(OSError):  # the disk is full, or another process is faster
            shutil.rmtree(folder, ignore_errors=True)
            partial = Path(tempfile.mkdtemp(dir=self._folder))
            for key, array in made.items():
                save(partial / f"{key}.npy", array)
            (partial / "keys.json").write_text(json.dumps(list(made)))
            partial.rename(folder)
        return made


def cache_folders() -> list[Path]:
    """Where indexes are: XDG_CACHE_HOME (~/.cache)/refusion_jax/examples; if it cannot be written, /tmp."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    ours = Path(tempfile.gettempdir()) / f"refusion_jax-{os.getuid()}"
    return [home / "refusion_jax" / "examples", ours / "examples"]


def open_index(encoder: Encoder, source: Source, max_broken_share: float) -> Index:
    """The index of a source, built now if it is not there. Several processes may call this at once.

    Args:
      encoder: encodes the examples.
      source: the examples.
      max_broken_share: largest share of lines that cannot be used.

    Raises:
      BadInput: the source cannot be read, holds no example, or more of its lines are broken.
      Failed: the index cannot be written anywhere.
    """
    reasons = []
    for cache in cache_folders():
        try:
            cache.mkdir(parents=True, exist_ok=True, mode=0o700)
            if cache.stat().st_uid not in (os.getuid(), 0):
                raise PermissionError(1, "belongs to another user")
            index = _opened(cache, encoder, source, max_broken_share)
            break
        except OSError as error:
            reasons.append(f"{error.filename or cache}: {error.strerror or error}")
    else:
        raise Failed(f"the index of examples cannot be written ({'; '.join(reasons)})")
    check_broken(source, index.meta, max_broken_share, index.broken_lines)
    return index


def _opened(cache: Path, encoder: Encoder, source: Source, max_broken_share: float) -> Index:
    """The index in a cache. Raises OSError if the cache cannot be written."""
    fingerprint = source.fingerprint(cache)
    key = hashlib.sha256(f"{FORMAT} {fingerprint} {encoder.fingerprint()}".encode()).hexdigest()[:32]
    folder, partial = cache / key, cache / f"{key}.partial"
    with contextlib.suppress(*DAMAGED):
        return Index(folder)
    with _one_at_a_time(cache / f"{key}.lock", source.name):
        with contextlib.suppress(*DAMAGED):
            return Index(folder)
        for rest in (folder, partial):  # damaged, or of a process that was killed
            shutil.rmtree(rest, ignore_errors=True)
        _delete_unused(cache)
        partial.mkdir()
        try:
            build(partial, encoder, source, max_broken_share)
            if source.fingerprint(cache) != fingerprint:
                raise BadInput(f"{source.name}: changed while it was read; start again")
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return Index(folder)


@contextlib.contextmanager
def _one_at_a_time(path: Path, name: str) -> Iterator[None]:
    """A context that one process of the host is in; it frees itself if the process dies."""
    with path.open("w") as file:
        say_at = time.monotonic() + SAY_SECONDS
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > say_at:
                print(f"{name}: another process of this host encodes it, waiting", file=sys.stderr)
                say_at = float("inf")
            time.sleep(0.05)
        yield


def _delete_unused(cache: Path) -> None:
    """Deletes what nobody has opened for long; processes that have it open keep it."""
    for folder in cache.iterdir():
        with contextlib.suppress(OSError):
            used = next(file for file in (folder / "meta.json", folder) if file.exists())
            if folder.is_dir() and time.time() - used.stat().st_mtime > UNUSED_DAYS * 86400:
                shutil.rmtree(folder, ignore_errors=True)
