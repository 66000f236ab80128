"""The attention mask in the form that `triton_attention` reads, and the tile sizes that both depend on.

Plain arrays and numbers: importing this module loads no Pallas, so a model on a CPU can import it.

Letters as in model/transformer.py. A tile is what one program of the kernel holds at once: `rows` pairs of
(token, query head of one key/value head), or KEYS keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

MOST_ROWS = 64
FEWEST_ROWS = 16  # the matrix units take no fewer
KEYS = 64
WORD = 32  # keys per word of mask bits


class Visible(NamedTuple):
    """A packed attention mask, made once per forward pass for all layers; int32 throughout.

    Attributes:
      cache: [B, T, S / WORD], one bit per cache entry, S rounded up to whole tiles.
      fresh: [B, T, T / WORD], one bit per token fed, the last axis rounded up likewise.
      used: [B, S / WORD], one bit per cache entry that some query of the row sees. The kernel ignores the
        other entries, so they may hold anything.
      ends: [B, tiles of T, 2], per tile of queries the number of tiles of cache entries and of tokens fed
        up to the last one that a query of the tile sees.
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
    tokens, _ = query_tile(T, groups)
    S = mask.shape[2] - T

    def pack(part: Array) -> Array:
        part = _padded(part, -1, KEYS)
        bits = part.reshape(*part.shape[:-1], part.shape[-1] // WORD, WORD)
        words = jnp.sum(bits << jnp.arange(WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)
        return jax.lax.bitcast_convert_type(words, jnp.int32)

    def ends(part: Array) -> Array:
        part = _padded(part, 1, tokens).reshape(B, ceil_div(T, tokens), tokens, part.shape[-1])
        last = jnp.max(jnp.where(part, jnp.arange(1, part.shape[-1] + 1), 0), axis=(2, 3), initial=0)
        return ceil_div(last, KEYS).astype(jnp.int32)

    cache, fresh = mask[:, :, :S], mask[:, :, S:]
    return Visible(
        pack(cache), pack(fresh), pack(cache.any(1)), jnp.stack([ends(cache), ends(fresh)], axis=-1)
    )


def query_tile(length: int, groups: int) -> tuple[int, int]:
    """(tokens, rows) of a tile of queries; rows is a power of two, and tokens x G may leave some idle."""
    rows = min(MOST_ROWS, max(FEWEST_ROWS, _next_power_of_2(length * groups)))
    rows = max(rows, _next_power_of_2(groups))
    return rows // groups, rows


def ceil_div(number, divisor: int):
    """`number` / `divisor` rounded up, for an int or an array of them."""
    return (number + divisor - 1) // divisor


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _padded(x: Array, axis: int, multiple: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)
