"""Opens a GGUF file: its metadata and tensors, from which weights and tokenizer are read.

Needs the package `gguf`, the extra [gguf].
"""

from pathlib import Path
from typing import Any

from refusion_jax.errors import BadInput


class GGUFFile:
    """An open GGUF file; metadata is checked when it is read.

    Attributes:
      path: the file.
      names: names of all metadata.
      tensors: descriptions of the tensors by the package gguf; their data is mapped, not read.

    Raises:
      BadInput: the package gguf is missing, or the file cannot be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            import gguf
        except ImportError:
            raise BadInput(f"{path}: needs the package gguf: pip install 'refusion_jax[gguf]'") from None
        try:
            reader = gguf.GGUFReader(self.path)
        # The reader indexes into a memory map, and a broken file makes it raise any kind of exception.
        except Exception as error:
            raise BadInput(f"{path}: not a readable GGUF file ({error})") from None
        if reader.endianess != gguf.GGUFEndian.LITTLE:
            raise BadInput(f"{path}: is big-endian, expected little-endian")
        self._fields = reader.fields
        self.names = tuple(reader.fields)
        self.tensors = reader.tensors

    def get(self, name: str, kind: type | None = None, of: type | None = None) -> Any:
        """A metadata value by its full name, None if it is missing.

        Args:
          name: full name, such as "general.architecture".
          kind: required type; None allows any.
          of: required type of the elements of a list; None allows any.

        Raises:
          BadInput: the value has another type or cannot be read.
        """
        field = self._fields.get(name)
        if field is None:
            return None
        try:
            value = field.contents()
        except Exception as error:  # any kind, as above
            raise BadInput(f"{self.path}: metadata {name} cannot be read ({error})") from None
        wrong = kind is not None and type(value) is not kind
        if wrong or (of and any(type(element) is not of for element in value)):
            wanted = kind.__name__ if of is None else f"{kind.__name__} of {of.__name__}"
            raise BadInput(f"{self.path}: metadata {name} must be {wanted}, found {repr(value)[:80]}")
        return value

    def need(self, name: str, kind: type, of: type | None = None) -> Any:
        """`get` of a required value. Raises BadInput also if it is missing."""
        value = self.get(name, kind, of)
        if value is None:
            raise BadInput(f"{self.path}: metadata {name} is missing")
        return value
