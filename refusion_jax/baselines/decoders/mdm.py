"""Masked diffusion with bidirectional attention: LLaDA (arXiv 2502.09992) and Fast-dLLM (arXiv 2505.22618).

Every token of prompt and response sees every other token, so each commit changes the exact keys and values of
all tokens. The setting `cache` says where a pass takes the keys and values of tokens outside the current
block from:

  none     Every pass feeds prompt and response, with mask tokens where nothing is committed.
  prefix   The first pass over a block does so too, and caches the keys and values before the block. Later
           passes feed the block and the mask tokens after it.
  dual     The first pass over a block does so too, and caches all keys and values. Later passes feed the
           block only.

Cached keys and values stay those of the block's first pass until the next block begins. This approximation is
Fast-dLLM's.

The decoder differs from the papers, or settles a point that they leave open, as follows. The mask token is
never drafted and is excluded from the softmax (the papers take argmax and softmax over all tokens). A
probability must be above the threshold; equal is not enough. `tokens_per_step` is a number of tokens, not of
steps. Decoding ends after the first block with an EOS (the papers fill all blocks). Tokens after the first
EOS are not returned.

S is the padded length of prompt and response, T that of a block; other letters as in model/transformer.py.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from refusion_jax.baselines.decoders import blocks
from refusion_jax.baselines.decoders.blocks import BlockRequests, BlockState
from refusion_jax.baselines.decoders.config import CACHES, DUAL, NONE, MDMConfig
from refusion_jax.baselines.decoders.passes import BlockInputs, padded_pass, quarters, read_block, sized_pass
from refusion_jax.decode.batch import Shape
from refusion_jax.decode.decoder import Carry, Decoder
from refusion_jax.decode.forward import pass_sizes
from refusion_jax.decode.inputs import SMALLEST_PASS

Array = jax.Array


class MDMRequests(BlockRequests):
    """A batch of requests. Fields as in BlockRequests, and `cache_kind` int32 [B] as in MDMConfig."""

    FIELDS: ClassVar[dict[str, Any]] = BlockRequests.FIELDS | {"cache_kind": jnp.int32}

    cache_kind: Array


def exact_shape(prompts: Sequence[Sequence[int]], configs: Sequence[MDMConfig]) -> Shape:
    """The smallest shape that holds these requests as one batch; errors as in `blocks.exact_shape`."""
    asked_caches = {c.cache for c in configs}
    caches = tuple(cache for cache in CACHES if cache in asked_caches)
    return dataclasses.replace(blocks.exact_shape(prompts, configs), caches=caches)


def start(model, prompts: Array, requests: MDMRequests, shape: Shape) -> BlockState:
    """The state before the first pass. Without requests that use a cache, its length is 0."""
    return BlockState.start(model, prompts, requests, shape, cached=any_cached(shape))


def first_pass(model, params, state: BlockState, mask_id: Array, eos_ids: Array, shape: Shape) -> BlockState:
    """The first pass, over all prompts and responses."""
    fed = block_inputs(state, mask_id, width=state.tokens.shape[1], length=shape.block, cached=False)
    passed = padded_pass(model, params, fed)
    if any_cached(shape):
        keep = fed.active & (state.requests.cache_kind != NONE)[:, None]
        state = state.replace(cache=passed.commit(state.cache, fed.positions, keep))
    return read_block(model, params, state, passed.states, mask_id, eos_ids)


def passes(
    model, params, carry: Carry, should_continue: Callable, mask_id: Array, eos_ids: Array, shape: Shape
) -> Carry:
    """`Decoder.passes`: an outer loop over passes that write the cache, an inner loop over those that do not.

    Passes that begin no block only read the cache. In a loop of their own they leave it in place in memory.
    """

    def within_blocks(carry: Carry) -> Carry:
        state, made = carry
        states = pass_within(model, params, state, mask_id, shape)
        return read_block(model, params, state, states, mask_id, eos_ids), made + 1

    def body(carry: Carry) -> Carry:
        """One pass in which rows may begin a block and write the cache, then passes in which none does."""
        state, made = carry
        state, states = pass_beginning(model, params, state, mask_id, shape)
        carry = read_block(model, params, state, states, mask_id, eos_ids), made + 1
        return jax.lax.while_loop(
            lambda carry: should_continue(carry) & ~jnp.any(writes_cache(carry[0])), within_blocks, carry
        )

    return jax.lax.while_loop(should_continue, body if any_cached(shape) else within_blocks, carry)


def any_cached(shape: Shape) -> bool:
    """Whether some request uses a cache."""
    return shape.caches != (CACHES[NONE],)


def writes_cache(state: BlockState) -> Array:
    """bool [B]: rows whose next pass writes keys and values to the cache."""
    return state.begins & (state.requests.cache_kind != NONE)


def block_inputs(state: BlockState, mask_id: Array, width: int, length: int, cached: bool) -> BlockInputs:
    """The inputs of a pass, padded to `width` tokens per row: the positions of `interval`.

    Args:
      width: Q, the most tokens that a row feeds.
      length: T.
      cached: whether there is a cache. A row then sees the cache entries at positions that it does not feed.
    """
    first, end = interval(state)
    place = jnp.arange(width)
    positions = first[:, None] + place
    active = positions < end[:, None]
    mask = active
    if cached:
        position = jnp.arange(state.tokens.shape[1])
        fed = (position >= first[:, None]) & (position < end[:, None])
        mask = jnp.concatenate([state.cache.filled & ~fed, active], axis=1)
    in_block = (state.block_start - first)[:, None] + jnp.arange(length)
    return BlockInputs(state.fed_tokens(positions, mask_id), positions, active, mask[:, None], in_block)


def interval(state: BlockState) -> tuple[Array, Array]:
    """The positions that each row feeds in its next pass: all of its text, from its block on, or its block.

    Returns:
      the first position and the one after the last, int32 [B] each; equal for rows that feed nothing.
    """
    requests = state.requests
    everything = state.begins | (requests.cache_kind == NONE)
    block_only = ~everything & (requests.cache_kind == DUAL)
    text_end = requests.prompt_len + requests.num_blocks * requests.block_len
    first = jnp.where(everything, 0, state.block_start)
    end = jnp.where(block_only, state.block_start + requests.block_len, text_end)
    return first, jnp.where(state.done, first, end)


def pass_beginning(
    model, params, state: BlockState, mask_id: Array, shape: Shape
) -> tuple[BlockState, Array]:
    """A pass in which some rows begin a block and write the cache.

    Returns:
      the state with the new cache; and the final hidden states of each row's block, [B, T, D].
    """
    B, S = state.tokens.shape
    # Either all rows begin a block at once, or few do. A single row feeds all of its text.
    sizes = quarters(S) if B == 1 else pass_sizes(B * S, least(B * S, 16))
    fed = block_inputs(state, mask_id, S, shape.block, cached=True)
    passed = sized_pass(model, params, state.cache, fed, sizes, keep=True)
    keep = fed.active & writes_cache(state)[:, None]
    return state.replace(cache=passed.commit(state.cache, fed.positions, keep)), passed.states


def pass_within(model, params, state: BlockState, mask_id: Array, shape: Shape) -> Array:
    """A pass that does not write the cache; returns the final hidden states of each block, [B, T, D]."""
    (B, S), T = state.tokens.shape, shape.block

    def pass_of(width: int, sizes: list[int], cached: bool = True) -> Array:
        fed = block_inputs(state, mask_id, width, T, cached)
        return sized_pass(model, params, state.cache if cached else None, fed, sizes, keep=False).states

    if not any_cached(shape):
        return pass_of(S, quarters(B * S), cached=False)

    def narrow() -> Array:
        return pass_of(T, pass_sizes(B * T, least(B * T, 4)))

    def wide() -> Array:
        return pass_of(S, pass_sizes(B * S, least(B * S, 8)))

    if shape.caches == (CACHES[DUAL],):
        return narrow()
    first, end = interval(state)
    return jax.lax.cond(jnp.all(end - first <= T), narrow, wide)


def least(most: int, parts: int) -> int:
    """The smallest number of tokens to compile a pass for, if the largest is `most`."""
    return max(SMALLEST_PASS, most // parts)


DECODER = Decoder(exact_shape, MDMRequests.batch, start, first_pass, passes)
