"""The rules of plan and infill for one row: what it feeds in each phase, and where the answer takes it.

Everything here is a pure function of one row, to be vmapped over a batch (`score`, which sees the batch,
excepted); where a rule is about one slot it is vmapped over the slots in turn. Written to the recordings
of the authors' code (arXiv 2512.13586, section 3.3); `fixed` and `release` semantics differ where a
comment says so.

M slots and T tokens are those of a block as padded.
"""

import functools
from enum import IntEnum

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.requests import Requests

Array = jax.Array


class Phase(IntEnum):
    PLAN = 0
    VERIFY = 1
    REFILL = 2
    RECHECK = 3
    DONE = 4


class Row(struct.PyTreeNode):
    """Where a row stands in its course; every field has a leading batch axis outside `vmap`.

    Attributes:
      phase: int32, what the next forward pass is for.
      block: int32, the block being decoded.
      pool: bool [M], slots of the block not yet decoded.
      chosen: bool [M], slots picked by the last plan.
      open: bool [M], chosen slots being infilled; those after a slot with EOS have left.
      confidence: float32 [M], of the last plan, -1 for slots not in the pool.
      draft: int32 [T], the block's tokens in play.
      accepted: int32 [M], how many leading tokens of each open slot are accepted.
      eos_found: bool, no further block will be decoded.
      forwards, iterations, rounds: int32, passes made, plans carried out, refills since the last plan.
    """

    phase: Array
    block: Array
    pool: Array
    chosen: Array
    open: Array
    confidence: Array
    draft: Array
    accepted: Array
    eos_found: Array
    forwards: Array
    iterations: Array
    rounds: Array


class Geometry(struct.PyTreeNode):
    """Where the T tokens of a row's current block lie: all int32 or bool [T]."""

    index: Array  # within the block
    inside: Array  # False for the padding of a block shorter than T
    slot: Array  # which slot of the block
    offset: Array  # within the slot
    position: Array  # in the text, prompt included


def geometry(row: Row, request: Requests) -> Geometry:
    index = jnp.arange(row.draft.shape[0])
    slot, offset = jnp.divmod(index, request.slot_size)
    position = request.prompt_len + row.block * request.block_len + index
    return Geometry(index, index < request.block_len, slot, offset, position)


class Query(struct.PyTreeNode):
    """The tokens a row feeds: tokens, positions int32 [T], active bool [T], mask bool [T, T]."""

    tokens: Array
    positions: Array
    active: Array
    mask: Array


def query(row: Row, request: Requests, mask_id: Array) -> Query:
    """What a row's phase asks the model."""
    at = geometry(row, request)
    fed_slots = jnp.stack([row.pool, row.chosen, row.open, row.open, jnp.zeros_like(row.pool)])[row.phase]
    active = at.inside & fed_slots[at.slot]
    accepted = at.offset < row.accepted[at.slot]
    masked = (row.phase == Phase.PLAN) | ((row.phase == Phase.REFILL) & ~accepted)
    alone = row.phase >= Phase.REFILL
    mask = active & (at.index <= at.index[:, None]) & (~alone | (at.slot == at.slot[:, None]))
    return Query(jnp.where(masked, mask_id, row.draft), at.position, active, mask)


class Scores(struct.PyTreeNode):
    """What a row reads off its logits, each [T].

    Attributes:
      draft: int32, the token a mask at this place stands for.
      confidence: float32, its probability at this place.
      confident: bool, that is above the slot threshold.
      passes: bool, the token fed at this place has a probability, read from the token before it, above
        the token threshold.
    """

    draft: Array
    confidence: Array
    confident: Array
    passes: Array


