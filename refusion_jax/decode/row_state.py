"""The decoding state of one row of a batch, and the layout of its current block in the text.

M is the padded number of slots per block, T the padded block length.
"""

from enum import IntEnum

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.decode.batch import Requests

Array = jax.Array


class Phase(IntEnum):
    """The purpose of a row's next forward pass; see loop.py."""

    PLAN = 0
    VERIFY = 1
    INFILL = 2
    DONE = 3


class RowState(struct.PyTreeNode):
    """The decoding state of a row. Outside `vmap` every field has a leading batch axis.

    Attributes:
      phase: int32, a Phase.
      block: int32, the index of the current block.
      pool: bool [M], slots of the block that are not decoded yet.
      chosen: bool [M], slots chosen by the last plan.
      open: bool [M], chosen slots that are being infilled; slots after one with an EOS are dropped.
      confidence: float32 [M], slot scores of the last plan; -1 for slots not in the pool.
      draft: int32 [T], the current drafts of the block's tokens.
      accepted: int32 [M], the number of leading tokens of each open slot that are accepted.
      cached: int32 [M], the number of those whose keys and values are in the cache. Until the infill is
        complete, only their own slot may see them.
      drafted: bool [M], whether the tokens of an open slot that are not accepted are drafted, so that the
        next pass verifies them; False if they have to be refilled first.
      rounds: int32 [M], refills of each open slot since the last plan.
      settled: bool, whether the drafts to verify come from a complete infill and are accepted already, so
        that the pass only recomputes keys and values. None where no request of the shape recomputes them.
      eos_found: bool, whether an EOS is committed, after which no further block is decoded.
      forwards, iterations: int32, forward passes made and plans executed.
    """

    phase: Array
    block: Array
    pool: Array
    chosen: Array
    open: Array
    confidence: Array
    draft: Array
    accepted: Array
    cached: Array
    drafted: Array
    rounds: Array
    settled: Array | None
    eos_found: Array
    forwards: Array
    iterations: Array

    @classmethod
    def start(cls, request: Requests, num_slots: int, block: int) -> "RowState":
        """The state of a row before its first plan. A request without blocks is done."""
        none, number = jnp.zeros(num_slots, bool), jnp.int32(0)
        numbers = jnp.zeros(num_slots, jnp.int32)
        return cls(
            phase=jnp.where(request.num_blocks > 0, Phase.PLAN, Phase.DONE).astype(jnp.int32),
            block=number,
            pool=all_slots(request, num_slots),
            chosen=none,
            open=none,
            confidence=jnp.zeros(num_slots, jnp.float32),
            draft=jnp.zeros(block, jnp.int32),
            accepted=numbers,
            cached=numbers,
            drafted=none,
            rounds=numbers,
            settled=None if request.recompute is None else jnp.zeros((), bool),
            eos_found=jnp.zeros((), bool),
            forwards=number,
            iterations=number,
        )


class Geometry(struct.PyTreeNode):
    """The layout of a row's current block. Arrays are [T], int32 unless stated otherwise.

    Attributes:
      index: the index of the token in the block.
      inside: bool, False for the padding of a block shorter than T.
      slot: the index of the token's slot in the block.
      offset: the index of the token in its slot.
      position: the position in the text, counted from the start of the prompt.
    """

    index: Array
    inside: Array
    slot: Array
    offset: Array
    position: Array


def geometry(row: RowState, request: Requests) -> Geometry:
    """The layout of a row's current block."""
    index = jnp.arange(row.draft.shape[0])
    slot, offset = jnp.divmod(index, request.slot_size)
    position = request.prompt_len + row.block * request.block_len + index
    return Geometry(index, index < request.block_len, slot, offset, position)


def all_slots(request: Requests, num_slots: int) -> Array:
    """bool [M]: the slots that a block of the request has; False for padding."""
    return jnp.arange(num_slots) * request.slot_size < request.block_len


def next_plan(
    row: RowState, request: Requests, remaining: Array, eos_found: Array
) -> tuple[Array, Array, Array]:
    """The next plan of a row whose current block has the undecoded slots `remaining` bool [M].

    That is a plan of the next block once the current one is decoded. After the last block, or a block with
    an EOS, there is no next plan.

    Returns:
      the block to plan (int32), its pool (bool [M]), and whether there is a next plan (bool).
    """
    block_done = ~remaining.any()
    last = eos_found | (row.block + 1 >= request.num_blocks)
    enter = block_done & ~last
    pool = jnp.where(enter, all_slots(request, remaining.shape[0]), remaining)
    return row.block + enter, pool, ~(block_done & last)


def first_chosen(row: RowState) -> Array:
    """bool [M]: the first chosen slot, the only one whose drafts see no other slot's drafts in VERIFY."""
    return row.chosen & (jnp.cumsum(row.chosen) == 1)


def own_entries(row: RowState, request: Requests, length: int) -> tuple[Array, Array]:
    """The cache entries that only their own slot may see: tokens accepted while the slot is infilled.

    Args:
      length: S, the cache length.

    Returns:
      those entries, bool [S]; and the slot of each position, int32 [S], meaningful for positions in the
      current block only.
    """
    index = jnp.arange(length) - (request.prompt_len + row.block * request.block_len)
    slot, offset = jnp.divmod(index, request.slot_size)
    m = jnp.clip(slot, 0, row.open.shape[0] - 1)
    inside = (index >= 0) & (index < request.block_len)
    return inside & row.open[m] & (offset < row.cached[m]), slot
