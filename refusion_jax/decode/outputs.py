"""The outputs of one forward pass of a row: drafts, accepted tokens, and the scores of slots.

M is the padded number of slots per block, T the padded block length, Q the number of tokens fed, J the number
of groups of inputs.py.
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
    """The outputs of a row's pass.

    Attributes:
      draft: int32 [Q], the token drafted at each token fed: at a mask token the token in its place, at any
        other token the next token.
      confidence: float32 [Q], the probability of that draft.
      confident: bool [Q], whether the confidence is above the slot threshold.
      passes: bool [T], whether the probability of the block's token at this index, given the tokens before
        it, is above the token threshold.
      entropy: float32 [Q] or None, as in Scores.
      node_index: int32 [J, T], as in PassInputs.
    """

    draft: Array
    confidence: Array
    confident: Array
    passes: Array
    entropy: Array | None
    node_index: Array


def read_outputs(scores: Scores, inputs: PassInputs, row: RowState, request: Requests, dtype) -> PassOutputs:
    """The outputs of a row from the scores [Q] of the tokens it fed.

    `fixed` compares in float32. `release` first rounds probabilities and thresholds to the dtype of the
    logits, as the authors' code does (quirks 1 and 2 of the recordings).

    Args:
      dtype: of the logits.
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
    """`x` [Q] at the indices `node_index`; zero where an index is Q (not fed)."""
    return x.at[node_index].get(mode="fill", fill_value=0)


def slot_scores(
    row: RowState, request: Requests, outputs: PassOutputs, node_index: Array
) -> tuple[Array, Array]:
    """The scores of the slots whose mask tokens were fed at `node_index` [T].

    Returns:
      the scores, float32 [M], -1 for slots that are not in the pool; and whether they are above the slot
      threshold, bool [M].
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
    """float32 [M]: the "mean" or "entropy" scores of slots [M] whose mask tokens are at `node_index` [T]."""
    slot_of = jnp.arange(node_index.shape[0]) // request.slot_size

    def mean(x: Array) -> Array:
        return jax.ops.segment_sum(at_places(x, node_index), slot_of, slots.shape[0]) / request.slot_size

    if outputs.entropy is None:
        return mean(outputs.confidence)
    return jnp.where(request.slot_score == MEAN, mean(outputs.confidence), jnp.exp(-mean(outputs.entropy)))
