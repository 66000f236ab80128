"""What each plan of a decode came to, recorded as it happens."""

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.decode.batch import Requests, Shape
from refusion_jax.decode.kv_cache import scatter_rows
from refusion_jax.decode.phases import Outcome
from refusion_jax.decode.row_state import Phase, RowState

Array = jax.Array


class Trace(struct.PyTreeNode):
    """What each plan came to, indexed by iteration I: [B, I] or [B, I, M or T].

    Attributes:
      block: int32, the block.
      planned: bool [M], the slots chosen.
      confidence: float32 [M], the score of every slot in the pool, -1 elsewhere.
      iterative: bool, whether the slots were infilled one by one (False: committed as verified).
      rounds: int32, refills that the infill took.
      accepted: int32 [T]; entry m * slot_size + r is how many tokens of slot m were accepted when verified
        (r = 0) or after the r-th refill: what batch.Replay follows.
      committed: bool [T], the block's tokens committed, ascending.
      forwards: int32, passes made by then.
    """

    block: Array
    planned: Array
    confidence: Array
    iterative: Array
    rounds: Array
    accepted: Array
    committed: Array
    forwards: Array

    @classmethod
    def blank(cls, shape: Shape) -> "Trace":
        """Room for `shape.iterations` entries a row."""

        def zeros(dtype, *sizes: int) -> Array:
            return jnp.zeros((shape.rows, shape.iterations, *sizes), dtype)

        number, flag = zeros(jnp.int32), zeros(bool)
        return cls(
            block=number,
            planned=zeros(bool, shape.slots),
            confidence=zeros(jnp.float32, shape.slots),
            iterative=flag,
            rounds=number,
            accepted=zeros(jnp.int32, shape.block),
            committed=zeros(bool, shape.block),
            forwards=number,
        )


def record(trace: Trace, before: RowState, after: RowState, outcome: Outcome, requests: Requests) -> Trace:
    """Adds an entry to the rows that have just carried out a plan; what was accepted is noted in any case."""
    number = before.iterations[:, None]

    def note(accepted: Array, before: RowState, request: Requests, outcome: Outcome) -> Array:
        judged = jnp.where(before.phase == Phase.VERIFY, before.chosen, before.open & before.drafted)
        judged &= before.phase != Phase.PLAN
        if before.settled is not None:
            judged &= ~before.settled
        place = jnp.arange(judged.shape[0]) * request.slot_size + before.rounds
        place = jnp.where(judged, place, accepted.shape[1])
        return accepted.at[before.iterations, place].set(outcome.accepted, mode="drop")

    iterative = before.phase == Phase.INFILL
    if before.settled is not None:
        iterative |= before.settled
    entry = Trace(
        block=before.block,
        planned=before.chosen,
        confidence=before.confidence,
        iterative=iterative,
        rounds=outcome.rounds,
        accepted=None,
        committed=outcome.committed,
        forwards=after.forwards,
    )
    finished = (after.iterations > before.iterations)[:, None]
    entries = jax.tree.map(
        lambda buffer, new: scatter_rows(buffer, number, new[:, None], finished),
        trace.replace(accepted=None),
        entry,
    )
    return entries.replace(accepted=jax.vmap(note)(trace.accepted, before, requests, outcome))
