"""Where a row of a batch stands in its decoding, and how its block lies in the text.

M slots and T tokens are those of a block as padded.
"""

from enum import IntEnum

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.decode.batch import Requests

Array = jax.Array


class Phase(IntEnum):
    """What the next forward pass of a row is for."""

    PLAN = 0
    VERIFY = 1
    INFILL = 2
    DONE = 3


class RowState(struct.PyTreeNode):
    """Where a row stands in its course; every field has a leading batch axis outside `vmap`.

    Attributes:
      phase: int32.
      block: int32, the block being decoded.
      pool: bool [M], slots of the block not yet decoded.
      chosen: bool [M], slots picked by the last plan.
      open: bool [M], chosen slots being infilled; those after a slot with EOS have left.
      confidence: float32 [M], of the last plan, -1 for slots not in the pool.
      draft: int32 [T], the block's tokens in play.
      accepted: int32 [M], how many leading tokens of each open slot are accepted.
      cached: int32 [M], how many of those have their keys and values in the cache, for their own slot alone
        to see until the infill is whole.
      drafted: bool [M], whether what is not accepted of an open slot is drafted (to be rechecked), or is
        to be refilled.
      rounds: int32 [M], refills of each open slot since the last plan.
      settled: bool, whether the drafts to verify are those of an infill, accepted already: what is wanted is
        keys and values. None where no row recomputes them.
      eos_found: bool, no further block will be decoded.
      forwards, iterations: int32, passes made, plans carried out.
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
        """A row before its first plan; a request without blocks is done."""
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
    """Where the T tokens of a row's current block lie: all int32 or bool [T]."""

    index: Array  # within the block
    inside: Array  # False for the padding of a block shorter than T
    slot: Array  # which slot of the block
    offset: Array  # within the slot
    position: Array  # in the text, prompt included


def geometry(row: RowState, request: Requests) -> Geometry:
    index = jnp.arange(row.draft.shape[0])
    slot, offset = jnp.divmod(index, request.slot_size)
    position = request.prompt_len + row.block * request.block_len + index
    return Geometry(index, index < request.block_len, slot, offset, position)


def all_slots(request: Requests, num_slots: int) -> Array:
    """bool [M]: the slots of a whole block."""
    return jnp.arange(num_slots) * request.slot_size < request.block_len


def next_plan(row: RowState, request: Requests, left: Array, eos_found: Array) -> tuple[Array, Array, Array]:
    """What is planned once the block's slots `left` [M] remain.

    Returns:
      the block (int32) and its pool (bool [M]) to plan next, and whether (bool) there is one: the next
      block's when this one is done, none after the last block or an EOS.
    """
    block_done = ~left.any()
    last = eos_found | (row.block + 1 >= request.num_blocks)
    enter = block_done & ~last
    pool = jnp.where(enter, all_slots(request, left.shape[0]), left)
    return row.block + enter, pool, ~(block_done & last)


def first_chosen(row: RowState) -> Array:
    """bool [M]: the first slot chosen, the one whose drafts are verified having seen nothing but itself."""
    return row.chosen & (jnp.cumsum(row.chosen) == 1)


def own_entries(row: RowState, request: Requests, length: int) -> tuple[Array, Array]:
    """The entries of the cache that one slot alone may see: accepted while it is infilled.

    Args:
      length: S.

    Returns:
      bool [S], which entries those are, and int32 [S], the slot each position of the text lies in if it
      is in the current block.
    """
    index = jnp.arange(length) - (request.prompt_len + row.block * request.block_len)
    slot, offset = jnp.divmod(index, request.slot_size)
    m = jnp.clip(slot, 0, row.open.shape[0] - 1)
    inside = (index >= 0) & (index < request.block_len)
    return inside & row.open[m] & (offset < row.cached[m]), slot
