"""The trace of a decode: the result of each plan, recorded inside the loop."""

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.decode.batch import Requests, Shape
from refusion_jax.decode.exact import ExactTrace
from refusion_jax.decode.kv_cache import scatter_rows
from refusion_jax.decode.phases import Outcome
from refusion_jax.decode.row_state import Phase, RowState

Array = jax.Array


class Trace(struct.PyTreeNode):
    """The result of each plan. Arrays are [B, I, ...], with I the number of plans there is room for.

    Attributes:
      block: int32, the index of the block.
      planned: bool [M], the chosen slots.
      confidence: float32 [M], the score of each slot in the pool; -1 for the others.
      iterative: bool, True if the slots were infilled (the iterative branch), False if they were committed by
        the joint verification (the prefix branch).
      rounds: int32, refills that the infill took.
      accepted: int32 [T]; entry m * slot_size + r is the number of leading tokens of slot m that were
        accepted by the joint verification (r = 0) or after the r-th refill. `batch.Replay` repeats these.
      committed: bool [T], the committed tokens of the block, by index in the block.
      forwards: int32, forward passes made up to and including the commit.
      exact: the passes of rows that are decoded exactly; None where the shape has none. The other arrays are
        empty where it has no rows decoded by slots.
    """

    block: Array
    planned: Array
    confidence: Array
    iterative: Array
    rounds: Array
    accepted: Array
    committed: Array
    forwards: Array
    exact: ExactTrace | None

    @classmethod
    def blank(cls, shape: Shape) -> "Trace":
        """An empty trace with room for `shape.iterations` plans per row."""

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
            exact=ExactTrace.blank(shape) if shape.drafts else None,
        )


def record(trace: Trace, before: RowState, after: RowState, outcome: Outcome, requests: Requests) -> Trace:
    """The trace after a pass: `accepted` is updated, and rows whose plan ended with this pass get an entry.

    Args:
      before, after: the rows [B] before and after the pass.
      outcome: [B], the result of the pass.
    """
    iteration = before.iterations[:, None]

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
        exact=None,
    )
    finished = (after.iterations > before.iterations)[:, None]
    entries = jax.tree.map(
        lambda buffer, new: scatter_rows(buffer, iteration, new[:, None], finished),
        trace.replace(accepted=None, exact=None),
        entry,
    )
    accepted = jax.vmap(note)(trace.accepted, before, requests, outcome)
    return entries.replace(accepted=accepted, exact=trace.exact)
