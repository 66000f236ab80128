"""The key/value cache: preallocated, indexed by absolute position, with a bitmap of what is filled.

A committed key or value never changes and attention does not care in which order entries arrived, so
slots that are committed out of text order need no cropping, concatenating or sorting: they are written
where they stand in the text, and the bitmap says what may be attended to.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.model.attention import LayerKV
from refusion_jax.model.transformer import ModelConfig

Array = jax.Array


class KVCache(struct.PyTreeNode):
    """Keys and values of the committed tokens.

    Attributes:
      layers: keys and values of all layers, each [L, B, S, K, H]: one array, so that a commit is one
        write, and attention reads its layer in place. Or each a tuple of L arrays [B, S, K, H]: of one
        array the TPU compiler would make a copy, with heads before positions, in every pass.
      filled: bool [B, S], which positions hold a committed token.
    """

    layers: LayerKV | tuple[tuple[Array, ...], tuple[Array, ...]]
    filled: Array

    @classmethod
    def zeros(
        cls, config: ModelConfig, batch: int, length: int, dtype, *, by_layer: bool = False
    ) -> "KVCache":
        """An empty cache of `length` positions a row, an array for each layer or one for all."""
        shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
        axes = (None, "act_batch", "act_length", "act_kv_heads", None)

        def empty() -> Any:
            buffer = nn.with_logical_constraint(jnp.zeros(shape, dtype), axes)
            return tuple(buffer) if by_layer else buffer

        return cls((empty(), empty()), jnp.zeros((batch, length), bool))

    def write(self, fresh: LayerKV, positions: Array, keep: Array, row: Array | None = None) -> "KVCache":
        """Keeps some of the keys and values a forward pass returned; `filled` stays as it is.

        Args:
          fresh: keys and values, each [L, B, T, K, H].
          positions: int32 [B, T], where each stands in the text.
          keep: bool [B, T]; the others leave no trace.
          row: int32 [B, T], whose each is, where that is not the B it stands in.
        """
        rows = jnp.arange(positions.shape[0])[:, None] if row is None else row
        index = jnp.where(keep, positions, self.filled.shape[1])  # beyond the end: dropped

        def put(buffer: Array, new: Array) -> Array:
            return buffer.at[..., rows, index, :, :].set(new.astype(buffer.dtype), mode="drop")

        if isinstance(self.layers[0], tuple):
            fresh = tuple(map(tuple, fresh))
        return self.replace(layers=jax.tree.map(put, self.layers, fresh))

    def fill(self, positions: Array, committed: Array) -> "KVCache":
        """Lets entries be attended to: bool [B, T] at positions [B, T]."""
        return self.replace(filled=scatter_rows(self.filled, positions, committed, committed))

    def commit(self, fresh: LayerKV, positions: Array, keep: Array) -> "KVCache":
        """`write` and `fill` of the same tokens."""
        return self.write(fresh, positions, keep).fill(positions, keep)

    def rows(self, index) -> "KVCache":
        """The same of some rows of the batch; a whole number drops that axis."""
        return KVCache(jax.tree.map(lambda x: x[..., index, :, :, :], self.layers), self.filled[index])

    def insert(self, other: "KVCache", rows: Array) -> "KVCache":
        """This cache with its rows `rows` int32 [A] taken over from the A rows of another of the same length;
        a number beyond the last row takes over none."""

        def put(mine: Array, theirs: Array) -> Array:
            return mine.at[..., rows, :, :, :].set(theirs, mode="drop")

        filled = self.filled.at[rows].set(other.filled, mode="drop")
        return KVCache(jax.tree.map(put, self.layers, other.layers), filled)


def scatter_rows(buffer: Array, positions: Array, new: Array, keep: Array) -> Array:
    """Writes new [B, T, ...] into buffer [B, S, ...] at positions [B, T] where keep [B, T] is set."""
    rows = jnp.arange(buffer.shape[0])[:, None]
    beyond_the_end = buffer.shape[1]
    index = jnp.where(keep, positions, beyond_the_end)
    return buffer.at[rows, index].set(new.astype(buffer.dtype), mode="drop")


def insert_rows(state: Any, others: Any, rows: Array) -> Any:
    """A decoder's state with its rows `rows` int32 [A] taken over from the A rows of another.

    A number beyond the last row takes over none.
    """

    def put(mine: Array, theirs: Array) -> Array:
        return mine.at[rows].set(theirs, mode="drop")

    merged = jax.tree.map(put, state.replace(cache=None), others.replace(cache=None))
    return merged.replace(cache=state.cache.insert(others.cache, rows))
