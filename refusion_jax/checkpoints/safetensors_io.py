"""The safetensors file format: read slice by slice, written tensor by tensor.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape and byte
offsets), and the bytes of the tensors without gaps. Not the `safetensors` library: it writes only tensors
that are all in memory, and keeps every page that it has read mapped into the process. Here a tensor is mapped
only while it is read.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refusion_jax import buckets
from refusion_jax.buckets import is_remote, location
from refusion_jax.errors import BadInput
from refusion_jax.files import read_json, write_atomically
from refusion_jax.weights.lazy import Index, LazyArray, bounds

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_AXES, MOST_ELEMENTS = 32, 2**58  # NumPy makes no larger array, even without elements
LONGEST_HEADER = 100_000_000  # bytes, the limit of other readers


def read_folder(folder: str | Path) -> dict[str, LazyArray]:
    """The tensors of a folder by name. Headers are read and checked; tensors are not read.

    Args:
      folder: contains model.safetensors, or model.safetensors.index.json and the shards that it names.

    Raises:
      BadInput: a file is missing or broken, the index and its shards disagree, or model.safetensors is
        beside an index of other files.
    """
    folder = location(folder)
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise BadInput(f"{folder}: holds neither {SINGLE} nor {INDEX}")
        return read_file(folder / SINGLE)
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    is_map = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
    if not is_map or not weight_map:
        raise BadInput(f"{index}: field 'weight_map' must map tensor names to files")
    named = sorted(set(weight_map.values()))
    present = {path.name for path in folder.iterdir() if path.is_file()}
    for file in named:
        if file not in present:
            raise BadInput(f"{index}: names the file {file[:200]!r}, which is not in {folder}")
    if SINGLE not in named and (folder / SINGLE).exists():
        raise BadInput(
            f"{folder}: holds {SINGLE} and {INDEX}, which names other files; remove the one that is not of "
            "this model"
        )
    files = {file: read_file(folder / file) for file in named}
    for file, tensors in files.items():
        for name in tensors:
            if weight_map.get(name) != file:
                raise BadInput(f"{folder / file}: holds tensor {name!r}, which {INDEX} does not place there")
    for name, file in weight_map.items():
        if name not in files[file]:
            raise BadInput(f"{index}: places tensor {name!r} in {file}, which does not hold it")
    return {name: files[file][name] for name, file in weight_map.items()}


def read_file(path: Path) -> dict[str, LazyArray]:
    """The tensors of one file by name. Raises BadInput unless it is a complete safetensors file."""
    header, start, size = _header(path)
    entries = {name: _entry(path, name, fields) for name, fields in header.items()}
    end = start
    for name, (_, _, begin, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if start + begin != end:
            raise BadInput(
                f"{path}: tensor {name!r} begins at byte {start + begin:,}, expected {end:,}, where the one "
                "before it ends"
            )
        end = start + stop
    if end != size:
        raise BadInput(f"{path}: cut short or damaged: its tensors end at byte {end:,}, the file at {size:,}")
    return {
        name: _lazy_array(path, name, dtype, shape, start + begin)
        for name, (dtype, shape, begin, _) in entries.items()
    }


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(entries of the header, byte offset of the first tensor, size of the file in bytes)."""
    try:
        size = buckets.size(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            fits = size >= 8 and length <= min(size - 8, LONGEST_HEADER)
            text = file.read(length) if fits else b""
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    if not fits:
        raise BadInput(f"{path}: cut short or no safetensors file: a header of {length:,} in {size:,} bytes")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: no safetensors file: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise BadInput(f"{path}: its header must be a JSON object, found {type(header).__name__}")
    header.pop("__metadata__", None)
    return header, 8 + length, size


def _entry(path: Path, name: str, fields: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Checks one entry of a header and returns (dtype, shape, first byte, byte after the last)."""
    where = f"{path}: tensor {name!r}"
    fields = fields if isinstance(fields, dict) else {}
    dtype, shape, offsets = (fields.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadInput(f"{where} has dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > MOST_AXES or math.prod(filter(None, shape)) > MOST_ELEMENTS:
        raise BadInput(f"{where} has shape {shape!r}, expected a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise BadInput(f"{where} has data_offsets {offsets!r}, expected its first byte and the one after it")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise BadInput(
            f"{where} has {offsets[1] - offsets[0]:,} bytes, {dtype} of shape {tuple(shape)} takes {nbytes:,}"
        )
    return DTYPES[dtype], tuple(shape), *offsets


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _lazy_array(path: Path, name: str, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> LazyArray:
    def read(index: Index) -> np.ndarray:
        if 0 in shape:  # nothing to map
            return np.empty(shape, dtype)[index]
        if is_remote(path):
            return _read_remote(path, dtype, offset, shape, index)
        # Copying lets the mapping end on return, so that its pages no longer count as memory of the process.
        return np.array(np.memmap(path, dtype, "r", offset, shape)[index])

    return LazyArray(shape, dtype, read, f"{path}: tensor {name!r}")


def _read_remote(
    path: Path, dtype: np.dtype, offset: int, shape: tuple[int, ...], index: Index
) -> np.ndarray:
    """Part of a tensor of a file in a bucket, of which no more than whole rows are read."""
    if not shape:
        first, last, row = 0, 1, ()
    else:
        (first, last), row = bounds(index, shape)[0], shape[1:]
    stride = math.prod(row) * dtype.itemsize
    with path.open("rb") as file:
        file.seek(offset + first * stride)
        content = file.read((last - first) * stride)
    if len(content) != (last - first) * stride:
        raise BadInput(f"{path}: cut short while it was read")
    rows = np.frombuffer(content, dtype).reshape((last - first, *row) if shape else ())
    return np.array(rows[(slice(None), *index[1:])] if shape else rows)


def write_folder(folder: str | Path, tensors: Mapping[str, LazyArray], shard_bytes: int) -> None:
    """Writes model.safetensors, or several shards with an index; one tensor is in memory at a time.

    Args:
      folder: target folder.
      tensors: tensors by name, in the order in which they are assigned to shards.
      shard_bytes: most bytes of tensors per file; a larger tensor gets a file of its own.

    Raises:
      OSError: the disk is full, or the folder cannot be written.
    """
    folder = location(folder)
    shards: list[dict[str, LazyArray]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_atomically(folder / INDEX, json.dumps(index, indent=2) + "\n")


def write_file(path: Path, tensors: Mapping[str, LazyArray]) -> None:
    """Writes one safetensors file, which must not exist; one tensor is in memory at a time."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    # Wider dtypes first, so that every tensor is aligned to its item size.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # required by `transformers`
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb" if is_remote(path) else "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(memoryview(np.ascontiguousarray(tensor.whole()).reshape(-1).view(np.uint8)))
