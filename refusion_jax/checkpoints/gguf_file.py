"""Opens a GGUF file, or all parts of a split one: metadata and tensors, for weights and tokenizer.

Needs the package `gguf`, the extra [gguf].
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from refusion_jax.checkpoints.gguf_header import read_header
from refusion_jax.errors import BadInput

PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")  # the names that llama.cpp gives to parts


class GGUFFile:
    """An open GGUF file; metadata is checked when it is read.

    Attributes:
      path: the file; of a split file, the part that was named.
      names: names of all metadata. Of a split file the first part has them.
      tensors: list of GGUFTensor, of all parts; their data is not read.

    Raises:
      BadInput: the package gguf is missing, a file cannot be read, or a part of a split file is missing or
        belongs to another file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            import gguf  # noqa: F401
        except ImportError:
            raise BadInput(f"{path}: needs the package gguf: pip install 'refusion_jax[gguf]'") from None
        named = _Part(self.path)
        count = named.count
        parts = [named] if count == 1 else [_Part(other) for other in _part_paths(self.path, count)]
        for number, part in enumerate(parts):
            if (part.number, part.count) != (number, count):
                raise BadInput(
                    f"{part.path}: is part {part.number + 1} of {part.count} by its metadata split.no and "
                    f"split.count, expected part {number + 1} of {count}"
                )
        self._first = parts[0]
        self.names = tuple(self._first.fields)
        self.tensors = [tensor for part in parts for tensor in part.tensors]
        if len({tensor.name for tensor in self.tensors}) < len(self.tensors):
            raise BadInput(f"{path}: several parts have a tensor of one name")
        total = self.get("split.tensors.count", int) if count > 1 else None
        if total not in (None, len(self.tensors)):
            raise BadInput(
                f"{path}: its {count} parts have {len(self.tensors)} tensors, split.tensors.count is {total}"
            )

    def get(self, name: str, kind: type | None = None, of: type | None = None) -> Any:
        """A metadata value by its full name, None if it is missing.

        Args:
          name: full name, such as "general.architecture".
          kind: required type; None allows any.
          of: required type of the elements of a list; None allows any.

        Raises:
          BadInput: the value has another type or cannot be read.
        """
        return self._first.get(name, kind, of)

    def need(self, name: str, kind: type, of: type | None = None) -> Any:
        """`get` of a required value. Raises BadInput also if it is missing."""
        value = self.get(name, kind, of)
        if value is None:
            raise BadInput(f"{self.path}: metadata {name} is missing")
        return value


def _part_paths(path: Path, count: int) -> list[Path]:
    """The files of all parts of a split file. Raises BadInput naming the first that is missing."""
    found = PART.fullmatch(path.name)
    if not found or int(found[3]) != count:
        raise BadInput(
            f"{path}: is one of {count} parts by its metadata split.count, expected a name like "
            f"NAME-00001-of-{count:05}.gguf, by which the others are found"
        )
    for number in range(1, count + 1):
        part = path.with_name(f"{found[1]}-{number:05}-of-{count:05}.gguf")
        if not part.is_file():
            raise BadInput(f"{path}: is one of {count} parts, of which {part.name} is missing beside it")
    return [path.with_name(f"{found[1]}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]


class _Part:
    """One file.

    Attributes:
      path: the file.
      fields: name of each metadatum -> value, as `read_header` gives it.
      tensors: list of GGUFTensor.
      number, count: which part of how many this file is; 0 and 1 for a file that is not split.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.fields, self.tensors = read_header(path)
        except OSError as error:
            raise BadInput(f"{path}: not a readable GGUF file ({error.strerror})") from None
        except ValueError as error:
            raise BadInput(f"{path}: not a readable GGUF file ({error})") from None
        number, count = (self.get(f"split.{name}", int) for name in ("no", "count"))
        self.number, self.count = number or 0, count or 1

    def get(self, name: str, kind: type | None = None, of: type | None = None) -> Any:
        if name not in self.fields:
            return None
        try:
            value = _as_python(self.fields[name])
        except UnicodeDecodeError as error:
            raise BadInput(f"{self.path}: metadata {name} cannot be read ({error})") from None
        wrong = kind is not None and type(value) is not kind
        if wrong or (of and any(type(element) is not of for element in value)):
            wanted = kind.__name__ if of is None else f"{kind.__name__} of {of.__name__}"
            raise BadInput(f"{self.path}: metadata {name} must be {wanted}, found {repr(value)[:80]}")
        return value


def _as_python(value: Any) -> Any:
    """A metadata value in Python's own types. Raises UnicodeDecodeError for a text that is not UTF-8."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list):
        return [element.decode() if isinstance(element, bytes) else element for element in value]
    return value.decode() if isinstance(value, bytes) else value
