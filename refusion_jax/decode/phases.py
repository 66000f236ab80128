"""The state transition of one row after a forward pass: the rules of plan, verify and infill.

Every function here is pure and takes one row; the batch is a vmap. A rule about one slot is vmapped over the
slots. The rules follow the recordings of the authors' code (arXiv 2512.13586, section 3.3); comments mark
where `fixed` and `release` semantics differ.

If a pass also fed the right speculative tokens (inputs.py), the next phase is executed at once. Infilled
slots advance independently. The result equals that of the authors' rounds: the tokens that a slot accepts
depend on that slot only, and among the slots with an EOS the first in the text counts, whichever is found
first.

M is the padded number of slots per block, T the padded block length, Q the number of tokens fed.
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
    """The result of a pass for one row, besides its new RowState.

    Attributes:
      committed: bool [T], tokens of the block to commit.
      keep: bool [Q], fed tokens whose keys and values are written to the cache.
      accepted: int32 [M], the number of leading tokens of each slot that are now accepted.
      rounds: int32, the refills that the infill took; only read when it is complete.
    """

    committed: Array
    keep: Array
    accepted: Array
    rounds: Array


def leading_runs(good: Array, at: Geometry, request: Requests, num_slots: int) -> Array:
    """int32 [M]: the number of leading tokens of each slot for which `good` bool [T] is set."""

    def run_of_slot(m: Array) -> Array:
        return jnp.min(jnp.where((at.slot == m) & ~good, at.offset, request.slot_size))

    return jax.vmap(run_of_slot)(jnp.arange(num_slots))


# The phases. Each takes one row and returns its next state and the Outcome of the pass.


@jax.named_scope("plan")
def plan(row: RowState, request: Requests, outputs: PassOutputs, eos_ids: Array) -> tuple[RowState, Outcome]:
    """Chooses slots among those fed as mask tokens. Nothing is committed or cached."""
    del eos_ids
    return _choose(row, request, outputs, outputs.node_index[Groups.of(row).plan]), _no_outcome(row, outputs)


@jax.named_scope("verify")
def verify(
    row: RowState, request: Requests, outputs: PassOutputs, eos_ids: Array
) -> tuple[RowState, Outcome]:
    """Commits the chosen slots that are covered by the longest passing prefix of their concatenated drafts.

    If the prefix covers no whole slot, the row goes to INFILL: every chosen slot is then infilled on its own,
    from its own passing prefix. If an EOS is in the prefix, the tokens up to the first EOS are committed
    instead. Settled drafts (see RowState) all pass.
    """
    at, groups = geometry(row, request), Groups.of(row)
    drafted = at.inside & row.chosen[at.slot]
    passes = (at.offset == 0) | outputs.passes
    if row.settled is not None:
        passes |= row.settled
    prefix = drafted & (jnp.cumsum(drafted & ~passes) == 0)

    eos = prefix & request.is_eos(row.draft, eos_ids)
    has_eos = eos.any()
    at_eos = jnp.argmax(eos)  # index of the first EOS in the block
    eos_slot = at.slot[at_eos]
    slots = jnp.arange(row.pool.shape[0])

    num_whole = jnp.sum(prefix) // request.slot_size
    whole = row.chosen & (jnp.cumsum(row.chosen) <= num_whole)
    committed = jnp.where(has_eos, drafted & (at.index <= at_eos), drafted & whole[at.slot])
    remaining = jnp.where(has_eos, row.pool & ~row.chosen & (slots < eos_slot), row.pool & ~whole)
    all_whole = num_whole == jnp.sum(row.chosen)
    group = jnp.where(all_whole, groups.plan, groups.prefix + num_whole - 1)
    predicted = ~has_eos & (all_whole | (num_whole <= groups.prefixes))
    done = _after_commit(row, request, outputs, remaining, has_eos, jnp.where(predicted, group, -1))

    accepted = leading_runs(passes, at, request, slots.shape[0])
    first = first_chosen(row)
    cached = jnp.where(first, accepted, 0)
    infill = row.replace(phase=jnp.int32(Phase.INFILL), open=row.chosen, accepted=accepted, cached=cached)
    infill = _refilled(infill, request, outputs, jnp.where(first, accepted, 0))

    iterate = ~has_eos & (num_whole == 0)
    kept = jnp.where(iterate, drafted & (at.offset < cached[at.slot]), committed)
    outcome = Outcome(
        committed=committed & ~iterate,
        keep=_by_fed_token(kept, outputs.node_index[groups.JOINT], outputs),
        accepted=accepted,
        # 0, unless these are the settled drafts of an infill.
        rounds=jnp.int32(0) if row.settled is None else jnp.max(row.rounds),
    )
    return _select(iterate, infill, done), outcome


@jax.named_scope("infill")
def infill(
    row: RowState, request: Requests, outputs: PassOutputs, eos_ids: Array
) -> tuple[RowState, Outcome]:
    """Extends the accepted prefix of every slot whose drafts were fed, by at least one token.

    When all slots are complete, commits them. Where their keys and values are to be recomputed, the row goes
    to VERIFY instead, with their tokens as settled drafts.
    """
    at, groups = geometry(row, request), Groups.of(row)
    slots, size = jnp.arange(row.pool.shape[0]), request.slot_size
    in_open_slot = at.inside & row.open[at.slot]
    forced = at.offset <= row.accepted[at.slot]
    run = leading_runs(forced | outputs.passes, at, request, slots.shape[0])
    accepted = jnp.where(row.drafted & (row.accepted < size), run, row.accepted)

    # The first slot with an accepted EOS counts as complete, and the slots after it are dropped.
    eos = in_open_slot & (at.offset < accepted[at.slot]) & request.is_eos(row.draft, eos_ids)
    has_eos = eos.any()
    at_eos = jnp.argmax(eos)
    eos_slot = jnp.where(has_eos, at.slot[at_eos], slots.shape[0])
    still_open = row.open & (slots <= eos_slot)
    complete = jnp.all(~still_open | (accepted == size) | (slots == eos_slot))
    committed = at.inside & still_open[at.slot] & ~(has_eos & (at.index > at_eos))

    # `release` uses the row number among the chosen slots as an index into the pool, and so drops slots
    # before the EOS that were never generated (quirk 8 of the recordings).
    eos_rank = jnp.sum(row.chosen & (slots < eos_slot))
    before_eos = jnp.where(request.release, jnp.cumsum(row.pool) <= eos_rank, slots < eos_slot)
    remaining = row.pool & ~row.chosen & (~has_eos | before_eos)
    done = _after_commit(row, request, outputs, remaining, has_eos, jnp.where(has_eos, -1, groups.plan))

    whole = jnp.where(slots == eos_slot, size, accepted)
    unfinished = row.replace(open=still_open, accepted=whole, cached=accepted)
    unfinished = _refilled(unfinished, request, outputs, jnp.where(row.drafted, accepted - row.accepted, 0))
    outcome = Outcome(
        committed=committed & complete,
        keep=_by_fed_token(
            in_open_slot & (at.offset < accepted[at.slot]), outputs.node_index[groups.ALONE], outputs
        ),
        accepted=accepted,
        rounds=jnp.max(jnp.where(still_open, row.rounds, 0)),
    )
    if request.recompute is not None:
        # For a single slot a joint pass would give the keys and values that are cached already.
        recompute = complete & request.recompute & (jnp.sum(still_open) > 1)
        settled = row.replace(
            phase=jnp.int32(Phase.VERIFY),
            pool=remaining | row.chosen,
            open=jnp.zeros_like(still_open),
            drafted=jnp.zeros_like(still_open),
            rounds=jnp.where(still_open, row.rounds, 0),
            settled=jnp.ones((), bool),
        )
        done = _select(recompute, settled, done)
        outcome = outcome.replace(committed=outcome.committed & ~recompute)
    return _select(complete, done, unfinished), outcome


def rest(row: RowState, request: Requests, outputs: PassOutputs, eos_ids: Array) -> tuple[RowState, Outcome]:
    """Leaves a finished row unchanged."""
    del request, eos_ids
    return row, _no_outcome(row, outputs)


def carry_out(
    row: RowState, request: Requests, outputs: PassOutputs, eos_ids: Array
) -> tuple[RowState, Outcome]:
    """The next state of a row, and the Outcome, after the forward pass of its phase."""
    after, outcome = jax.lax.switch(row.phase, [plan, verify, infill, rest], row, request, outputs, eos_ids)
    return after.replace(forwards=row.forwards + (row.phase != Phase.DONE)), outcome


def _choose(row: RowState, request: Requests, outputs: PassOutputs, node_index: Array) -> RowState:
    """The row after a plan whose mask tokens were fed at `node_index` [T]: its next phase is VERIFY.

    Chooses the slots whose score is above the slot threshold, or the best slot if there are none.
    """
    slots = jnp.arange(row.pool.shape[0])
    confidence, confident = slot_scores(row, request, outputs, node_index)
    if request.replay is not None:
        confident = row.pool & request.replay.planned[row.iterations]
    best = slots == jnp.argmax(confidence)  # the earliest of equally good slots
    return row.replace(
        phase=jnp.int32(Phase.VERIFY),
        chosen=jnp.where(confident.any(), confident, best),
        confidence=confidence,
        draft=at_places(outputs.draft, node_index),
        rounds=jnp.zeros_like(row.rounds),
    )


def _after_commit(
    row: RowState, request: Requests, outputs: PassOutputs, remaining: Array, eos: Array, group: Array
) -> RowState:
    """The row after a commit: at the next plan, possibly of the next block, or done.

    If the mask tokens of that plan were fed speculatively, the plan is executed at once.

    Args:
      remaining: bool [M], slots of the block that are not decoded yet.
      eos: bool, whether an EOS was committed.
      group: int32, the group in which this plan would have been fed speculatively; -1 if no group matches
        the outcome of the pass.
    """
    if request.replay is not None:
        ends = row.iterations + 1 >= request.replay.length
        remaining, eos = remaining & ~ends, eos | ends
    eos = row.eos_found | eos
    block, pool, has_next = next_plan(row, request, remaining, eos)
    none = jnp.zeros_like(row.open)
    row = row.replace(
        phase=jnp.where(has_next, Phase.PLAN, Phase.DONE).astype(jnp.int32),
        block=jnp.where(has_next, block, row.block),
        pool=pool,
        open=none,
        drafted=none,
        settled=jax.tree.map(jnp.zeros_like, row.settled),
        eos_found=eos,
        iterations=row.iterations + 1,
    )
    node_index = outputs.node_index[group]
    fed = (group >= 0) & jnp.any(node_index < outputs.draft.shape[0])
    return _select(has_next & fed, _choose(row, request, outputs, node_index), row)


def _refilled(row: RowState, request: Requests, outputs: PassOutputs, gained: Array) -> RowState:
    """A row in INFILL, with new drafts in the slots whose refill was part of the pass.

    Args:
      gained: int32 [M], the number of tokens of each slot that this pass accepted.
    """
    at, groups = geometry(row, request), Groups.of(row)
    gained = jnp.where(gained <= groups.lengths, gained, -1)[at.slot]
    node_index = jnp.where(
        gained >= 0, outputs.node_index[groups.refill + gained, at.index], outputs.draft.shape[0]
    )
    fed = at.inside & (node_index < outputs.draft.shape[0]) & (at.offset >= row.accepted[at.slot])
    slots = jnp.arange(row.open.shape[0])
    drafted = row.open & jax.vmap(lambda m: jnp.any(fed & (at.slot == m)))(slots)
    return row.replace(
        draft=jnp.where(fed, at_places(outputs.draft, node_index), row.draft),
        drafted=drafted,
        rounds=row.rounds + drafted,
    )


def _by_fed_token(flags: Array, node_index: Array, outputs: PassOutputs) -> Array:
    """`flags` bool [T], one per token of the block, as bool [Q] over the fed tokens at `node_index` [T]."""
    return jnp.zeros(outputs.draft.shape, bool).at[node_index].set(flags, mode="drop")


def _no_outcome(row: RowState, outputs: PassOutputs) -> Outcome:
    none = jnp.zeros(outputs.draft.shape, bool)
    return Outcome(jnp.zeros(row.draft.shape, bool), none, jnp.zeros_like(row.accepted), jnp.int32(0))


def _select(condition: Array, if_true: RowState, if_false: RowState) -> RowState:
    return jax.tree.map(functools.partial(jnp.where, condition), if_true, if_false)
