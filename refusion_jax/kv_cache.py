"""The key/value cache: preallocated, indexed by absolute position, with a bitmap of what is filled.

A committed key or value never changes and attention does not care in which order entries arrived, so
slots that are committed out of text order need no cropping, concatenating or sorting: they are written
where they stand in the text, and the bitmap says what may be attended to.
"""

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.attention import LayerKV
from refusion_jax.model import ModelConfig

Array = jax.Array


class KVCache(struct.PyTreeNode):
    """Keys and values of the committed tokens.

    Attributes:
      layers: keys and values of all layers, each [L, B, S, K, H]: one array, so that a commit is one
        write, and attention reads its layer in place.
      filled: bool [B, S], which positions hold a committed token.
    """

    layers: LayerKV
    filled: Array

    @classmethod
    def zeros(cls, config: ModelConfig, batch: int, length: int, dtype) -> "KVCache":
        """An empty cache of `length` positions a row."""
        shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
        return cls((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)), jnp.zeros((batch, length), bool))

    def commit(self, fresh: LayerKV, positions: Array, keep: Array) -> "KVCache":
        """Keeps some of the keys and values a forward pass returned.

        Args:
          fresh: keys and values, each [L, B, T, K, H].
          positions: int32 [B, T], where each stands in the text.
          keep: bool [B, T]; the others leave no trace.
        """

        keys, values = (
            _scatter(buffer, (slice(None),), positions, new, keep)
            for buffer, new in zip(self.layers, fresh, strict=True)
        )
        return KVCache((keys, values), scatter_rows(self.filled, positions, jnp.ones_like(keep), keep))

    def rows(self, index) -> "KVCache":
        """The same of some rows of the batch; a whole number drops that axis."""
        keys, values = (x[:, index] for x in self.layers)
        return KVCache((keys, values), self.filled[index])


def scatter_rows(buffer: Array, positions: Array, new: Array, keep: Array) -> Array:
    """Writes new [B, T, ...] into buffer [B, S, ...] at positions [B, T] where keep [B, T] is set."""
    return _scatter(buffer, (), positions, new, keep)


def _scatter(buffer: Array, leading: tuple[slice, ...], positions: Array, new: Array, keep: Array) -> Array:
    """`scatter_rows` behind leading axes that are written whole."""
    rows = jnp.arange(positions.shape[0])[:, None]
    beyond_the_end = buffer.shape[len(leading) + 1]
    index = (*leading, rows, jnp.where(keep, positions, beyond_the_end))
    return buffer.at[index].set(new.astype(buffer.dtype), mode="drop")
