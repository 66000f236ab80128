"""Block diffusion (BD3-LM, arXiv 2503.09573): diffusion within a block, left to right from block to block.

A token of the response sees the prompt, all blocks before its own, and the whole of its own; the prompt is
causal. So keys and values of finished blocks never change, and the cache is exact. Those of a block are
computed once it is finished, in the pass that drafts the next block for the first time: the finished block
rides along and does not see the next one. A block costs no pass but those that fill it.

A pass commits by the rule of MDM (`blocks.surest`). The mask is never drafted; decoding ends after the first
block with an EOS, and tokens after that EOS are not given out.

P, S and T are prompt, text and block as padded; other letters as in model.py.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from refusion_jax.baselines.decoders import blocks
from refusion_jax.baselines.decoders.blocks import BlockConfig, BlockRequests, BlockState, exact_shape, finish
from refusion_jax.baselines.decoders.passes import BlockInputs, padded_pass, read_block, sized_pass
from refusion_jax.decode.batch import Prepared, Shape
from refusion_jax.decode.config import MOST_TOKENS, check_whole
from refusion_jax.decode.forward import pass_sizes
from refusion_jax.decode.inputs import SMALLEST_PASS
from refusion_jax.decode.samples import Samples
from refusion_jax.model.transformer import exact_matmuls

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class BD3Config(BlockConfig):
    """How one prompt is answered; other attributes and errors as in BlockConfig.

    Attributes:
      block_len: tokens of a block, as the model was trained; gen_length is a multiple.
    """

    block_len: int = 32

    def __post_init__(self):
        super().__post_init__()
        check_whole("block_len", self.block_len, 1, MOST_TOKENS)
        self.check_blocks("block_len", self.block_len, self.block_len)

    @property
    def num_blocks(self) -> int:
        """Blocks of a response."""
        return self.gen_length // self.block_len


def prepare(
    model,
    prompts: Sequence[Sequence[int]],
    config: BD3Config | Sequence[BD3Config],
    shape: Shape | None = None,
) -> Prepared:
    """Checks and pads a batch; see `blocks.prepare`."""
    return blocks.prepare(model, prompts, config, shape, exact_shape, BlockRequests)


@functools.partial(jax.jit, static_argnames=("model", "shape"))
def init(model, prompts: Array, requests: BlockRequests, *, shape: Shape) -> BlockState:
    """The state before the first pass."""
    return BlockState.start(model, prompts, requests, shape)


@functools.partial(jax.jit, static_argnames=("model", "shape"))
def begin(
    model, params, prompts: Array, requests: BlockRequests, mask_id: Array, eos_id: Array, *, shape: Shape
) -> BlockState:
    """A batch of prompts int32 [B, P] after its first pass, over the prompts and the first blocks."""
    with exact_matmuls(model):
        state = init(model, prompts, requests, shape=shape)
        fed = prompt_inputs(state, mask_id, shape)
        passed = padded_pass(model, params, fed)
        of_prompt = fed.active & (fed.positions < requests.prompt_len[:, None])
        state = state.replace(cache=passed.commit(state.cache, fed.positions, of_prompt))
        return read_block(model, params, state, passed.states, mask_id, eos_id)


@functools.partial(jax.jit, static_argnames=("model", "shape"), donate_argnames=("state",))
def resume(
    model, params, state: BlockState, mask_id: Array, eos_id: Array, until: int = 0, *, shape: Shape
) -> BlockState:
    """Goes on until no more than `until` rows are left running; uses `state` up."""
    with exact_matmuls(model):
        return jax.lax.while_loop(
            lambda state: jnp.sum(~state.done) > until,
            lambda state: next_pass(model, params, state, mask_id, eos_id, shape),
            state,
        )


def prompt_inputs(state: BlockState, mask_id: Array, shape: Shape) -> BlockInputs:
    """The prompts in P places, and the first blocks in T."""
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
    """The current block of every row, and behind it, where that begins, the finished block before it.

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


def next_pass(model, params, state: BlockState, mask_id: Array, eos_id: Array, shape: Shape) -> BlockState:
    """A pass over the block of each row; finished blocks are kept."""
    fed = block_inputs(state, mask_id, shape.block)
    most = fed.tokens.size
    sizes = pass_sizes(most, max(SMALLEST_PASS, most // 8))
    passed = sized_pass(model, params, state.cache, fed, sizes, keep=True)
    before = fed.active & (fed.positions < state.block_start[:, None])
    state = state.replace(cache=passed.commit(state.cache, fed.positions, before))
    return read_block(model, params, state, passed.states, mask_id, eos_id)


def sample(
    model,
    params,
    prompts: Sequence[Sequence[int]],
    config: BD3Config | Sequence[BD3Config],
    *,
    shape: Shape | None = None,
) -> Samples:
    """Answers prompts block by block; see `refusion_jax.decode.sample`.

    Raises:
      BadInput: a prompt or setting that cannot be decoded.
    """
    batch = prepare(model, prompts, config, shape)
    *inputs, shape = batch
    state = begin(model, params, *inputs, shape=shape)
    state = resume(model, params, state, batch.mask_id, batch.eos_id, shape=shape)
    return jax.tree.map(lambda x: x[: len(prompts)], finish(state, batch.eos_id, shape))
