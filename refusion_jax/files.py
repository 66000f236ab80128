"""Small files: read with errors that name the file, written whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from refusion_jax import interrupt
from refusion_jax.errors import BadInput

# The model that comes with the package, trained by configs/small.py.
SMALL = Path(__file__).with_name("small")


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
def open_atomically(path: str | Path, *, keep_partial: bool = False) -> Iterator[IO[bytes]]:
    """Opens a new file for writing that replaces `path` at the end of the block.

    The data goes to a temporary file in the same folder, which is synced to disk and then renamed to `path`.
    If the block raises, an existing file at `path` stays unchanged, and the temporary file is removed unless
    `keep_partial` is set. Of a symbolic link the target is replaced. A pipe or a device is written to.

    Args:
      path: the file.
      keep_partial: name the temporary file `path`.partial and keep it if the block raises, so that results
        that took long are not lost. The next call replaces it.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    partial = path.with_name(
        f"{path.name}.partial" if keep_partial else f".{path.name}.partial-{os.getpid()}"
    )
    if not keep_partial:
        interrupt.temporary.add(partial)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        if not keep_partial:
            partial.unlink(missing_ok=True)
            interrupt.temporary.discard(partial)


def check_output(flag: str, path: str | Path | None) -> None:
    """Raises BadInput if a file at `path` cannot be written; called before any work is done for it.

    None and "-", standard output, always can.
    """
    if path in (None, "-"):
        return
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
    target = Path(os.path.realpath(path))
    there = next(folder for folder in (target, *target.parents) if folder.exists())
    if not there.is_dir():
        raise BadInput(f"{flag}={path}: cannot be a folder ({there} is a file)")
    if not os.access(there, os.W_OK | os.X_OK):
        raise BadInput(f"{flag}={path}: cannot be written (no permission in {there})")


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Writes a whole file, text as UTF-8, with the guarantees of `open_atomically`."""
    with open_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
