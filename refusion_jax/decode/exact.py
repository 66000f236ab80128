"""Exact verification: the answer is that of left-to-right decoding; drafts only save passes.

The paper accepts a draft when its AR probability is above a threshold, and the first token of a slot always.
Here a draft is accepted only if the model's AR reading, in the same pass, chooses the same token. Places
c = 0, 1, ... count response tokens; the AR reading of place c is the distribution at the token before it, or
at a mask token in that place where training never showed the token before (`reads_mask`).

A row's last committed token is *pending*: committed, but not cached. Before the first pass that is the last
prompt token. A pass feeds the pending token and m drafts, each seeing those before it. Let a_0 ... a_m be
their readings, and k the length of the longest prefix of drafts with d_i = a_(i-1). The pass commits
d_1 ... d_k and the bonus token a_k, and caches the pending token and d_1 ... d_k. So every pass commits at
least one token, and the cache is that of AR decoding. Mask tokens that ride along draft what follows, for the
likely outcomes k (exact_inputs.py). Rows that look drafts up in their own context feed no masks (lookup.py).

A sampled token of place c is argmax(log p_c / T + g_c), with g_c the Gumbel noise of (seed, c). Drafts use
the same noise, so the ids are those of AR sampling with the same seed, whatever was drafted.

W is the padded draft length, Q the number of tokens fed. Every function takes one row; the batch is a vmap.
"""

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.decode.batch import Requests, Shape
from refusion_jax.decode.exact_inputs import ExactLayout, ExactRow
from refusion_jax.decode.outputs import at_places
from refusion_jax.decode.scores import Scores

Array = jax.Array

MEMORY = 0.7  # share of the running mean of accepted drafts that a pass keeps


class ExactOutcome(struct.PyTreeNode):
    """The result of a pass for one row, besides its new ExactRow.

    Attributes:
      tokens: int32 [W + 1], the AR readings of the places from `start` on.
      positions: int32 [W + 1], their positions in the text.
      committed: bool [W + 1], the readings that are committed.
      keep: bool [Q], fed tokens whose keys and values are written to the cache.
      entry: the trace entry of the pass, without leading axes.
    """

    tokens: Array
    positions: Array
    committed: Array
    keep: Array
    entry: "ExactTrace"


class ExactTrace(struct.PyTreeNode):
    """The passes of exact decoding; arrays are [B, I], with I the number of passes there is room for.

    Attributes:
      start: int32, the place of the first token that the pass could commit.
      drafted: int32, m, drafts verified.
      accepted: int32, k, drafts accepted; fewer are committed if one of them is an EOS.
      committed: int32, tokens committed.
      ahead: bool, whether drafts for this outcome rode along.
    """

    start: Array
    drafted: Array
    accepted: Array
    committed: Array
    ahead: Array

    @classmethod
    def blank(cls, shape: Shape) -> "ExactTrace":
        """An empty trace with room for `shape.iterations` passes per row."""
        number = jnp.zeros((shape.rows, shape.iterations), jnp.int32)
        return cls(number, number, number, number, number.astype(bool))


@jax.named_scope("exact")
def verify(
    row: ExactRow, request: Requests, layout: ExactLayout, scores: Scores, eos_ids: Array
) -> tuple[ExactRow, ExactOutcome]:
    """The next state of a row, and the outcome, after a pass. A finished row stays as it is.

    Args:
      row, request: without batch axis.
      layout: of the tokens that the pass fed.
      scores: arrays [Q], of those tokens.
      eos_ids: int32 [E].
    """
    asked, index = request.exact, jnp.arange(row.draft.shape[0] + 1)
    readings = at_places(scores.draft, layout.reading)
    agrees = (row.draft == readings[:-1]) & (index[:-1] < row.drafted)
    accepted = jnp.sum(jnp.cumprod(agrees.astype(jnp.int32)))
    eos = request.is_eos(readings, eos_ids) & (index <= accepted)
    replay = asked.replay
    if replay is not None:
        accepted = jnp.minimum(replay.accepted[row.forwards], row.drafted)
        eos = (row.forwards + 1 >= replay.length) & (index == accepted)
    committed = jnp.where(eos.any(), jnp.argmax(eos) + 1, accepted + 1)
    committed = jnp.where(row.done, 0, committed)
    count = row.count + committed

    first, taken = layout.start[accepted], layout.taken[accepted]
    drafted = jnp.maximum(taken - 1, 0)
    if replay is not None:
        drafted = jnp.minimum(drafted, replay.drafted[row.forwards + 1])
    # The first mask of a group stands in the bonus token's place and is not used.
    fed_at = jnp.where(index[:-1] < drafted, first + 1 + index[:-1], scores.draft.shape[0])
    draft = at_places(scores.draft, fed_at)
    drafted, ends = through_eos(draft, drafted, request, eos_ids)
    verified = row.drafted > 0
    rate = jnp.where(verified, MEMORY * row.rate + (1 - MEMORY) * accepted, row.rate)
    done = row.done | eos.any() | (count >= asked.gen_length)
    after = ExactRow(
        count=count,
        drafted=jnp.where(done, 0, drafted),
        draft=draft,
        confidence=at_places(scores.confidence, fed_at),
        ends=ends,
        rate=jnp.where(row.done, row.rate, rate),
        done=done,
        forwards=row.forwards + ~row.done,
        iterations=row.iterations + (verified & ~row.done),
    )
    fed = jnp.arange(scores.draft.shape[0])
    has_pending = request.prompt_len + row.count > 0
    outcome = ExactOutcome(
        tokens=readings,
        positions=request.prompt_len + row.count + index,
        committed=index < committed,
        keep=(fed < committed) & ((fed > 0) | has_pending),
        entry=ExactTrace(row.count, row.drafted, accepted, committed, (drafted > 0) & ~done),
    )
    return after, outcome


def through_eos(draft: Array, drafted: Array, request: Requests, eos_ids: Array) -> tuple[Array, Array]:
    """(int32, bool): the number of drafts without those after an EOS, and whether the last is an EOS.

    A replay has no EOS: all `drafted` of its drafts [W] stay.
    """
    is_end = request.is_eos(draft, eos_ids) & (jnp.arange(draft.shape[0]) < drafted)
    ends = is_end.any() & (request.exact.replay is None)
    return jnp.where(ends, jnp.argmax(is_end) + 1, drafted), ends


def record(trace: ExactTrace, before: ExactRow, outcome: ExactOutcome) -> ExactTrace:
    """The trace [B, I] after a pass: rows [B] that were not done before it get an entry."""
    rows = jnp.arange(before.done.shape[0])
    place = jnp.where(before.done, trace.start.shape[1], before.forwards)

    def put(buffer: Array, new: Array) -> Array:
        return buffer.at[rows, place].set(new, mode="drop")

    return jax.tree.map(put, trace, outcome.entry)
