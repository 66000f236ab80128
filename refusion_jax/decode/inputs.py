"""What a row feeds in one forward pass: what its phase needs, and predictions ahead of need.

Needed are, as in the authors' code (arXiv 2512.13586, section 3.3),

  PLAN     the pool's slots as masks;
  VERIFY   the chosen slots' drafts, each slot seeing those before it;
  INFILL   of every open slot, which sees itself alone: the accepted tokens that are not cached, and the
           rest as drafts to be rechecked, or as masks to be refilled.

A pass costs the reading of the weights, whether it feeds one token or a hundred, so the masks of the
passes to come ride along, for what this pass may turn out to accept:

  - the next plan, if all chosen slots are accepted, or only the first few of them; also that of the next
    block;
  - the refill of an infilled slot, if it turns out that so many more of its tokens are accepted.

They see exactly what they would see in a pass of their own, and nothing needed sees them, so tokens are
the same, and a pass is saved where the guess was right.

Every token that could ride along is a node: a group (why it is fed) and a place in the block. Groups are
taken whole while they fit; nodes of the groups taken are packed into Q places. J is the number of groups.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.decode.batch import Requests
from refusion_jax.decode.row_state import (
    Geometry,
    Phase,
    RowState,
    first_chosen,
    geometry,
    next_plan,
    own_entries,
)
from refusion_jax.devices import ridge_tokens

Array = jax.Array

MOST_LENGTHS = 16  # accepted lengths whose refill may ride along
MOST_PREFIXES = 8  # numbers of accepted slots, short of all, whose plan may ride along
SMALLEST_PASS = 32  # tokens; fewer are not cheaper
ANY = -1  # slot: of no slot in particular


def tokens_ahead(rows: int, device_kind: str | None = None) -> int:
    """Up to how many tokens it pays to fill a pass of each row with predictions ahead of need.

    The rows of a batch share the tokens that cost next to nothing beside reading the weights. On devices
    that devices.py does not list, CPUs for instance, a small share whatever the batch.

    Args:
      rows: decoded together.
      device_kind: of jax.Device; None is the default device's.

    Returns:
      a power of two, or 0 where none would be left over.
    """
    ridge = ridge_tokens(device_kind or jax.devices()[0].device_kind)
    if ridge is None:
        return 2 * SMALLEST_PASS
    share = 2 ** round(math.log2(ridge / rows)) if rows < ridge else 0
    return share if share >= SMALLEST_PASS // 2 else 0


class Groups:
    """Which group is which, for blocks of M slots and T tokens."""

    JOINT = 0  # drafts to verify
    ALONE = 1  # tokens of slots being infilled

    def __init__(self, num_slots: int, block: int):
        lengths, prefixes = min(block - 1, MOST_LENGTHS), min(num_slots - 1, MOST_PREFIXES)
        self.refill = 2  # refill + d: masks of open slots, d more of their tokens being accepted
        self.plan = self.refill + lengths + 1  # the plan that follows if all goes well, or is due
        self.prefix = self.plan + 1  # prefix + c: the plan that follows if c + 1 of the chosen are accepted
        self.count = self.prefix + prefixes
        self.lengths, self.prefixes = lengths, prefixes

    @classmethod
    def of(cls, row: RowState) -> "Groups":
        """Those of a row's block."""
        return cls(row.pool.shape[0], row.draft.shape[0])


class PassInputs(struct.PyTreeNode):
    """The tokens a row feeds, packed to the front of Q places.

    Attributes:
      tokens, positions: int32 [Q].
      active: bool [Q].
      target: int32 [Q], the token whose probability the logits are asked for: the next of the same slot.
      mask: bool [Q, S + Q], which entries of the cache and which of the Q each sees.
      node_index: int32 [J, T], where each node is among the Q; Q where it is not fed.
      plan: bool [Q], nodes of a plan, which are sampled where there is a temperature.
    """

    tokens: Array
    positions: Array
    active: Array
    target: Array
    mask: Array
    node_index: Array
    plan: Array


