"""An attention mask packed into bits, as the attention kernel for decoding takes it.

Plain array code, apart from the kernel: the transformer packs a mask once per forward pass for all layers,
and imports no Pallas for it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

MOST_ROWS = 64
FEWEST_ROWS = 16  # the matrix units take no fewer
KEYS = 64  # per tile of keys
WORD = 32  # keys per word of mask bits


class Visible(NamedTuple):
    """A mask in the kernel's terms, made once a forward for all layers; int32 throughout.

    Attributes:
      cache: [B, T, S / WORD], a bit for each entry of the cache, rounded up to whole tiles.
      fresh: [B, T, T / WORD], a bit for each token fed, likewise.
      used: [B, S / WORD], entries that some query of the row sees. The others are never computed with, so
        they may hold anything.
      ends: [B, tiles of T, 2], how many tiles of the cache and of the tokens fed those queries see.
    """

    cache: Array
    fresh: Array
    used: Array
    ends: Array


def visible(mask: Array, groups: int) -> Visible:
    """Packs a mask.

    Args:
      mask: bool [B, T, S + T].
      groups: G.
    """
    B, T, _ = mask.shape
    tokens, _ = tile(T, groups)
    S = mask.shape[2] - T

    def pack(part: Array) -> Array:
        part = _padded(part, -1, KEYS)
        bits = part.reshape(*part.shape[:-1], part.shape[-1] // WORD, WORD)
        words = jnp.sum(bits << jnp.arange(WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)
        return jax.lax.bitcast_convert_type(words, jnp.int32)

    def ends(part: Array) -> Array:
        part = _padded(part, 1, tokens).reshape(B, _cdiv(T, tokens), tokens, part.shape[-1])
        last = jnp.max(jnp.where(part, jnp.arange(1, part.shape[-1] + 1), 0), axis=(2, 3), initial=0)
        return _cdiv(last, KEYS).astype(jnp.int32)

    cache, fresh = mask[:, :, :S], mask[:, :, S:]
    return Visible(
        pack(cache), pack(fresh), pack(cache.any(1)), jnp.stack([ends(cache), ends(fresh)], axis=-1)
    )


def tile(length: int, groups: int) -> tuple[int, int]:
    """(tokens, rows) of a tile of queries; rows is a power of two, and tokens x G may leave some idle."""
    rows = min(MOST_ROWS, max(FEWEST_ROWS, _next_power_of_2(length * groups)))
    rows = max(rows, _next_power_of_2(groups))
    return rows // groups, rows


def _padded(x: Array, axis: int, multiple: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)


def _cdiv(x: int | Array, y: int) -> int | Array:
    return -(-x // y)


def _next_power_of_2(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()
