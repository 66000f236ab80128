"""The rules of plan and infill for one row: where the answer to what it fed takes it.

Everything here is a pure function of one row, to be vmapped over a batch; where a rule is about one slot
it is vmapped over the slots in turn. Written to the recordings of the authors' code (arXiv 2512.13586,
section 3.3); `fixed` and `release` semantics differ where a comment says so.

A pass that also fed the masks of what comes next (inputs.py) carries that out at once. Slots that are
infilled go each at its own pace, which comes to the same as the authors' rounds: what a slot accepts
depends on it alone, and of the slots with an EOS the first counts, whichever is found first.

M slots and T tokens are those of a block as padded, Q the tokens fed.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.decode.batch import Requests
from refusion_jax.decode.inputs import Groups
from refusion_jax.decode.outputs import PassOutputs, at_places, slot_scores
from refusion_jax.decode.row_state import Geometry, Phase, RowState, first_chosen, geometry, next_plan

Array = jax.Array


class Outcome(struct.PyTreeNode):
    """What a pass came to.

    Attributes:
      committed: bool [T], tokens of the block to commit.
      keep: bool [Q], tokens fed whose keys and values are kept.
      accepted: int32 [M], how many tokens of each slot are now accepted.
      rounds: int32, refills that an infill took which is now whole.
    """

    committed: Array
    keep: Array
    accepted: Array
    rounds: Array


def leading_runs(good: Array, at: Geometry, request: Requests, num_slots: int) -> Array:
    """int32 [M]: how many leading tokens of each slot are good, for good bool [T]."""

    def run_of_slot(m: Array) -> Array:
        return jnp.min(jnp.where((at.slot == m) & ~good, at.offset, request.slot_size))

    return jax.vmap(run_of_slot)(jnp.arange(num_slots))


# The phases. Each takes one row and returns it advanced, with what comes of the pass.


@jax.named_scope("plan")
def plan(row: RowState, request: Requests, outputs: PassOutputs, eos_id: Array) -> tuple[RowState, Outcome]:
    """Chooses slots among those fed as masks."""
    del eos_id
    return _choose(row, request, outputs, outputs.node_index[Groups.of(row).plan]), _nothing(row, outputs)


@jax.named_scope("verify")
def verify(row: RowState, request: Requests, outputs: PassOutputs, eos_id: Array) -> tuple[RowState, Outcome]:
    """Commits the chosen slots that the longest passing prefix of their drafts covers.

    If it covers none, every chosen slot is to be infilled on its own from its own passing prefix. Drafts that
    are settled all pass.
    """
    at, groups = geometry(row, request), Groups.of(row)
    drafted = at.inside & row.chosen[at.slot]
    passes = (at.offset == 0) | outputs.passes
    if row.settled is not None:
        passes |= row.settled
    prefix = drafted & (jnp.cumsum(drafted & ~passes) == 0)

    eos = prefix & (row.draft == eos_id)
    has_eos = eos.any()
    at_eos = jnp.argmax(eos)  # its index in the block
    eos_slot = at.slot[at_eos]
    slots = jnp.arange(row.pool.shape[0])

    num_whole = jnp.sum(prefix) // request.slot_size
    whole = row.chosen & (jnp.cumsum(row.chosen) <= num_whole)
    committed = jnp.where(has_eos, drafted & (at.index <= at_eos), drafted & whole[at.slot])
    left = jnp.where(has_eos, row.pool & ~row.chosen & (slots < eos_slot), row.pool & ~whole)
    all_whole = num_whole == jnp.sum(row.chosen)
    group = jnp.where(all_whole, groups.plan, groups.prefix + num_whole - 1)
    guessed = ~has_eos & (all_whole | (num_whole <= groups.prefixes))
    done = _go_on(row, request, outputs, left, has_eos, jnp.where(guessed, group, -1))

    accepted = leading_runs(passes, at, request, slots.shape[0])
    first = first_chosen(row)
    cached = jnp.where(first, accepted, 0)
    infill = row.replace(phase=jnp.int32(Phase.INFILL), open=row.chosen, accepted=accepted, cached=cached)
    infill = _refilled(infill, request, outputs, jnp.where(first, accepted, 0))

    iterate = ~has_eos & (num_whole == 0)
    kept = jnp.where(iterate, drafted & (at.offset < cached[at.slot]), committed)
    outcome = Outcome(
        committed=committed & ~iterate,
        keep=_spread(kept, outputs.node_index[groups.JOINT], outputs),
        accepted=accepted,
        # None, unless these are the drafts of an infill.
        rounds=jnp.int32(0) if row.settled is None else jnp.max(row.rounds),
    )
    return _select(iterate, infill, done), outcome


@jax.named_scope("infill")
def infill(row: RowState, request: Requests, outputs: PassOutputs, eos_id: Array) -> tuple[RowState, Outcome]:
    """Lets the accepted prefix of every rechecked slot grow by at least one token; commits when all are
    whole, or has them verified as settled drafts where keys and values are to be recomputed."""
    at, groups = geometry(row, request), Groups.of(row)
    slots, size = jnp.arange(row.pool.shape[0]), request.slot_size
    mine = at.inside & row.open[at.slot]
    forced = at.offset <= row.accepted[at.slot]
    run = leading_runs(forced | outputs.passes, at, request, slots.shape[0])
    accepted = jnp.where(row.drafted & (row.accepted < size), run, row.accepted)

    # The first slot with an accepted EOS counts as whole, and the slots after it leave.
    eos = mine & (at.offset < accepted[at.slot]) & (row.draft == eos_id)
    has_eos = eos.any()
    at_eos = jnp.argmax(eos)
    eos_slot = jnp.where(has_eos, at.slot[at_eos], slots.shape[0])
    still = row.open & (slots <= eos_slot)
    complete = jnp.all(~still | (accepted == size) | (slots == eos_slot))
    committed = at.inside & still[at.slot] & ~(has_eos & (at.index > at_eos))

    # `release` mistakes the row number among the chosen slots for the index in the pool, and so loses
    # slots before the EOS that were never generated (quirk 8 of the recordings).
    eos_rank = jnp.sum(row.chosen & (slots < eos_slot))
    before_eos = jnp.where(request.release, jnp.cumsum(row.pool) <= eos_rank, slots < eos_slot)
    left = row.pool & ~row.chosen & (~has_eos | before_eos)
    done = _go_on(row, request, outputs, left, has_eos, jnp.where(has_eos, -1, groups.plan))

    whole = jnp.where(slots == eos_slot, size, accepted)
    going = row.replace(open=still, accepted=whole, cached=accepted)
    going = _refilled(going, request, outputs, jnp.where(row.drafted, accepted - row.accepted, 0))
    outcome = Outcome(
        committed=committed & complete,
        keep=_spread(mine & (at.offset < accepted[at.slot]), outputs.node_index[groups.ALONE], outputs),
        accepted=accepted,
        rounds=jnp.max(jnp.where(still, row.rounds, 0)),
    )
    if request.recompute is not None:
        # For one slot a joint pass would give what there is.
        again = complete & request.recompute & (jnp.sum(still) > 1)
        settled = row.replace(
            phase=jnp.int32(Phase.VERIFY),
            pool=left | row.chosen,
            open=jnp.zeros_like(still),
            drafted=jnp.zeros_like(still),
            rounds=jnp.where(still, row.rounds, 0),
            settled=jnp.ones((), bool),
        )
        done = _select(again, settled, done)
        outcome = outcome.replace(committed=outcome.committed & ~again)
    return _select(complete, done, going), outcome


def rest(row: RowState, request: Requests, outputs: PassOutputs, eos_id: Array) -> tuple[RowState, Outcome]:
    """A finished row stays as it is."""
    del request, eos_id
    return row, _nothing(row, outputs)


def carry_out(
    row: RowState, request: Requests, outputs: PassOutputs, eos_id: Array
) -> tuple[RowState, Outcome]:
    """Carries one row through the phase its forward pass was for."""
    after, outcome = jax.lax.switch(row.phase, [plan, verify, infill, rest], row, request, outputs, eos_id)
    return after.replace(forwards=row.forwards + (row.phase != Phase.DONE)), outcome


def _choose(row: RowState, request: Requests, outputs: PassOutputs, node_index: Array) -> RowState:
    """A row that reads its plan off the masks at `node_index` [T].

    The slots drafted with confidence are to be verified, or, where none is, the most confident one.
    """
    slots = jnp.arange(row.pool.shape[0])
    confidence, confident = slot_scores(row, request, outputs, node_index)
    if request.replay is not None:
        confident = row.pool & request.replay.planned[row.iterations]
    best = slots == jnp.argmax(confidence)  # the earliest of equals
    return row.replace(
        phase=jnp.int32(Phase.VERIFY),
        chosen=jnp.where(confident.any(), confident, best),
        confidence=confidence,
        draft=at_places(outputs.draft, node_index),
        rounds=jnp.zeros_like(row.rounds),
    )


def _go_on(
    row: RowState, request: Requests, outputs: PassOutputs, left: Array, eos: Array, group: Array
) -> RowState:
    """The row after a commit: on to the next plan, the next block, or the end.

    Args:
      left: bool [M], the block's slots yet to be decoded.
      eos: bool, whether one was committed.
      group: int32, where the next plan was fed ahead, if it was; -1 where that was for something else.
    """
    if request.replay is not None:
        ends = row.iterations + 1 >= request.replay.length
        left, eos = left & ~ends, eos | ends
    eos = row.eos_found | eos
    block, pool, more = next_plan(row, request, left, eos)
    none = jnp.zeros_like(row.open)
    row = row.replace(
        phase=jnp.where(more, Phase.PLAN, Phase.DONE).astype(jnp.int32),
        block=jnp.where(more, block, row.block),
        pool=pool,
        open=none,
        drafted=none,
        settled=jax.tree.map(jnp.zeros_like, row.settled),
        eos_found=eos,
        iterations=row.iterations + 1,
    )
    node_index = outputs.node_index[group]
    fed = (group >= 0) & jnp.any(node_index < outputs.draft.shape[0])
    return _select(more & fed, _choose(row, request, outputs, node_index), row)


def _refilled(row: RowState, request: Requests, outputs: PassOutputs, more: Array) -> RowState:
    """A row being infilled, with new drafts in the slots whose refill was fed.

    Args:
      more: int32 [M], how many more tokens of each slot were accepted by the pass that fed it.
    """
    at, groups = geometry(row, request), Groups.of(row)
    more = jnp.where(more <= groups.lengths, more, -1)[at.slot]
    node_index = jnp.where(
        more >= 0, outputs.node_index[groups.refill + more, at.index], outputs.draft.shape[0]
    )
    fed = at.inside & (node_index < outputs.draft.shape[0]) & (at.offset >= row.accepted[at.slot])
    slots = jnp.arange(row.open.shape[0])
    drafted = row.open & jax.vmap(lambda m: jnp.any(fed & (at.slot == m)))(slots)
    return row.replace(
        draft=jnp.where(fed, at_places(outputs.draft, node_index), row.draft),
        drafted=drafted,
        rounds=row.rounds + drafted,
    )


def _spread(kept: Array, node_index: Array, outputs: PassOutputs) -> Array:
    """bool [Q] from bool [T]."""
    return jnp.zeros(outputs.draft.shape, bool).at[node_index].set(kept, mode="drop")


def _nothing(row: RowState, outputs: PassOutputs) -> Outcome:
    none = jnp.zeros(outputs.draft.shape, bool)
    return Outcome(jnp.zeros(row.draft.shape, bool), none, jnp.zeros_like(row.accepted), jnp.int32(0))


def _select(condition: Array, if_true: RowState, if_false: RowState) -> RowState:
    return jax.tree.map(functools.partial(jnp.where, condition), if_true, if_false)
