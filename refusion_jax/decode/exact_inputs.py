"""The inputs of one pass of exact verification: the pending token, its drafts, and masks that ride along.

A pass has W + 1 possible outcomes k, the number of accepted drafts. For outcome k mask tokens stand at the
place of the bonus token and at the W places after it, and see the cache, the pending token and the first k
drafts. They draft what the next pass verifies. They do not see the bonus token, which is not known yet; that
costs a few acceptances and never changes the answer. The bonus token's own place gets a mask as well, because
training never showed a gap.

All outcomes would take W^2 masks, so a pass takes the likely ones: by P(k) = (1 - q_(k+1)) q_1 ... q_k with q
the confidences of the drafts, until Q tokens are fed. Where no masks rode along for the actual outcome, the
next pass feeds the pending token and masks alone, and still commits its bonus token.

The tokens fed lie in this order: the pending token, m drafts, masks that places are read off, groups of
masks. W is the padded draft length, Q the padded number of tokens fed, S the cache length.
"""

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.decode.batch import Requests, Shape
from refusion_jax.decode.scores import DraftSampling
from refusion_jax.decode.tokens_fed import TokensFed

Array = jax.Array

FEWEST_DRAFTS = 3  # that a row drafts, however few were accepted
LIKELY = 0.5  # probability from which masks for an outcome pay where each token fed costs time
FIRST_RATE = 20.0  # accepted drafts per pass, assumed of a row that has verified none


class ExactRow(struct.PyTreeNode):
    """The state of a row that is decoded exactly. Outside `vmap` every field has a leading batch axis.

    Attributes:
      count: int32, committed response tokens. All but the last are cached; the last is pending.
      drafted: int32, m, drafts that the next pass verifies.
      draft: int32 [W], the drafts of the places from `count` on.
      confidence: float32 [W], their probabilities when they were drafted.
      ends: bool, whether the last of the m drafts is an EOS.
      rate: float32, running mean of the number of accepted drafts per pass.
      done: bool, nothing left to decode.
      forwards, iterations: int32, passes made, and those of them that verified drafts.
    """

    count: Array
    drafted: Array
    draft: Array
    confidence: Array
    ends: Array
    rate: Array
    done: Array
    forwards: Array
    iterations: Array

    @classmethod
    def start(cls, request: Requests, drafts: int) -> "ExactRow":
        """The state before the first pass; rows that are not decoded exactly are done."""
        zero = jnp.int32(0)
        return cls(
            count=zero,
            drafted=zero,
            draft=jnp.zeros(drafts, jnp.int32),
            confidence=jnp.zeros(drafts),
            ends=jnp.zeros((), bool),
            rate=jnp.float32(FIRST_RATE),
            done=request.exact.gen_length == 0,
            forwards=zero,
            iterations=zero,
        )


class ExactLayout(struct.PyTreeNode):
    """Where the tokens of a pass lie among the Q that are fed.

    Attributes:
      reading: int32 [W + 1], the token off which the i-th place from `count` on is read; Q for i > m.
      start: int32 [W + 1], the first mask of the group of outcome k.
      taken: int32 [W + 1], masks of that group; 0 for none.
    """

    reading: Array
    start: Array
    taken: Array


