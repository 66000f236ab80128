"""The key/value cache: preallocated, indexed by absolute position, with a bitmap of the filled entries.

A committed key or value never changes, and attention does not depend on the order in which entries were
written. So slots that are committed out of text order need no cropping, concatenation or sorting: each entry
is written at its position in the text, and the bitmap says which entries may be attended to.

Letters as in model/transformer.py; S is the cache length.
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
      layers: (keys, values), each [L, B, S, K, H]: with one array a commit is one write, and attention
        reads its layer in place. Or each a tuple of L arrays [B, S, K, H], for TPUs: there the compiler would
        copy the single array in every pass to put heads before positions.
      filled: bool [B, S], which positions hold a committed token.
    """

    layers: LayerKV | tuple[tuple[Array, ...], tuple[Array, ...]]
    filled: Array

    @classmethod
    def zeros(
        cls, config: ModelConfig, batch: int, length: int, dtype, *, by_layer: bool = False
    ) -> "KVCache":
        """An empty cache of `length` positions per row; one array for all layers, or one per layer."""
        shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
        axes = (None, "act_batch", "act_length", "act_kv_heads", None)

        def empty() -> Any:
            buffer = nn.with_logical_constraint(jnp.zeros(shape, dtype), axes)
            return tuple(buffer) if by_layer else buffer

        return cls((empty(), empty()), jnp.zeros((batch, length), bool))

    def write(self, fresh: LayerKV, positions: Array, keep: Array, row: Array | None = None) -> "KVCache":
        """Writes some of the keys and values that a forward pass returned; does not change `filled`.

        Args:
          fresh: (keys, values), each [L, B, T, K, H].
          positions: int32 [B, T], the position of each token in the text.
          keep: bool [B, T]; other entries are not written.
          row: int32 [B, T], the batch row of each token, for tokens that are not laid out by row.
        """
        rows = jnp.arange(positions.shape[0])[:, None] if row is None else row
        index = jnp.where(keep, positions, self.filled.shape[1])  # an index past the end is dropped

        def put(buffer: Array, new: Array) -> Array:
            return buffer.at[..., rows, index, :, :].set(new.astype(buffer.dtype), mode="drop")

        if isinstance(self.layers[0], tuple):
            fresh = tuple(map(tuple, fresh))
        return self.replace(layers=jax.tree.map(put, self.layers, fresh))

    def fill(self, positions: Array, committed: Array) -> "KVCache":
        """Marks entries as filled: `committed` bool [B, T], at positions int32 [B, T]."""
        return self.replace(filled=scatter_rows(self.filled, positions, committed, committed))

    def commit(self, fresh: LayerKV, positions: Array, keep: Array) -> "KVCache":
        """`write` and `fill` of the same tokens."""
        return self.write(fresh, positions, keep).fill(positions, keep)

    def rows(self, index) -> "KVCache":
        """The cache of some rows of the batch; an integer index drops the batch axis."""
        return KVCache(jax.tree.map(lambda x: x[..., index, :, :, :], self.layers), self.filled[index])

    def insert(self, other: "KVCache", rows: Array) -> "KVCache":
        """This cache with rows `rows` int32 [A] replaced by the A rows of `other`, which has the same length.

        Entries of `rows` past the last row are ignored.
        """

        def put(old: Array, new: Array) -> Array:
            return old.at[..., rows, :, :, :].set(new, mode="drop")

        filled = self.filled.at[rows].set(other.filled, mode="drop")
        return KVCache(jax.tree.map(put, self.layers, other.layers), filled)


def scatter_rows(buffer: Array, positions: Array, new: Array, keep: Array) -> Array:
    """`buffer` [B, S, ...] with `new` [B, T, ...] written at positions [B, T] where `keep` [B, T] is set."""
    rows = jnp.arange(buffer.shape[0])[:, None]
    beyond_the_end = buffer.shape[1]
    index = jnp.where(keep, positions, beyond_the_end)
    return buffer.at[rows, index].set(new.astype(buffer.dtype), mode="drop")


def insert_rows(state: Any, others: Any, rows: Array) -> Any:
    """A decoder's state with rows `rows` int32 [A] replaced by the A rows of `others`.

    Entries of `rows` past the last row are ignored.
    """

    def put(old: Array, new: Array) -> Array:
        return old.at[rows].set(new, mode="drop")

    merged = jax.tree.map(put, state.replace(cache=None), others.replace(cache=None))
    return merged.replace(cache=state.cache.insert(others.cache, rows))
