"""What a row reads off its pass: drafts, what is accepted of them, and the scores by which slots are chosen.

M slots and T tokens are those of a block as padded, Q the tokens fed, J the groups of inputs.py.
"""

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.decode.batch import Requests
from refusion_jax.decode.config import FIRST, MEAN
from refusion_jax.decode.inputs import Groups, PassInputs
from refusion_jax.decode.row_state import Phase, RowState, geometry
from refusion_jax.decode.scores import Scores

Array = jax.Array


class PassOutputs(struct.PyTreeNode):
    """What a row reads off its pass.

    Attributes:
      draft: int32 [Q], the token that each token fed stands for or is followed by.
      confidence: float32 [Q], its probability.
      confident: bool [Q], that is above the slot threshold.
      passes: bool [T], the block's token at this place has a probability, after the token before it, above
        the token threshold.
      entropy: float32 [Q], or None, as in Scores.
      node_index: int32 [J, T], as in PassInputs.
    """

    draft: Array
    confidence: Array
    confident: Array
    passes: Array
    entropy: Array | None
    node_index: Array


def read_outputs(scores: Scores, inputs: PassInputs, row: RowState, request: Requests, dtype) -> PassOutputs:
    """What a row reads off the scores [Q] of what it fed.

    `fixed` works in float32. `release` rounds probabilities and thresholds to the dtype of the logits,
    as the authors do (quirks 1 and 2 of the recordings).
    """

    def rounded(x: Array) -> Array:
        return jnp.where(request.release, x.astype(dtype).astype(jnp.float32), x)

    confidence = rounded(scores.confidence)
    next_passes = rounded(scores.of_target) > rounded(request.token_threshold)
    needed = jnp.where(
        row.phase == Phase.VERIFY, inputs.node_index[Groups.JOINT], inputs.node_index[Groups.ALONE]
    )
    passes = jnp.roll(at_places(next_passes, needed), 1)
    if request.replay is not None:
        at = geometry(row, request)
        first = at.slot * request.slot_size
        passes = at.offset < request.replay.accepted[row.iterations][first + row.rounds[at.slot]]
    confident = confidence > rounded(request.slot_threshold)
    return PassOutputs(scores.draft, confidence, confident, passes, scores.entropy, inputs.node_index)


def at_places(x: Array, node_index: Array) -> Array:
    """x [Q] at places, zero where these are none of the Q."""
    return x.at[node_index].get(mode="fill", fill_value=0)


def slot_scores(
    row: RowState, request: Requests, outputs: PassOutputs, node_index: Array
) -> tuple[Array, Array]:
    """Scores of the slots whose masks are at `node_index` [T].

    Returns:
      float32 [M], -1 for slots that are not in the pool; and bool [M], which are above the slot threshold.
    """
    slots = jnp.arange(row.pool.shape[0])
    first = node_index[jnp.minimum(slots * request.slot_size, node_index.shape[0] - 1)]
    confidence = jnp.where(row.pool, at_places(outputs.confidence, first), -1.0)
    confident = row.pool & at_places(outputs.confident, first)
    if request.slot_score is not None:
        of_first, of_whole = request.slot_score == FIRST, _whole_scores(slots, request, outputs, node_index)
        confidence = jnp.where(of_first | ~row.pool, confidence, of_whole)
        confident = jnp.where(of_first, confident, row.pool & (of_whole > request.slot_threshold))
    return confidence, confident


def _whole_scores(slots: Array, request: Requests, outputs: PassOutputs, node_index: Array) -> Array:
    """float32 [M], the score "mean" or "entropy" of slots [M] whose masks are at `node_index` [T]."""
    slot_of = jnp.arange(node_index.shape[0]) // request.slot_size

    def mean(x: Array) -> Array:
        return jax.ops.segment_sum(at_places(x, node_index), slot_of, slots.shape[0]) / request.slot_size

    if outputs.entropy is None:
        return mean(outputs.confidence)
    return jnp.where(request.slot_score == MEAN, mean(outputs.confidence), jnp.exp(-mean(outputs.entropy)))
