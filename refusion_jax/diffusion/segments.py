"""Rows that hold several examples: which example each token belongs to, and its position in that example.

An array with one entry per example of a row has shape [B, E]; where E is 1 it may be [B]. The other
functions work on a single row; use `jax.vmap` for a batch.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

# Names of the arrays of a batch, all int32: tokens [B, T]; prompt_len, total_len (prompt and response) and
# example_id [B], or [B, E] where rows hold up to E examples. Unused entries have total_len 0.
Batch = Mapping[str, Array]


class TokenPlaces(NamedTuple):
    """Example and position of each of the T tokens of a row: its E examples back to back, then padding.

    Attributes:
      owner: int32 [T], index of the token's example; for padding, of the last example.
      position: int32 [T], position in that example.
      real: bool [T], whether the token is not padding.
      response: bool [T], whether the token belongs to the response.
      offset: int32 [T], position in the response; 0 before it.
      segments: int32 [T], as `owner`, but E for padding.
    """

    owner: Array
    position: Array
    real: Array
    response: Array
    offset: Array
    segments: Array


def locate_tokens(prompt_len: Array, total_len: Array, length: int) -> TokenPlaces:
    """`TokenPlaces` of a row of `length` tokens; prompt_len and total_len are int32 [E], as in a batch."""
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


def before_response(at: TokenPlaces) -> Array:
    """bool [T]: whether the next token is a response token of the same example, as autoregressive labels are.

    They begin at the last prompt token, or without a prompt at the first response token, and end at the last
    response token but one.
    """
    return jnp.roll(at.response & (at.position > 0), -1)


def columns(x: Array) -> Array:
    """x [B, E] unchanged; x [B] as [B, 1]."""
    return x.reshape(x.shape[0], -1)


def first(lengths: Array) -> Array:
    """int32 [E]: the index at which each of E consecutive runs of `lengths` [E] begins."""
    return jnp.cumsum(lengths) - lengths


def owners(first: Array, count: int) -> Array:
    """int32 [count]: the index of the run that contains each of 0 … count - 1.

    Args:
      first: int [E], ascending: where each of the consecutive runs begins.
      count: number of indices to look up; indices beyond the runs count as part of the last run.
    """
    # compare_all: E is small, and comparing with every entry is one fused operation; a search is a loop.
    return jnp.searchsorted(first, jnp.arange(count), side="right", method="compare_all") - 1