def most_fed(shape: Shape, first: bool = False) -> int:
    """Q: the pending token, W drafts, the masks that places are read off, and the masks that ride along.

    Args:
      first: of the first pass, which has no drafts and whose one outcome takes W + 1 masks.
    """
    ahead = 0 if first else shape.masks_ahead
    needed = 1 + shape.drafts + shape.mask_readings + max(ahead, 1)
    return needed if needed <= 32 else -(-needed // 32) * 32


def exact_inputs(
    row: ExactRow, request: Requests, tokens: Array, filled: Array, mask_id: Array, size: int, shape: Shape
) -> tuple[TokensFed, ExactLayout]:
    """The inputs of a row's next pass.

    Args:
      row, request: without batch axis.
      tokens: int32 [S], the committed tokens by position.
      filled: bool [S], the cache entries.
      mask_id: int32 scalar.
      size: Q.
      shape: the padded sizes, for `frugal` and `ahead`.
    """
    layout = _layout(row, request, size, shape)
    m, q = row.drafted, jnp.arange(size)
    outcome = jnp.arange(row.draft.shape[0] + 1)
    chain = q <= m
    of_reading = (layout.reading == q[:, None]) & (outcome <= m)
    is_reading = of_reading.any(axis=1) & ~chain
    of_group = (q[:, None] >= layout.start) & (q[:, None] < layout.start + layout.taken)
    is_group = of_group.any(axis=1)
    k = jnp.argmax(jnp.where(is_reading[:, None], of_reading, of_group), axis=1)
    offset = jnp.where(is_group, q - layout.start[k], 0)
    active = (chain | is_reading | is_group) & ~row.done

    # The place that is read at a token: the next one at a token of the chain, its own at a mask.
    place = row.count + jnp.where(chain, q, k + offset)
    position = jnp.maximum(request.prompt_len + place - chain, 0)
    pending = tokens[jnp.maximum(request.prompt_len + row.count - 1, 0)]
    drafts = row.draft.at[q - 1].get(mode="fill", fill_value=0)
    token = jnp.where(chain, jnp.where(q == 0, pending, drafts), mask_id)

    # Without a pending token (an empty prompt) entry 0 is seen by itself only.
    first = jnp.where(request.prompt_len + row.count > 0, 0, 1)
    sees_chain = (q <= m) & (q >= first) & (q <= jnp.where(chain, q, k)[:, None])
    kind = jnp.where(chain, -1 - q, jnp.where(is_group, k, outcome.shape[0] + q))
    sees_own = (kind[:, None] == kind) & (q <= q[:, None])
    sees_entry = jnp.broadcast_to(filled, (size, filled.shape[0]))
    mask = jnp.concatenate([sees_entry, sees_chain | sees_own], axis=1) & active[:, None]
    mask &= jnp.concatenate([jnp.ones_like(filled), active])
    sampling = DraftSampling(
        temperature=jnp.broadcast_to(request.temperature, q.shape),
        seed=jnp.broadcast_to(request.seed, q.shape),
        iteration=place,  # the key of `--method=ar`
        place=jnp.zeros_like(place),
        rounded=jnp.zeros(q.shape, bool),
        removed=tuple(jnp.broadcast_to(token, q.shape) for token in request.removed),
    )
    return TokensFed(token, position, active, jnp.zeros_like(token), mask, sampling), layout


def _layout(row: ExactRow, request: Requests, size: int, shape: Shape) -> ExactLayout:
    m, asked = row.drafted, request.exact
    index = jnp.arange(row.draft.shape[0] + 1)
    from_mask = reads_mask(row.count + index, asked.from_mask, asked.border_every) & (index <= m)
    reading = jnp.where(from_mask, m + jnp.cumsum(from_mask), index)
    used = 1 + m + jnp.sum(from_mask)

    drafts, room = most_drafts(row, request, shape), size - used
    if asked.lookup is not None:
        drafts = jnp.where(asked.lookup, 0, drafts)  # lookup.py drafts
    # One place is left for the bonus token that follows the drafts.
    wanted = jnp.minimum(drafts, asked.gen_length - row.count - index - 2)
    probability = _outcomes(row, request, index)
    length = jnp.where((probability >= 0) & (wanted > 0), wanted + 1, 0)
    other = probability[:, None]
    likelier = (other > probability) | ((other == probability) & (index[:, None] < index))
    start = jnp.sum(jnp.where(likelier, length[:, None], 0), axis=0)
    if shape.frugal:
        room = jnp.minimum(room, jnp.where(probability >= LIKELY, room, shape.ahead - used))
    taken = jnp.clip(room - start, 0, length)
    taken = jnp.where(taken > 1, taken, 0)  # the first mask alone drafts nothing
    return ExactLayout(jnp.where(index <= m, reading, size), used + start, taken)


def most_drafts(row: ExactRow, request: Requests, shape: Shape) -> Array:
    """int32: the most drafts that the row's next pass verifies."""
    most = request.exact.draft_length
    if not shape.frugal or request.exact.replay is not None:
        return most
    # Tokens up to shape.ahead cost next to nothing: a third is for drafts, the rest for masks.
    justified = jnp.ceil(2 * row.rate).astype(jnp.int32)
    return jnp.minimum(most, jnp.maximum(max(FEWEST_DRAFTS, shape.ahead // 3), justified))


def _outcomes(row: ExactRow, request: Requests, index: Array) -> Array:
    """float32 [W + 1]: P(k), the probability that k drafts are accepted; -1 for impossible outcomes."""
    m = row.drafted
    confidence = jnp.append(row.confidence, 0.0)
    survives = jnp.cumprod(jnp.concatenate([jnp.ones(1), row.confidence]))
    probability = survives * jnp.where(index < m, 1 - confidence, 1.0)
    possible = index <= m - row.ends
    replay = request.exact.replay
    if replay is not None:
        actual = index == jnp.minimum(replay.accepted[row.forwards], m)
        probability = jnp.where(actual, 2.0, probability)
        possible &= ~actual | (replay.drafted[row.forwards + 1] > 0)
    return jnp.where(possible, probability, -1.0)


def reads_mask(place: Array, from_mask: Array, border_every: Array) -> Array:
    """bool: whether the AR reading of a place is off a mask token in it, fed after all tokens before it.

    Args:
      place: int32, places in the response.
      from_mask: bool, whether place 0 is read so.
      border_every: int32, later multiples of it are read so; 0 for none.
    """
    border = (border_every > 0) & (place % jnp.maximum(border_every, 1) == 0)
    return jnp.where(place == 0, from_mask, border)
