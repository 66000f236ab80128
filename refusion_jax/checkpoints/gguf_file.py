"""A GGUF file's metadata and tensors, opened once for the weights and the tokenizer in it.

Needs the `gguf` package, the extra [gguf].
"""

from pathlib import Path
from typing import Any

from refusion_jax.errors import BadInput


class GGUFFile:
    """An open GGUF file; its metadata is checked as it is asked for.

    Attributes:
      path: where it lies.
      names: of its metadata.
      tensors: the package's descriptions of its tensors; their data is mapped, not read.

    Raises:
      BadInput: the package gguf is missing, or the file is none that can be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            import gguf
        except ImportError:
            raise BadInput(f"{path}: needs the package gguf: pip install 'refusion_jax[gguf]'") from None
        try:
            reader = gguf.GGUFReader(self.path)
        # The reader indexes into a memory map and lets whatever comes of a broken file escape.
        except Exception as error:
            raise BadInput(f"{path}: not a readable GGUF file ({error})") from None
        if reader.endianess != gguf.GGUFEndian.LITTLE:
            raise BadInput(f"{path}: is big-endian, expected little-endian")
        self._fields = reader.fields
        self.names = tuple(reader.fields)
        self.tensors = reader.tensors

    def get(self, name: str, kind: type | None = None, of: type | None = None) -> Any:
        """Metadata by its full name, None if there is none.

        Args:
          name: such as "general.architecture".
          kind: the type it must have; None is any.
          of: the type the elements of a list must have; None is any.

        Raises:
          BadInput: it has another type or cannot be read.
        """
        field = self._fields.get(name)
        if field is None:
            return None
        try:
            value = field.contents()
        except Exception as error:  # see above
            raise BadInput(f"{self.path}: metadata {name} cannot be read ({error})") from None
        wrong = kind is not None and type(value) is not kind
        if wrong or (of and any(type(element) is not of for element in value)):
            wanted = kind.__name__ if of is None else f"{kind.__name__} of {of.__name__}"
            raise BadInput(f"{self.path}: metadata {name} must be {wanted}, found {repr(value)[:80]}")
        return value

    def need(self, name: str, kind: type, of: type | None = None) -> Any:
        """`get` of what must be there."""
        value = self.get(name, kind, of)
        if value is None:
            raise BadInput(f"{self.path}: metadata {name} is missing")
        return value
