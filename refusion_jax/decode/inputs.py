"""The inputs of one forward pass of a row: the tokens that its phase needs, and speculative tokens.

A row's phase needs these tokens, as in the authors' code (arXiv 2512.13586, section 3.3):

  PLAN     the undecoded slots of the block (the pool), as mask tokens;
  VERIFY   the drafts of the chosen slots; each slot sees the chosen slots before it;
  INFILL   for every open slot, which sees the cache and itself only: its accepted tokens that are not cached
           yet, then the rest of the slot, either as drafts to verify or as mask tokens to refill.

At small batch sizes a pass is bound by reading the weights: feeding a hundred tokens takes about as long as
feeding one. So each pass also carries speculative mask tokens for the passes that may follow it:

  - the next plan, for the case that all chosen slots are accepted and for the cases that only the first few
    are; in the first case possibly the plan of the next block;
  - the refill of an infilled slot, for each number of further tokens that this pass may accept.

Speculative tokens see exactly what they would see in a pass of their own, and no needed token sees them. So
they never change the decoded tokens, and each right guess saves a pass.

A node is a candidate token: a group (the reason for feeding it) and an index in the block. A pass takes whole
groups while they fit, and packs the nodes of the taken groups to the front of Q entries. J is the number of
groups, T the padded block length, M the padded number of slots per block, S the cache length.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.decode.batch import Requests, Shape
from refusion_jax.decode.row_state import (
    Geometry,
    Phase,
    RowState,
    first_chosen,
    geometry,
    next_plan,
    own_entries,
)
from refusion_jax.decode.scores import DraftSampling
from refusion_jax.decode.tokens_fed import TokensFed
from refusion_jax.devices import ridge_tokens

Array = jax.Array

MOST_LENGTHS = 16  # accepted lengths with a speculative refill
MOST_PREFIXES = 8  # numbers of accepted slots, fewer than all, with a speculative plan
SMALLEST_PASS = 32  # tokens; a pass with fewer is not cheaper
ANY_SLOT = -1  # value of Nodes.slot for a node that may see every slot


def tokens_ahead(rows: int, device_kind: str | None = None) -> int:
    """The number of tokens up to which it pays to fill a row's pass with speculative tokens.

    The rows of a batch share the tokens that fit under the device's ridge, where computing takes as long as
    reading the weights. A device without a known ridge, such as a CPU, gets 64 tokens per row at any batch
    size.

    Args:
      rows: rows decoded together.
      device_kind: `jax.Device.device_kind`; None for that of the default device.

    Returns:
      a power of two, or 0 if the share of a row is too small for speculative tokens to pay.
    """
    ridge = ridge_tokens(device_kind or jax.devices()[0].device_kind)
    if ridge is None:
        return 2 * SMALLEST_PASS
    share = 2 ** round(math.log2(ridge / rows)) if rows < ridge else 0
    return share if share >= SMALLEST_PASS // 2 else 0


def filled_up(shape: Shape, ahead: int | None = None, device_kind: str | None = None) -> Shape:
    """The shape with the speculative tokens that pay for its number of rows.

    Args:
      shape: the padded sizes.
      ahead: as in Shape, also for exact verification; None chooses both by rows and device.
      device_kind: as in `tokens_ahead`.
    """
    if ahead is not None:
        return dataclasses.replace(shape, ahead=ahead, masks_ahead=ahead if shape.drafts_by_masks else 0)
    ahead = tokens_ahead(shape.rows, device_kind)
    shape = dataclasses.replace(shape, ahead=ahead)
    if not shape.drafts:
        return shape
    # Exact verification needs room for the masks of one outcome, also where no speculative token is free.
    # Where those of two do not fit under the ridge, rows draft what their acceptance justifies.
    chain = 1 + shape.drafts
    known = ridge_tokens(device_kind or jax.devices()[0].device_kind) is not None
    if not shape.drafts_by_masks:
        return dataclasses.replace(shape, frugal=not known or ahead < chain)
    return dataclasses.replace(
        shape, masks_ahead=max(ahead - chain, chain), frugal=not known or ahead < 3 * chain
    )


class Groups:
    """The numbering of the J groups, for blocks of M slots and T tokens.

    Attributes:
      refill: the first of the refill groups. Group refill + d holds the mask tokens of the open slots (in
        VERIFY: of the first chosen slot) for the case that d more of their tokens are accepted. Group
        refill + 0 also holds the refill that INFILL needs now.
      plan: the plan that is needed now, or the plan that follows if everything in this pass is accepted.
      prefix: the first of the prefix groups. Group prefix + c holds the plan that follows if the first c + 1
        chosen slots are accepted and the next one is not.
      count: J.
      lengths: the largest d.
      prefixes: the number of prefix groups.
    """

    JOINT = 0  # the drafts of VERIFY
    ALONE = 1  # the accepted and drafted tokens of INFILL

    def __init__(self, num_slots: int, block: int):
        lengths, prefixes = min(block - 1, MOST_LENGTHS), min(num_slots - 1, MOST_PREFIXES)
        self.refill = 2
        self.plan = self.refill + lengths + 1
        self.prefix = self.plan + 1
        self.count = self.prefix + prefixes
        self.lengths, self.prefixes = lengths, prefixes

    @classmethod
    def of(cls, row: RowState) -> "Groups":
        """The groups for the padded sizes of a row."""
        return cls(row.pool.shape[0], row.draft.shape[0])


class PassInputs(struct.PyTreeNode):
    """The tokens that a row feeds in one pass, packed to the front of Q entries.

    Attributes:
      tokens, positions: int32 [Q]; positions count from the start of the prompt.
      active: bool [Q], entries that hold a token.
      target: int32 [Q], the next token of the same slot, whose probability is read from this token's logits;
        0 for the last token of a slot.
      mask: bool [Q, S + Q], the cache entries and the fed tokens that each token sees.
      node_index: int32 [J, T], the entry of each node among the Q; Q for a node that is not fed.
      plan: bool [Q], nodes of a plan; their drafts are sampled at the request's temperature.
    """

    tokens: Array
    positions: Array
    active: Array
    target: Array
    mask: Array
    node_index: Array
    plan: Array

    def fed(self, row: RowState, request: Requests) -> TokensFed:
        """The tokens fed, with how their drafts are sampled: plans at the request's temperature, all others
        greedily."""
        # A speculative plan belongs to the next iteration.
        iteration = row.iterations + (row.phase != Phase.PLAN)
        sampling = DraftSampling(
            temperature=jnp.where(self.plan, request.temperature, 0.0),
            seed=jnp.broadcast_to(request.seed, self.tokens.shape),
            iteration=jnp.broadcast_to(iteration, self.tokens.shape),
            place=self.positions - request.prompt_len,
            rounded=jnp.broadcast_to(request.release, self.tokens.shape),
            removed=tuple(jnp.broadcast_to(token, self.tokens.shape) for token in request.removed),
        )
        return TokensFed(self.tokens, self.positions, self.active, self.target, self.mask, sampling)


class Nodes(struct.PyTreeNode):
    """All nodes of a row; arrays are [J, T] unless stated otherwise.

    Attributes:
      valid: bool, nodes that have a meaning in the row's phase.
      tokens, positions: int32.
      slot: int32, the only slot of the block that the node sees, or ANY_SLOT.
      upto: int32, the node sees needed tokens of the block at indices below this.
      likely: bool [J], groups worth making a pass larger for. The others only fill up its padding.
    """

    valid: Array
    tokens: Array
    positions: Array
    slot: Array
    upto: Array
    likely: Array


def most_fed(block: int, ahead: int) -> int:
    """Q, the most tokens that a row feeds in one pass, for blocks of T tokens and `ahead` as in Shape.

    Needed and likely groups take at most two blocks; the other groups only fill up padding.
    """
    return max(block, min(ahead, max(SMALLEST_PASS, 2 ** math.ceil(math.log2(2 * block)))))


def pass_inputs(row: RowState, request: Requests, filled: Array, mask_id: Array, ahead: int) -> PassInputs:
    """The inputs of a row's next pass; Q is `most_fed(T, ahead)`.

    Args:
      row, request: without batch axis.
      filled: bool [S], the cache entries that every token may see.
      mask_id: int32 scalar.
      ahead: as in Shape.
    """
    T = row.draft.shape[0]
    groups, size = Groups.of(row), most_fed(T, ahead)
    nodes = _nodes(row, request, groups, mask_id)
    taken = nodes.valid & _taken(row, request, nodes, groups, ahead)[:, None]
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
    slot, upto = pack(nodes.slot, ANY_SLOT), pack(nodes.upto)
    needed = group < groups.refill
    within = at.slot[index]
    sees_needed = needed & (index < upto[:, None]) & ((slot == ANY_SLOT)[:, None] | (slot[:, None] == within))
    sees_own_kind = ~needed & (group == group[:, None]) & (slot == slot[:, None]) & (index <= index[:, None])
    own, slot_of_entry = own_entries(row, request, filled.shape[0])
    sees_entry = filled | (own & ((slot == ANY_SLOT)[:, None] | (slot[:, None] == slot_of_entry)))
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
    whole_block, any_slot = jnp.int32(row.draft.shape[0]), jnp.int32(ANY_SLOT)
    in_open_slot = at.inside & row.open[at.slot] & infill
    offset, accepted, drafted = at.offset, row.accepted[at.slot], row.drafted[at.slot]
    joint = at.inside & row.chosen[at.slot] & verify
    alone = in_open_slot & (offset >= row.cached[at.slot]) & ((offset < accepted) | drafted)
    refill, upto = _refills(row, request, at, groups)
    plan, block, prefix = _plans(row, request, at, groups)
    one_left = infill & jnp.all(~row.open | (row.accepted >= request.slot_size - 1))
    counts = (1, 1, groups.lengths + 1, 1, groups.prefixes)

    def by_group(*parts: Array) -> Array:
        """[J, T] from one part for each of JOINT, ALONE, the refills, the plan and the prefix plans."""
        width = row.draft.shape[0]
        rows = [jnp.broadcast_to(part, (n, width)) for n, part in zip(counts, parts, strict=True)]
        return jnp.concatenate(rows)

    group = jnp.arange(groups.count)[:, None]
    return Nodes(
        valid=jnp.concatenate([joint[None], alone[None], refill, plan]),
        tokens=jnp.where(group < groups.refill, row.draft, mask_id),
        positions=at.position + jnp.where(group == groups.plan, (block - row.block) * request.block_len, 0),
        slot=by_group(any_slot, at.slot, at.slot, any_slot, any_slot),
        upto=by_group(at.index + 1, at.index + 1, upto, whole_block, prefix[:, None]),
        likely=jnp.where(group == groups.plan, verify | one_left, (group == groups.refill + 1) & infill)[
            :, 0
        ],
    )


def _refills(row: RowState, request: Requests, at: Geometry, groups: Groups) -> tuple[Array, Array]:
    """`valid` bool [D, T] and `upto` int32 [D, T] of the refill groups; row d: d more tokens are accepted."""
    infill = row.phase == Phase.INFILL
    first = first_chosen(row) & (row.phase == Phase.VERIFY)
    d = jnp.arange(groups.lengths + 1)[:, None]
    base = jnp.where(infill, row.accepted, 0)[at.slot]
    due = (infill & row.open & ~row.drafted)[at.slot]
    ahead = ((infill & row.open & row.drafted) | first)[at.slot]
    valid = at.inside & (at.offset >= base + d) & jnp.where(d == 0, due, ahead)
    return valid, at.slot * request.slot_size + base + d


def _plans(row: RowState, request: Requests, at: Geometry, groups: Groups) -> tuple[Array, Array, Array]:
    """Nodes of the plan and of the C prefix plans.

    Returns:
      `valid` bool [1 + C, T]; the block of the plan, int32; and for each prefix plan the index in the block
      at which the accepted slots end, int32 [C].
    """
    planning, verify = row.phase == Phase.PLAN, row.phase == Phase.VERIFY
    remaining = jnp.where(planning, row.pool, row.pool & ~row.chosen)
    block, pool, has_next = next_plan(row, request, remaining, row.eos_found)
    # An infill cannot end with this pass while a slot still has to be refilled.
    may_end = jnp.all(~row.open | row.drafted | (row.accepted == request.slot_size))
    if request.recompute is not None:
        may_end &= ~request.recompute | (jnp.sum(row.open) <= 1)
    valid = at.inside & pool[at.slot] & has_next & may_end & (row.phase != Phase.DONE)
    rank = jnp.cumsum(row.chosen)
    c = jnp.arange(1, groups.prefixes + 1)[:, None]
    accepted = row.chosen & (rank <= c)
    of_prefixes = (row.pool & ~accepted)[:, at.slot] & at.inside & verify & (c < rank[-1])
    last = jnp.max(jnp.where(accepted, jnp.arange(row.pool.shape[0]), 0), axis=1)
    return jnp.concatenate([valid[None], of_prefixes]), block, (last + 1) * request.slot_size


def _taken(row: RowState, request: Requests, nodes: Nodes, groups: Groups, ahead: int) -> Array:
    """bool [J], the groups that the pass feeds.

    All needed groups; then likely groups while they fit the row's budget; then other groups that fit into the
    padding of the pass.
    """
    counts = jnp.sum(nodes.valid, axis=1)
    group = jnp.arange(groups.count)
    needed = group <= groups.refill
    needed |= (group == groups.plan) & (row.phase == Phase.PLAN)
    if not ahead:
        return needed
    # Uses the request's own block length, not T: a request makes the same passes whatever it is padded to.
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
    """The size that a pass of one row is padded to: SMALLEST_PASS times a power of two."""
    sizes = SMALLEST_PASS * 2 ** jnp.arange(12)
    return sizes[jnp.argmax(sizes >= tokens)]