class Nodes(struct.PyTreeNode):
    """All nodes, [J, T] where not said otherwise.

    Attributes:
      there: bool, which make sense in the row's phase.
      tokens, positions: int32.
      slot: int32, the slot whose tokens alone it sees, or ANY.
      upto: int32, the end of the part of the block of which it sees the needed tokens.
      likely: bool [J], groups worth a larger pass; others ride only where a pass has room.
    """

    there: Array
    tokens: Array
    positions: Array
    slot: Array
    upto: Array
    likely: Array


def most_fed(block: int, ahead: int) -> int:
    """Q, the most tokens that a row feeds in one pass, for blocks of T tokens and `ahead` as in Shape.

    What is needed and what is likely take no more than two blocks, and the rest only fills a pass up.
    """
    return max(block, min(ahead, max(SMALLEST_PASS, 2 ** math.ceil(math.log2(2 * block)))))


def pass_inputs(row: RowState, request: Requests, filled: Array, mask_id: Array, ahead: int) -> PassInputs:
    """What a row feeds, in the Q places of `most_fed`.

    Args:
      filled: bool [S], the cache's entries that all may see.
      mask_id: int32.
      ahead: tokens up to which a pass of the row may be filled with predictions ahead of need; 0 for none.
    """
    T = row.draft.shape[0]
    groups, size = Groups.of(row), most_fed(T, ahead)
    nodes = _nodes(row, request, groups, mask_id)
    taken = nodes.there & _taken(row, request, nodes, groups, ahead)[:, None]
    flat = taken.reshape(-1)
    node_index = jnp.where(flat, jnp.cumsum(flat) - 1, size)
    source = jnp.zeros(size, jnp.int32).at[node_index].set(jnp.arange(flat.size), mode="drop")
    active = jnp.arange(size) < jnp.sum(flat)

    def pack(x: Array, empty: int = 0) -> Array:
        return jnp.where(active, jnp.broadcast_to(x, taken.shape).reshape(-1)[source], empty)

    at = geometry(row, request)
    same_slot = (at.slot == jnp.roll(at.slot, -1)) & (at.index < T - 1)
    target = jnp.where(same_slot, jnp.roll(row.draft, -1), 0)
    group, index = pack(jnp.arange(groups.count)[:, None]), pack(at.index)
    slot, upto = pack(nodes.slot, ANY), pack(nodes.upto)
    needed = group < groups.refill
    within = at.slot[index]
    sees_needed = needed & (index < upto[:, None]) & ((slot == ANY)[:, None] | (slot[:, None] == within))
    sees_own_kind = ~needed & (group == group[:, None]) & (slot == slot[:, None]) & (index <= index[:, None])
    own, slot_of_entry = own_entries(row, request, filled.shape[0])
    sees_entry = filled | (own & ((slot == ANY)[:, None] | (slot[:, None] == slot_of_entry)))
    mask = jnp.concatenate([sees_entry, active & (sees_needed | sees_own_kind)], axis=1)
    return PassInputs(
        tokens=pack(nodes.tokens),
        positions=pack(nodes.positions),
        active=active,
        target=pack(target),
        mask=mask & active[:, None],
        node_index=node_index.reshape(groups.count, T),
        plan=active & (group >= groups.plan),
    )


def _nodes(row: RowState, request: Requests, groups: Groups, mask_id: Array) -> Nodes:
    at = geometry(row, request)
    verify, infill = row.phase == Phase.VERIFY, row.phase == Phase.INFILL
    everything, anyone = jnp.int32(row.draft.shape[0]), jnp.int32(ANY)
    mine = at.inside & row.open[at.slot] & infill
    offset, accepted, drafted = at.offset, row.accepted[at.slot], row.drafted[at.slot]
    joint = at.inside & row.chosen[at.slot] & verify
    alone = mine & (offset >= row.cached[at.slot]) & ((offset < accepted) | drafted)
    refill, upto = _refills(row, request, at, groups)
    plan, block, prefix = _plans(row, request, at, groups)
    one_left = infill & jnp.all(~row.open | (row.accepted >= request.slot_size - 1))
    counts = (1, 1, groups.lengths + 1, 1, groups.prefixes)

    def by_group(*parts: Array) -> Array:
        """An entry for JOINT, ALONE, the refills, the plan and the plans of a prefix."""
        width = row.draft.shape[0]
        rows = [jnp.broadcast_to(part, (n, width)) for n, part in zip(counts, parts, strict=True)]
        return jnp.concatenate(rows)

    number = jnp.arange(groups.count)[:, None]
    return Nodes(
        there=jnp.concatenate([joint[None], alone[None], refill, plan]),
        tokens=jnp.where(number < groups.refill, row.draft, mask_id),
        positions=at.position + jnp.where(number == groups.plan, (block - row.block) * request.block_len, 0),
        slot=by_group(anyone, at.slot, at.slot, anyone, anyone),
        upto=by_group(at.index + 1, at.index + 1, upto, everything, prefix[:, None]),
        likely=jnp.where(number == groups.plan, verify | one_left, (number == groups.refill + 1) & infill)[
            :, 0
        ],
    )


