"""Arrays on disk that are read only when, and only as far as, their values are needed.

Loading and conversion work on trees of `LazyArray` in the structure of a model's parameters. So, whatever the
source and target layouts, a process holds a few tensors at a time, and only its own shards of them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

Index = tuple[slice, ...]  # one slice per axis: step 1, bounds inside the axis or open


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """One array on disk; a leaf in JAX trees.

    Attributes:
      shape: shape of the array.
      dtype: dtype of the array.
      read: Index -> the part of the array at that index, a numpy array in memory (not mapped to a file).
      where: file and name of the array, for messages.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]
    where: str

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes, uncompressed."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def whole(self) -> np.ndarray:
        """Reads the whole array."""
        return self.read((slice(None),) * len(self.shape))

    def astype(self, dtype: Any) -> "LazyArray":
        """The same array, cast to `dtype` when it is read."""
        dtype = np.dtype(dtype)
        return dataclasses.replace(
            self, dtype=dtype, read=lambda index: self.read(index).astype(dtype, copy=False)
        )

    def transpose(self, order: Sequence[int]) -> "LazyArray":
        """The same array with its axes permuted to `order`."""
        order = tuple(order)

        def read(index: Index) -> np.ndarray:
            return self.read(tuple(index[order.index(axis)] for axis in range(len(order)))).transpose(order)

        return dataclasses.replace(self, shape=tuple(self.shape[axis] for axis in order), read=read)

    def split(self, shape: Sequence[int]) -> "LazyArray":
        """The same array reshaped so that one axis becomes two; only the requested part is read."""
        axis = next(axis for axis, size in enumerate(self.shape) if size != shape[axis])
        size = shape[axis + 1]

        def read(index: Index) -> np.ndarray:
            (start, stop), inner = bounds(index[axis : axis + 2], shape[axis : axis + 2])
            rows = slice(start * size, stop * size)
            part = self.read((*index[:axis], rows, *index[axis + 2 :]))
            part = part.reshape(*part.shape[:axis], stop - start, size, *part.shape[axis + 1 :])
            return part[(slice(None),) * (axis + 1) + (slice(*inner),)]

        return dataclasses.replace(self, shape=tuple(shape), read=read)

    def reshape(self, shape: Sequence[int]) -> "LazyArray":
        """The same array in any other shape; every read reads the whole array."""
        return dataclasses.replace(
            self, shape=tuple(shape), read=lambda index: self.whole().reshape(shape)[index]
        )


def bounds(index: Index, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(start, stop) per axis of `index` in an array of this shape."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def concatenate(parts: Sequence[LazyArray], axis: int) -> LazyArray:
    """Concatenates arrays along `axis`; only the requested parts are read."""
    borders = np.cumsum([0] + [part.shape[axis] for part in parts])
    first = parts[0]
    shape = (*first.shape[:axis], int(borders[-1]), *first.shape[axis + 1 :])

    def read(index: Index) -> np.ndarray:
        start, stop = bounds(index, shape)[axis]
        pieces = []
        for part, begin, end in zip(parts, borders[:-1], borders[1:], strict=True):
            inside = slice(max(start - int(begin), 0), min(stop, int(end)) - int(begin))
            if inside.start < inside.stop:
                pieces.append(part.read((*index[:axis], inside, *index[axis + 1 :])))
        return np.concatenate(pieces, axis=axis)

    where = " with ".join(part.where for part in parts)
    return LazyArray(shape, np.result_type(*(part.dtype for part in parts)), read, where)


def load_to_devices(params: Any, abstract: Any) -> Any:
    """Reads a tree of LazyArray onto devices; each process reads only the shards of its own devices.

    Args:
      params: tree of LazyArray.
      abstract: ShapeDtypeStructs in the same structure, with the dtypes and shardings of the result. A
        sharding of None is the default device.

    Returns:
      a tree of jax.Array.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def read(leaf: LazyArray, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

        def part(index: Index) -> np.ndarray:
            key = bounds(index, leaf.shape)
            if key not in parts:  # devices along an axis that replicates the array share one read
                parts[key] = leaf.read(index).astype(wanted.dtype, copy=False)
            return parts[key]

        return jax.make_array_from_callback(leaf.shape, wanted.sharding or here, part)

    return jax.tree.map(read, params, abstract)


def unstack(params: Mapping[str, Any]) -> dict[str, Any]:
    """Lazy parameters of the unrolled model from those of either the unrolled or the scanned model."""
    if "layers" not in params:
        return dict(params)

    def layer(leaf: LazyArray, i: int) -> LazyArray:
        def read(index: Index) -> np.ndarray:
            return leaf.read((slice(i, i + 1), *index))[0]

        return dataclasses.replace(leaf, shape=leaf.shape[1:], read=read, where=f"{leaf.where}[{i}]")

    depth = jax.tree.leaves(params["layers"])[0].shape[0]
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    return rest | {
        f"layers_{i}": jax.tree.map(lambda leaf, i=i: layer(leaf, i), params["layers"]) for i in range(depth)
    }


def stack(params: Mapping[str, Any]) -> dict[str, Any]:
    """Lazy parameters of the scanned model from those of the unrolled model."""

    def stacked(*layers: LazyArray) -> LazyArray:
        def read(index: Index) -> np.ndarray:
            return np.stack([layer.read(index[1:]) for layer in layers[index[0]]])

        first = layers[0]
        return dataclasses.replace(first, shape=(len(layers), *first.shape), read=read)

    depth = sum(name.startswith("layers_") for name in params)
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("layers_")}
    return rest | {"layers": jax.tree.map(stacked, *(params[f"layers_{i}"] for i in range(depth)))}
