"""Parses the header of a GGUF file: metadata, and the names, shapes and places of its tensors.

The reader of the package `gguf` follows lengths beyond the end of a damaged file and makes an object per
element of a list. So this module parses the header, and takes only the sizes of quantised blocks from there.

A file is the magic, the version and the number of tensors and of metadata; the metadata (name, type, value);
the tensors (name, number of axes, axes, type, offset); and, aligned, the bytes of the tensors.
"""

import math
import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, LIST = 8, 9  # types of metadata without a dtype
SCALARS = {
    number: np.dtype(name)
    for number, name in {
        **dict(enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))),
        **dict(enumerate(("<u8", "<i8", "<f8"), start=10)),
    }.items()
}
ALIGNMENT = "general.alignment"
MOST_AXES = 4  # of a tensor, in ggml
MOST_ELEMENTS = 2**58  # NumPy makes no larger array, even without elements
LONGEST_NAME = 2**16 - 1  # bytes, in the specification


class GGUFTensor(NamedTuple):
    """A tensor of a GGUF file.

    Attributes:
      path: its file.
      name: its name in the file.
      kind: quantisation, a `gguf.GGMLQuantizationType`.
      shape: shape in NumPy's order of axes.
      offset: first byte in the file.
      byte_shape: `shape`, with the bytes of a row in place of the last axis.
    """

    path: Path
    name: str
    kind: Any
    shape: tuple[int, ...]
    offset: int
    byte_shape: tuple[int, ...]


def read_header(path: Path) -> tuple[dict[str, Any], list[GGUFTensor]]:
    """The metadata and the tensors of a file.

    Returns:
      name -> value, where a text is bytes and a list a list of bytes or an array of numbers; and the tensors.

    Raises:
      OSError: the file cannot be opened.
      ValueError: it is no GGUF file, or a damaged one.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        cursor = _Cursor(content)
        if cursor.take(4) != MAGIC:
            raise ValueError("GGUF magic invalid")
        version = cursor.number("<u4")
        if version & 0xFFFF == 0 and version:
            raise ValueError("it is big-endian, expected little-endian")
        if version not in VERSIONS:
            raise ValueError(f"version {version}, expected {' or '.join(map(str, VERSIONS))}")
        num_tensors, num_fields = cursor.number("<u8"), cursor.number("<u8")
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            name = cursor.text(LONGEST_NAME).decode()
            if name in fields:
                raise ValueError(f"metadata {name!r} twice")
            fields[name] = cursor.value(cursor.number("<u4"))
        entries = [_entry(cursor) for _ in range(num_tensors)]
        alignment = fields.get(ALIGNMENT, 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"{ALIGNMENT} is {alignment!r}, expected a power of two")
        start = -(-cursor.position // alignment) * alignment
        return fields, _tensors(path, entries, start, len(content))


class _Cursor:
    """Reads a mapped file from its start; ValueError at its end."""

    def __init__(self, content: mmap.mmap):
        self._content = content
        self.position = 0

    def take(self, length: int) -> bytes:
        left = len(self._content) - self.position
        if length > left:
            raise ValueError(
                f"cut short: {length:,} bytes at byte {self.position:,}, where {left:,} are left"
            )
        self.position += length
        return self._content[self.position - length : self.position]

    def number(self, dtype: str | np.dtype) -> Any:
        dtype = np.dtype(dtype)
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def text(self, longest: int | None = None) -> bytes:
        length = self.number("<u8")
        if longest is not None and length > longest:
            raise ValueError(f"a name of {length:,} bytes at byte {self.position:,}")
        return self.take(length)

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != LIST:
            raise ValueError(f"metadata of the unknown type {kind}")
        of, length = self.number("<u4"), self.number("<u8")
        if of in SCALARS:
            return np.frombuffer(self.take(length * SCALARS[of].itemsize), SCALARS[of])
        if of != STRING:
            raise ValueError(f"a list of the type {of}")
        return [self.text() for _ in range(length)]


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, type, offset from the start of the data) of a tensor."""
    name = cursor.text(LONGEST_NAME).decode()
    axes = cursor.number("<u4")
    if not 1 <= axes <= MOST_AXES:
        raise ValueError(f"tensor {name!r} has {axes} axes, expected 1 to {MOST_AXES}")
    shape = tuple(cursor.number("<u8") for _ in range(axes))[::-1]
    if math.prod(filter(None, shape)) > MOST_ELEMENTS:
        raise ValueError(f"tensor {name!r} has the shape {shape}")
    return name, shape, cursor.number("<u4"), cursor.number("<u8")


def _tensors(path: Path, entries: list, start: int, size: int) -> list[GGUFTensor]:
    """The tensors of a file of `size` bytes whose data begin at byte `start`."""
    import gguf

    tensors, names, end = [], set(), start
    for name, shape, number, offset in sorted(entries, key=lambda entry: entry[3]):
        if name in names:
            raise ValueError(f"tensor {name!r} twice")
        names.add(name)
        try:
            kind = gguf.GGMLQuantizationType(number)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise ValueError(f"tensor {name!r} has the unknown type {number}") from None
        if shape[-1] % block:
            raise ValueError(
                f"tensor {name!r} has rows of {shape[-1]}, {kind.name} needs multiples of {block}"
            )
        byte_shape = (*shape[:-1], shape[-1] // block * block_bytes)
        if start + offset < end:
            raise ValueError(f"tensor {name!r} begins at byte {offset:,} of the data, inside another")
        end = start + offset + math.prod(byte_shape)
        if end > size:
            raise ValueError(f"cut short: tensor {name!r} ends at byte {end:,} of {size:,}")
        tensors.append(GGUFTensor(path, name, kind, shape, start + offset, byte_shape))
    return tensors