def score(logits: Array, tokens: Array, row: Row, requests: Requests) -> Scores:
    """Scores of a batch.

    `fixed` works in float32. `release` rounds probabilities and thresholds to the dtype of the logits,
    as the authors do (quirks 1 and 2 of the recordings).

    Args:
      logits: [B, T, V].
      tokens: int32 [B, T], as fed.
    """
    exact = logits.astype(jnp.float32)
    normaliser = jax.nn.logsumexp(exact, axis=-1)

    def round_in_release(x: Array) -> Array:
        release = requests.release.reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(release, x.astype(logits.dtype).astype(jnp.float32), x)

    def probability(of: Array) -> Array:
        chosen = jnp.take_along_axis(exact, of[..., None], axis=-1)[..., 0]
        return round_in_release(jnp.exp(chosen - normaliser))

    def above(p: Array, threshold: Array) -> Array:
        return p > round_in_release(threshold)[:, None]

    draft = _draft(exact, row, requests)
    confidence = probability(draft)
    of_next = probability(jnp.roll(tokens, -1, axis=1))
    passes = jnp.roll(above(of_next, requests.token_threshold), 1, axis=1)
    return Scores(draft, confidence, above(confidence, requests.slot_threshold), passes)


def _draft(logits: Array, row: Row, requests: Requests) -> Array:
    """int32 [B, T]: the argmax, or in the plan of a row with a temperature a Gumbel-max sample.

    The noise is keyed by (seed, iteration, place in the response): it depends on the request alone.
    """
    hot = (requests.temperature > 0) & (row.phase == Phase.PLAN)

    def noise_of_row(row: Row, request: Requests) -> Array:
        key = jax.random.fold_in(jax.random.key(request.seed), row.iterations)
        places = geometry(row, request).position - request.prompt_len
        noise = jax.vmap(lambda place: jax.random.gumbel(jax.random.fold_in(key, place), logits.shape[-1:]))
        return noise(places) * request.temperature

    def sample() -> Array:
        noise = jax.vmap(noise_of_row)(row, requests)
        return jnp.argmax(logits + jnp.where(hot[:, None, None], noise, 0), axis=-1)

    return jax.lax.cond(hot.any(), sample, lambda: jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def leading_runs(good: Array, at: Geometry, request: Requests, num_slots: int) -> Array:
    """int32 [M]: how many leading tokens of each slot are good, for good bool [T]."""

    def run_of_slot(m: Array) -> Array:
        return jnp.min(jnp.where((at.slot == m) & ~good, at.offset, request.slot_size))

    return jax.vmap(run_of_slot)(jnp.arange(num_slots))


# The phases. Each takes one row and returns it advanced, with the tokens to commit, bool [T].


def plan(row: Row, request: Requests, scores: Scores, eos_id: Array) -> tuple[Row, Array]:
    """Chooses the slots whose first token is drafted with confidence, or the most confident slot."""
    del eos_id
    slots = jnp.arange(row.pool.shape[0])
    first = jnp.minimum(slots * request.slot_size, scores.draft.shape[0] - 1)
    confidence = jnp.where(row.pool, scores.confidence[first], -1.0)
    confident = row.pool & scores.confident[first]
    best = slots == jnp.argmax(confidence)  # the earliest of equals
    chosen = jnp.where(confident.any(), confident, best)
    row = row.replace(
        phase=jnp.int32(Phase.VERIFY),
        chosen=chosen,
        confidence=confidence,
        draft=scores.draft,
        rounds=jnp.int32(0),
    )
    return row, jnp.zeros_like(scores.draft, bool)


def verify(row: Row, request: Requests, scores: Scores, eos_id: Array) -> tuple[Row, Array]:
    """Commits the chosen slots that the longest passing prefix of their drafts covers.

    If it covers none, every chosen slot is to be infilled on its own from its own passing prefix.
    """
    at = geometry(row, request)
    drafted = at.inside & row.chosen[at.slot]
    passes = (at.offset == 0) | scores.passes
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

    done = row.replace(pool=left, eos_found=row.eos_found | has_eos)
    infill = row.replace(
        phase=jnp.int32(Phase.REFILL),
        open=row.chosen,
        accepted=leading_runs(passes, at, request, slots.shape[0]),
    )
    iterate = ~has_eos & (num_whole == 0)
    return _select(iterate, infill, _next_plan(done, request)), committed & ~iterate


def refill(row: Row, request: Requests, scores: Scores, eos_id: Array) -> tuple[Row, Array]:
    """Drafts what is not yet accepted of every open slot; always greedy."""
    del eos_id
    at = geometry(row, request)
    missing = at.inside & row.open[at.slot] & (at.offset >= row.accepted[at.slot])
    row = row.replace(
        phase=jnp.int32(Phase.RECHECK),
        draft=jnp.where(missing, scores.draft, row.draft),
        rounds=row.rounds + 1,
    )
    return row, jnp.zeros_like(missing)


def recheck(row: Row, request: Requests, scores: Scores, eos_id: Array) -> tuple[Row, Array]:
    """Lets every open slot's accepted prefix grow by at least one token; commits when all are whole."""
    at = geometry(row, request)
    slots = jnp.arange(row.pool.shape[0])
    fed = at.inside & row.open[at.slot]
    forced = at.offset <= row.accepted[at.slot]
    accepted = leading_runs(forced | scores.passes, at, request, slots.shape[0])

    # The first slot with an accepted EOS counts as whole, and the slots after it leave.
    eos = fed & (at.offset < accepted[at.slot]) & (row.draft == eos_id)
    has_eos = eos.any()
    eos_slot = jnp.where(has_eos, at.slot[jnp.argmax(eos)], slots.shape[0])
    row = row.replace(
        phase=jnp.int32(Phase.REFILL),
        open=row.open & (slots <= eos_slot),
        accepted=jnp.where(slots == eos_slot, request.slot_size, accepted),
    )
    complete = jnp.all(~row.open | (row.accepted == request.slot_size))
    committed = at.inside & row.open[at.slot] & ~(has_eos & (at.index > jnp.argmax(eos)))

    # `release` mistakes the row number among the chosen slots for the index in the pool, and so loses
    # slots before the EOS that were never generated (quirk 8 of the recordings).
    eos_rank = jnp.sum(row.chosen & (slots < eos_slot))
    before_eos = jnp.where(request.release, jnp.cumsum(row.pool) <= eos_rank, slots < eos_slot)
    left = row.pool & ~row.chosen & (~has_eos | before_eos)
    done = row.replace(pool=left, eos_found=row.eos_found | has_eos)
    return _select(complete, _next_plan(done, request), row), committed & complete


def rest(row: Row, request: Requests, scores: Scores, eos_id: Array) -> tuple[Row, Array]:
    """A finished row stays as it is."""
    del request, eos_id
    return row, jnp.zeros_like(scores.draft, bool)


def carry_out(row: Row, request: Requests, scores: Scores, eos_id: Array) -> tuple[Row, Array]:
    """Carries one row through the phase its forward pass was for."""
    phases = [plan, verify, refill, recheck, rest]
    after, committed = jax.lax.switch(row.phase, phases, row, request, scores, eos_id)
    return after.replace(forwards=row.forwards + (row.phase != Phase.DONE)), committed


def _next_plan(row: Row, request: Requests) -> Row:
    """The row after a commit: on to the next plan, the next block, or the end."""
    block_done = ~row.pool.any()
    last = row.eos_found | (row.block + 1 >= request.num_blocks)
    enter = block_done & ~last
    return row.replace(
        phase=jnp.where(block_done & last, Phase.DONE, Phase.PLAN).astype(jnp.int32),
        block=row.block + enter,
        pool=jnp.where(enter, all_slots(request, row.pool.shape[0]), row.pool),
        iterations=row.iterations + 1,
    )


def all_slots(request: Requests, num_slots: int) -> Array:
    return jnp.arange(num_slots) * request.slot_size < request.block_len


def _select(condition: Array, if_true: Row, if_false: Row) -> Row:
    return jax.tree.map(functools.partial(jnp.where, condition), if_true, if_false)
