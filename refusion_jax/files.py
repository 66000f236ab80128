"""Small files: read with errors that name the file, written whole or not at all."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from refusion_jax import interrupt
from refusion_jax.buckets import is_remote, location
from refusion_jax.errors import BadInput

# The model that comes with the package, trained by configs/small.py.
SMALL = Path(__file__).with_name("small")
REWRITE_SECONDS = 30  # between two times that a growing file is written to a bucket


def read_text(path: Path) -> str:
    """The text of a file. Raises BadInput if the file is missing or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read as UTF-8 text ({error})") from None


def parse_json(text: str, path: Path) -> dict[str, Any]:
    """Parses a JSON object; `path` is named in messages.

    Raises:
      BadInput: `text` is not a JSON object, or a text in it has a lone surrogate, which no encoding has.
    """
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: must hold a JSON object, found {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises BadInput if the file is missing or holds anything else."""
    return parse_json(read_text(path), path)


def read_json_if_there(path: Path) -> dict[str, Any]:
    """`read_json`, or an empty object if there is no such file."""
    return read_json(path) if path.is_file() else {}


@contextlib.contextmanager
def open_atomically(path: str | Path) -> Iterator[IO[bytes]]:
    """Opens a new file for writing that replaces `path` at the end of the block.

    The data goes to a temporary file in the same folder, which is synced to disk and then renamed to `path`.
    If the block raises, an existing file at `path` stays unchanged, and the temporary file is removed. Of a
    symbolic link the target is replaced. A pipe or a device is written to.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    interrupt.temporary.add(partial)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
        interrupt.temporary.discard(partial)


def check_output(flag: str, path: str | Path | None) -> None:
    """Raises BadInput if a file at `path` cannot be written; called before any work is done for it.

    None and "-", standard output, always can.
    """
    if path in (None, "-"):
        return
    _check_local(flag, path)
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise BadInput(f"{flag}={path}: cannot be written (it is a folder)")
    if not target.parent.is_dir():
        raise BadInput(f"{flag}={path}: cannot be written (its folder does not exist)")
    is_special = target.exists() and not target.is_file()
    if not os.access(target if is_special else target.parent, os.W_OK):
        raise BadInput(f"{flag}={path}: cannot be written (no permission)")


def check_output_folder(flag: str, path: str | Path | None) -> None:
    """Raises BadInput if no files can be written into a folder at `path`, which need not exist yet."""
    if path is None:
        return
    _check_local(flag, path)
    target = Path(os.path.realpath(path))
    there = next(folder for folder in (target, *target.parents) if folder.exists())
    if not there.is_dir():
        raise BadInput(f"{flag}={path}: cannot be a folder ({there} is a file)")
    if not os.access(there, os.W_OK | os.X_OK):
        raise BadInput(f"{flag}={path}: cannot be written (no permission in {there})")


def _check_local(flag: str, path: str | Path) -> None:
    if "://" in str(path):
        raise BadInput(f"{flag}={path}: must be on a local disk; models and runs alone may be in a bucket")


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Writes a whole file or object, text as UTF-8, with the guarantees of `open_atomically`."""
    content = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        location(path).write_bytes(content)
        return
    with open_atomically(path) as file:
        file.write(content)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """A context whose OSErrors name `path`, unless they name a file already."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


class Lines:
    """A text file that grows line by line.

    Objects in a bucket cannot grow: there the whole file is written again, by `flush`, and by `add` at most
    every REWRITE_SECONDS. A kill may cost the lines since then.

    Args:
      path: the file; lines that it has are kept.
    """

    def __init__(self, path: Path):
        self._path = path
        self._lines = [path.read_text().rstrip("\n")] if is_remote(path) and path.is_file() else []
        self._written_at = time.monotonic()
        self._is_due = False

    def add(self, line: str) -> None:
        if not is_remote(self._path):
            # Closed each time, because mounted buckets store writes only then. One write per line: a kill
            # leaves at most a partial last line.
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            return
        self._lines.append(line)
        self._is_due = True
        if time.monotonic() > self._written_at + REWRITE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Makes sure that all lines are stored."""
        if self._is_due:
            write_atomically(self._path, "\n".join(self._lines) + "\n")
            self._written_at, self._is_due = time.monotonic(), False
