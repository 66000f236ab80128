"""The small files of a model folder: text and JSON objects."""

import json
import os
from pathlib import Path
from typing import Any

from refusion_jax.errors import BadInput


def read_text(path: Path) -> str:
    """A file's text. Raises BadInput when there is no such file, or none in UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read as UTF-8 text ({error})") from None


def parse_json(text: str, path: Path) -> dict[str, Any]:
    """The JSON object that `text` is; `path` is for messages. Raises BadInput when it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: must hold a JSON object, found {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises BadInput when there is no such file, or it holds none."""
    return parse_json(read_text(path), path)


def read_json_if_there(path: Path) -> dict[str, Any]:
    """The same, empty when there is no such file."""
    return read_json(path) if path.is_file() else {}


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file that appears under its name only when it is whole; an old one stays until then."""
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
