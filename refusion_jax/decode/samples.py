"""The result of decoding, the same for all methods."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


class Samples(struct.PyTreeNode):
    """The decoded responses of a batch. G is the padded response length.

    Attributes:
      raw_ids: int32 [B, G], all committed response tokens in text order, without gaps, then zeros.
      num_raw: int32 [B], the number of committed response tokens.
      num_ids: int32 [B], the number of tokens before the first EOS: `raw_ids[b, :num_ids[b]]` is the answer.
      num_forwards: int32 [B], forward passes in which the row had tokens to compute.
      num_iterations: int32 [B], plans executed; for AR tokens decoded, for MDM and BD3 forward passes.
      trace: a `decode.trace.Trace` if the shape asks for one, otherwise None.
    """

    raw_ids: Array
    num_raw: Array
    num_ids: Array
    num_forwards: Array
    num_iterations: Array
    trace: Any = None


@functools.partial(jax.jit, static_argnames=("gen",))
def in_text_order(
    tokens: Array, committed: Array, eos: Array, prompt_len: Array, *, gen: int
) -> tuple[Array, Array, Array]:
    """The fields raw_ids, num_raw and num_ids of Samples.

    Args:
      tokens: int32 [B, S], by position.
      committed: bool [B, S], the tokens to return; entries at prompt positions are ignored.
      eos: bool [B, S], the tokens that end a response.
      prompt_len: int32 [B].
      gen: G, the padded response length.
    """

    def one(tokens: Array, committed: Array, eos: Array, prompt_len: Array) -> tuple[Array, Array, Array]:
        place = jnp.arange(tokens.shape[0])
        response = committed & (place >= prompt_len)
        order = jnp.argsort(jnp.where(response, place, tokens.shape[0]))[:gen]
        num_raw = jnp.sum(response)
        real = jnp.arange(gen) < num_raw
        raw_ids = jnp.where(real, tokens[order], 0)
        ends = real & eos[order]
        return raw_ids, num_raw, jnp.where(ends.any(), jnp.argmax(ends), num_raw)

    return jax.vmap(one)(tokens, committed, eos, prompt_len)


def is_eos(tokens: Array, eos_ids: Array) -> Array:
    """bool, of the shape of `tokens`: which of them are one of `eos_ids`, int32 [E] or a scalar."""
    return jnp.any(tokens[..., None] == eos_ids, axis=-1)