def _refills(row: RowState, request: Requests, at: Geometry, groups: Groups) -> tuple[Array, Array]:
    """Nodes there, bool [D, T], and what they see of the tokens needed, int32 [D, T]: d more accepted."""
    infill = row.phase == Phase.INFILL
    first = first_chosen(row) & (row.phase == Phase.VERIFY)
    d = jnp.arange(groups.lengths + 1)[:, None]
    base = jnp.where(infill, row.accepted, 0)[at.slot]
    due = (infill & row.open & ~row.drafted)[at.slot]
    ahead = ((infill & row.open & row.drafted) | first)[at.slot]
    there = at.inside & (at.offset >= base + d) & jnp.where(d == 0, due, ahead)
    return there, at.slot * request.slot_size + base + d


def _plans(row: RowState, request: Requests, at: Geometry, groups: Groups) -> tuple[Array, Array, Array]:
    """Nodes there, bool [1 + C, T], the block of the first plan, and the end of the c accepted slots, [C]."""
    planning, verify = row.phase == Phase.PLAN, row.phase == Phase.VERIFY
    left = jnp.where(planning, row.pool, row.pool & ~row.chosen)
    block, pool, more = next_plan(row, request, left, row.eos_found)
    # An infill with a slot yet to be refilled does not end with this pass.
    may_end = jnp.all(~row.open | row.drafted | (row.accepted == request.slot_size))
    if request.recompute is not None:
        may_end &= ~request.recompute | (jnp.sum(row.open) <= 1)
    there = at.inside & pool[at.slot] & more & may_end & (row.phase != Phase.DONE)
    rank = jnp.cumsum(row.chosen)
    c = jnp.arange(1, groups.prefixes + 1)[:, None]
    accepted = row.chosen & (rank <= c)
    some = (row.pool & ~accepted)[:, at.slot] & at.inside & verify & (c < rank[-1])
    last = jnp.max(jnp.where(accepted, jnp.arange(row.pool.shape[0]), 0), axis=1)
    return jnp.concatenate([there[None], some]), block, (last + 1) * request.slot_size


def _taken(row: RowState, request: Requests, nodes: Nodes, groups: Groups, ahead: int) -> Array:
    """bool [J]: needed groups, then likely ones while they fit the row's budget, then others that fit what
    the pass is padded to anyway."""
    counts = jnp.sum(nodes.there, axis=1)
    number = jnp.arange(groups.count)
    needed = number <= groups.refill
    needed |= (number == groups.plan) & (row.phase == Phase.PLAN)
    if not ahead:
        return needed
    # Not by T: the same request makes the same passes whatever it is padded to.
    budget = jnp.maximum(request.block_len, ahead)
    used = jnp.sum(jnp.where(needed, counts, 0))
    taken = [needed[g] for g in range(groups.count)]
    for likely in (True, False):
        limit = budget if likely else jnp.minimum(budget, _pass_size(used))
        for g in range(groups.refill + 1, groups.count):
            fits = ~taken[g] & (nodes.likely[g] == likely) & (used + counts[g] <= limit)
            used += jnp.where(fits, counts[g], 0)
            taken[g] |= fits
    return jnp.stack(taken)


def _pass_size(tokens: Array) -> Array:
    """The next power of two: what a pass of one row is padded to."""
    sizes = SMALLEST_PASS * 2 ** jnp.arange(12)
    return sizes[jnp.argmax(sizes >= tokens)]
