"""The key/value cache: preallocated, indexed by absolute position, with a bitmap of what is filled.

A committed key or value never changes and attention does not care in which order entries arrived, so
slots that are committed out of text order need no cropping, concatenating or sorting: they are written
where they stand in the text, and the bitmap says what may be attended to.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.attention import LayerKV
from refusion_jax.model import ModelConfig

Array = jax.Array


class KVCache(struct.PyTreeNode):
    """Keys and values of the committed tokens.

    Attributes:
      layers: per layer (keys, values), each [B, S, K, H]; one array a layer, so that a decoder that
        unrolls its layers reads each in place.
      filled: bool [B, S], which positions hold a committed token.
    """

    layers: tuple[LayerKV, ...]
    filled: Array

    @classmethod
    def zeros(cls, config: ModelConfig, batch: int, length: int, dtype) -> "KVCache":
        """An empty cache of `length` positions a row."""
        shape = (batch, length, config.num_kv_heads, config.head_dim)
        layers = tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))
        return cls(layers, jnp.zeros((batch, length), bool))

    def write(self, fresh: tuple[LayerKV, ...], positions: Array, keep: Array) -> "KVCache":
        """Keeps some of the keys and values a forward pass returned; `filled` stays as it is.

        Args:
          fresh: per layer (keys, values), each [B, T, K, H].
          positions: int32 [B, T], where each stands in the text.
          keep: bool [B, T]; the others leave no trace.
        """
        write = functools.partial(scatter_rows, positions=positions, keep=keep)
        return self.replace(layers=jax.tree.map(lambda x, new: write(x, new=new), self.layers, tuple(fresh)))

    def fill(self, positions: Array, committed: Array) -> "KVCache":
        """Lets entries be attended to: bool [B, T] at positions [B, T]."""
        return self.replace(filled=scatter_rows(self.filled, positions, committed, committed))

    def commit(self, fresh: tuple[LayerKV, ...], positions: Array, keep: Array) -> "KVCache":
        """`write` and `fill` of the same tokens."""
        return self.write(fresh, positions, keep).fill(positions, keep)

    def insert(self, other: "KVCache", rows: Array) -> "KVCache":
        """`insert_rows` of another cache of the same length."""
        return jax.tree.map(lambda mine, theirs: mine.at[rows].set(theirs, mode="drop"), self, other)


def scatter_rows(buffer: Array, positions: Array, new: Array, keep: Array) -> Array:
    """Writes new [B, T, ...] into buffer [B, S, ...] at positions [B, T] where keep [B, T] is set."""
    rows = jnp.arange(buffer.shape[0])[:, None]
    beyond_the_end = buffer.shape[1]
    index = jnp.where(keep, positions, beyond_the_end)
    return buffer.at[rows, index].set(new.astype(buffer.dtype), mode="drop")


@functools.partial(jax.jit, donate_argnames=("state",))
def insert_rows(state: Any, others: Any, rows: Array) -> Any:
    """A decoder's state with its rows `rows` int32 [A] taken over from the A rows of another.

    A number beyond the last row takes over none. Uses `state` up.
    """

    def put(mine: Array, theirs: Array) -> Array:
        return mine.at[rows].set(theirs, mode="drop")

    merged = jax.tree.map(put, state.replace(cache=None), others.replace(cache=None))
    return merged.replace(cache=state.cache.insert(others.cache, rows))


@functools.partial(jax.jit)
def take_rows(state: Any, rows: Array) -> Any:
    """The rows `rows` int32 [A] of a decoder's state, keys and values left out."""
    cache = state.cache.replace(layers=None)
    return jax.tree.map(lambda x: x[rows], state.replace(cache=cache))
