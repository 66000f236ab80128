"""Block diffusion (BD3-LM, arXiv 2503.09573): blocks are decoded left to right, by diffusion within a block.

A response token sees the prompt, all earlier blocks and the whole of its own block; attention within the
prompt is causal. So the keys and values of finished blocks never change, and the cache is exact. The keys and
values of a block are computed once it is finished, in the first pass that drafts the next block: that pass
also feeds the finished block, which does not see the next one. So a block costs only the passes that fill it.

A pass commits tokens by the rule of MDM (`blocks.surest`). The mask token is never drafted. Decoding ends
after the first block with an EOS, and tokens after that EOS are not returned.

P, S and T are the padded lengths of prompt, text and block; other letters as in model/transformer.py.
"""

import jax
import jax.numpy as jnp

from refusion_jax.baselines.decoders.blocks import BlockRequests, BlockState, exact_shape
from refusion_jax.baselines.decoders.passes import BlockInputs, padded_pass, read_block, sized_pass
from refusion_jax.decode.batch import Shape
from refusion_jax.decode.decoder import Decoder, repeated
from refusion_jax.decode.forward import pass_sizes
from refusion_jax.decode.inputs import SMALLEST_PASS

Array = jax.Array


def first_pass(model, params, state: BlockState, mask_id: Array, eos_ids: Array, shape: Shape) -> BlockState:
    """The first pass: prefills the prompts and drafts the first blocks."""
    fed = prompt_inputs(state, mask_id, shape)
    passed = padded_pass(model, params, fed)
    of_prompt = fed.active & (fed.positions < state.requests.prompt_len[:, None])
    state = state.replace(cache=passed.commit(state.cache, fed.positions, of_prompt))
    return read_block(model, params, state, passed.states, mask_id, eos_ids)


def prompt_inputs(state: BlockState, mask_id: Array, shape: Shape) -> BlockInputs:
    """The inputs of the first pass: the prompts in P entries, then the first blocks in T entries."""
    (B, _), P, T = state.tokens.shape, shape.prompt, shape.block
    prompt_len, block_len = state.requests.prompt_len[:, None], state.requests.block_len[:, None]
    place = jnp.arange(P + T)
    in_block = place >= P
    active = jnp.where(in_block, place - P < block_len, place < prompt_len)
    positions = jnp.where(in_block, prompt_len + place - P, place)
    # The block sees itself in both directions.
    mask = active[:, None] & (in_block[:, None] | (place <= place[:, None]))
    in_block = jnp.broadcast_to(P + jnp.arange(T), (B, T))
    return BlockInputs(state.fed_tokens(positions, mask_id), positions, active, mask, in_block)


def block_inputs(state: BlockState, mask_id: Array, length: int) -> BlockInputs:
    """The inputs of a later pass: every row's current block, followed by the finished block before it if this
    is the first pass over the current one.

    Args:
      length: T.
    """
    block_len, start = state.requests.block_len[:, None], state.block_start[:, None]
    place = jnp.arange(2 * length)
    going = ~state.done[:, None]
    current = (place < block_len) & going
    finished = (place >= block_len) & (place < 2 * block_len) & state.begins[:, None] & going
    positions = start + place - jnp.where(finished, 2 * block_len, 0)
    among_fed = finished[:, None] | (current[:, :, None] & current[:, None])
    seen = jnp.broadcast_to(state.cache.filled[:, None], (*among_fed.shape[:2], state.tokens.shape[1]))
    in_block = jnp.broadcast_to(jnp.arange(length), (state.tokens.shape[0], length))
    return BlockInputs(
        state.fed_tokens(positions, mask_id),
        positions,
        current | finished,
        jnp.concatenate([seen, among_fed], axis=2),
        in_block,
    )


def next_pass(model, params, state: BlockState, mask_id: Array, eos_ids: Array, shape: Shape) -> BlockState:
    """A pass over the block of each row; the keys and values of finished blocks are cached."""
    fed = block_inputs(state, mask_id, shape.block)
    most = fed.tokens.size
    sizes = pass_sizes(most, max(SMALLEST_PASS, most // 8))
    passed = sized_pass(model, params, state.cache, fed, sizes, keep=True)
    is_finished = fed.active & (fed.positions < state.block_start[:, None])
    state = state.replace(cache=passed.commit(state.cache, fed.positions, is_finished))
    return read_block(model, params, state, passed.states, mask_id, eos_ids)


DECODER = Decoder(exact_shape, BlockRequests.batch, BlockState.start, first_pass, repeated(next_pass))
