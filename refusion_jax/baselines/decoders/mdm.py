"""Masked diffusion with bidirectional attention: LLaDA (arXiv 2502.09992) and Fast-dLLM (arXiv 2505.22618).

Every token of prompt and response sees every other, so that none has keys and values that stay right when
another is committed. How a pass gets those of the tokens outside the current block is the setting `cache`:

  none     every pass feeds prompt and response, committed tokens and masks
  prefix   so does the first pass over a block, and keeps what stands before the block; later ones feed the
           block and all masks after it
  dual     so does the first pass over a block, and keeps all; later ones feed the block alone

What is kept is that of a block's first pass until the next block begins: an approximation, the papers'.

Where they are silent or differ: the mask is never drafted, and no part of a probability (they take the
argmax and the softmax over all tokens); a probability has to be above the threshold, not equal to it;
`tokens_per_step` is a number of tokens, not of steps; decoding ends after the first block with an EOS, where
they fill all blocks; tokens after the first EOS are not given out.

S is the prompt and the response as padded, T the block; other letters as in model.py.
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
    """Fields as in MDMConfig."""

    FIELDS: ClassVar[dict[str, Any]] = BlockRequests.FIELDS | {"cache_kind": jnp.int32}

    cache_kind: Array


def exact_shape(prompts: Sequence[Sequence[int]], configs: Sequence[MDMConfig]) -> Shape:
    """The smallest shape that holds these requests as one batch."""
    asked = {c.cache for c in configs}
    caches = tuple(cache for cache in CACHES if cache in asked)
    return dataclasses.replace(blocks.exact_shape(prompts, configs), caches=caches)


def start(model, prompts: Array, requests: MDMRequests, shape: Shape) -> BlockState:
    """The state before the first pass."""
    return BlockState.start(model, prompts, requests, shape, cached=any_kept(shape))


def first_pass(model, params, state: BlockState, mask_id: Array, eos_id: Array, shape: Shape) -> BlockState:
    """The first pass over all prompts and responses."""
    fed = block_inputs(state, mask_id, width=state.tokens.shape[1], length=shape.block, cached=False)
    passed = padded_pass(model, params, fed)
    if any_kept(shape):
        keep = fed.active & (state.requests.cache_kind != NONE)[:, None]
        state = state.replace(cache=passed.commit(state.cache, fed.positions, keep))
    return read_block(model, params, state, passed.states, mask_id, eos_id)


def passes(
    model, params, carry: Carry, go_on: Callable, mask_id: Array, eos_id: Array, shape: Shape
) -> Carry:
    """`Decoder.passes`: passes that may begin a block are apart from those that do not.

    The latter only read the cache, so that it stays where it is.
    """

    def within_blocks(carry: Carry) -> Carry:
        state, made = carry
        states = pass_within(model, params, state, mask_id, shape)
        return read_block(model, params, state, states, mask_id, eos_id), made + 1

    def body(carry: Carry) -> Carry:
        """One pass in which rows may begin a block and keep what they feed, then all in which none does."""
        state, made = carry
        state, states = pass_beginning(model, params, state, mask_id, shape)
        carry = read_block(model, params, state, states, mask_id, eos_id), made + 1
        return jax.lax.while_loop(
            lambda carry: go_on(carry) & ~jnp.any(keeps(carry[0])), within_blocks, carry
        )

    return jax.lax.while_loop(go_on, body if any_kept(shape) else within_blocks, carry)


def any_kept(shape: Shape) -> bool:
    """Whether any request wants keys and values kept."""
    return shape.caches != (CACHES[NONE],)


def keeps(state: BlockState) -> Array:
    """bool [B]: the next pass of a row keeps keys and values of what it feeds."""
    return state.begins & (state.requests.cache_kind != NONE)


def block_inputs(state: BlockState, mask_id: Array, width: int, length: int, cached: bool) -> BlockInputs:
    """What every row feeds, in `width` places: all of its text, or from its block on, or its block.

    Args:
      length: T.
      cached: whether there is a cache to see. A row sees what is in it beside the tokens it feeds.
    """
    first, past = interval(state)
    place = jnp.arange(width)
    positions = first[:, None] + place
    active = positions < past[:, None]
    mask = active
    if cached:
        position = jnp.arange(state.tokens.shape[1])
        fed = (position >= first[:, None]) & (position < past[:, None])
        mask = jnp.concatenate([state.cache.filled & ~fed, active], axis=1)
    in_block = (state.block_start - first)[:, None] + jnp.arange(length)
    return BlockInputs(state.fed_tokens(positions, mask_id), positions, active, mask[:, None], in_block)


def interval(state: BlockState) -> tuple[Array, Array]:
    """int32 [B] each: the first position that a row feeds, and the one after its last; equal for none."""
    requests = state.requests
    everything = state.begins | (requests.cache_kind == NONE)
    block_only = ~everything & (requests.cache_kind == DUAL)
    end = requests.prompt_len + requests.num_blocks * requests.block_len
    first = jnp.where(everything, 0, state.block_start)
    past = jnp.where(block_only, state.block_start + requests.block_len, end)
    return first, jnp.where(state.done, first, past)


def pass_beginning(
    model, params, state: BlockState, mask_id: Array, shape: Shape
) -> tuple[BlockState, Array]:
    """A pass of all rows in which some begin a block; the state with what they keep, and states [B, T, D]."""
    B, S = state.tokens.shape
    # Rows begin a block together, or few at a time; one row feeds all of its text.
    sizes = quarters(S) if B == 1 else pass_sizes(B * S, least(B * S, 16))
    fed = block_inputs(state, mask_id, S, shape.block, cached=True)
    passed = sized_pass(model, params, state.cache, fed, sizes, keep=True)
    keep = fed.active & keeps(state)[:, None]
    return state.replace(cache=passed.commit(state.cache, fed.positions, keep)), passed.states


def pass_within(model, params, state: BlockState, mask_id: Array, shape: Shape) -> Array:
    """A pass of all rows of which nothing is kept; states [B, T, D]."""
    (B, S), T = state.tokens.shape, shape.block

    def pass_of(width: int, sizes: list[int], cached: bool = True) -> Array:
        fed = block_inputs(state, mask_id, width, T, cached)
        return sized_pass(model, params, state.cache if cached else None, fed, sizes, keep=False).states

    if not any_kept(shape):
        return pass_of(S, quarters(B * S), cached=False)

    def narrow() -> Array:
        return pass_of(T, pass_sizes(B * T, least(B * T, 4)))

    def wide() -> Array:
        return pass_of(S, pass_sizes(B * S, least(B * S, 8)))

    if shape.caches == (CACHES[DUAL],):
        return narrow()
    first, past = interval(state)
    return jax.lax.cond(jnp.all(past - first <= T), narrow, wide)


def least(most: int, parts: int) -> int:
    """The fewest tokens to compile a pass for, where the most are `most`."""
    return max(SMALLEST_PASS, most // parts)


DECODER = Decoder(exact_shape, MDMRequests.batch, start, first_pass, passes)
