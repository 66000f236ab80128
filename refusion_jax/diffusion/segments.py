"""Rows of several examples: which of them each token is of, and its place there.

An array of a row's examples is [B, E]; where E is 1 it may be [B]. Everything else here is of one row, for
`jax.vmap` over rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class TokenPlaces(NamedTuple):
    """Where the T tokens of a row stand, its E examples being back to back and padding after them.

    Attributes:
      owner: int32 [T], the example each is of; of padding, the last.
      position: int32 [T], its place in that example.
      real: bool [T], not padding.
      response: bool [T], of the response.
      offset: int32 [T], its place in the response; 0 before it.
      segments: int32 [T], `owner`, but E for padding.
    """

    owner: Array
    position: Array
    real: Array
    response: Array
    offset: Array
    segments: Array


def locate_tokens(prompt_len: Array, total_len: Array, length: int) -> TokenPlaces:
    """`TokenPlaces` of a row of `length` tokens; int32 [E] each, prompt_len and total_len as in a batch."""
    start = first(total_len)
    owner = owners(start, length)
    position = jnp.arange(length) - start[owner]
    real = position < total_len[owner]
    offset = position - prompt_len[owner]
    return TokenPlaces(
        owner=owner,
        position=position.astype(jnp.int32),
        real=real,
        response=real & (offset >= 0),
        offset=jnp.maximum(offset, 0),
        segments=jnp.where(real, owner, len(total_len)).astype(jnp.int32),
    )


def columns(x: Array) -> Array:
    """[B, E] of [B, E], or of [B] where E is 1."""
    return x.reshape(x.shape[0], -1)


def first(lengths: Array) -> Array:
    """Where each of the runs of `lengths` [E] begins that stand one after the other."""
    return jnp.cumsum(lengths) - lengths


def owners(first: Array, count: int) -> Array:
    """int32 [count]: in which run, of those that begin at ascending `first` [E], each of 0 … count - 1 is.

    What lies beyond the runs counts as of the last one.
    """
    # Compared with all of them: E is small, and that is one fused operation where a search is a loop.
    return jnp.searchsorted(first, jnp.arange(count), side="right", method="compare_all") - 1
