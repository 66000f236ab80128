"""Checksums of arrays that do not depend on how an array is split over devices.

The checksum of an array is the sum, modulo 2^32, of a number per element that mixes its bits with its index
in the whole array. The mixing is invertible, so a single changed element always changes the sum; of several
changed ones it misses one case in 2^32. A sum of integers has no order, so every mesh finds the same.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
CHUNK = 2**20  # elements


@jax.jit
def checksums(tree: Any) -> Any:
    """uint32 [] for each array of a tree, computed on its devices."""
    return jax.tree.map(_checksum, tree)


def fingerprint(tree: Any) -> str:
    """16 hexadecimal digits of the names, shapes, dtypes and values of all arrays of a tree."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    found = jax.device_get([_checksum_of(leaf) for _, leaf in leaves])
    text = [
        f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {value}"
        for (path, leaf), value in zip(leaves, found, strict=True)
    ]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def checksum(array: np.ndarray) -> int:
    """That of one array in memory, CHUNK elements at a time: one program for arrays of all shapes."""
    flat = np.ascontiguousarray(array).reshape(-1).view(f"uint{8 * array.dtype.itemsize}")

    def of(start: int) -> int:
        part = flat[start : start + CHUNK]
        padded = part if part.size == CHUNK else np.pad(part, (0, CHUNK - part.size))
        return int(_of_chunk(padded, np.uint32(start % 2**32), np.int32(part.size)))

    starts = range(0, flat.size, CHUNK)
    if len(starts) == 1:
        return of(0)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(pool.map(of, starts)) % 2**32


@jax.jit
def _of_chunk(bits: Array, start: Array, count: Array) -> Array:
    """The sum over the first `count` of CHUNK elements, the first of which has the index `start`."""
    place = jnp.arange(CHUNK, dtype=jnp.uint32)
    mixed = _mixed(bits.astype(jnp.uint32), place + start)
    return jnp.sum(jnp.where(place < count, mixed, 0), dtype=jnp.uint32)


def _checksum(x: Array) -> Array:
    x = jnp.asarray(x)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(_mixed(bits, place), dtype=jnp.uint32)


_checksum_of = jax.jit(_checksum)  # compiled for each shape, not for each model


def _mixed(bits: Array, place: Array) -> Array:
    """uint32: bits and places mixed by the finaliser of MurmurHash3."""
    mixed = bits + place * jnp.uint32(0x9E3779B1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return mixed ^ (mixed >> 16)
