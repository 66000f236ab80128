"""Drafts looked up in a row's own context, for exact verification without mask tokens.

After a pass the drafts are the tokens that followed the most recent earlier occurrence of the last n
committed tokens, prompt included: n = 3, where there is none 2, then 1. Answers that copy from their prompt
or repeat themselves take fewer passes, with any left-to-right model ("prompt lookup decoding").

Every function takes one row; the batch is a vmap. W is the padded draft length, S the cache length.
"""

import jax
import jax.numpy as jnp

from refusion_jax.decode.batch import Requests, Shape
from refusion_jax.decode.exact import through_eos
from refusion_jax.decode.exact_inputs import ExactRow, most_drafts

Array = jax.Array

LONGEST_MATCH = 3  # tokens


@jax.named_scope("lookup")
def looked_up(row: ExactRow, request: Requests, tokens: Array, eos_ids: Array, shape: Shape) -> ExactRow:
    """The row with the drafts of its next pass, if its request drafts by lookup.

    Args:
      row, request: without batch axis.
      tokens: int32 [S], the prompt and the committed tokens by position.
      eos_ids: int32 [E].
      shape: the padded sizes.
    """
    asked = request.exact
    draft, found = following(tokens, request.prompt_len + row.count, row.draft.shape[0])
    # One place is left for the bonus token that follows the drafts.
    most = jnp.minimum(most_drafts(row, request, shape), asked.gen_length - row.count - 1)
    drafted, _ = through_eos(draft, jnp.minimum(found, most), request, eos_ids)
    if asked.replay is not None:
        drafted = asked.replay.drafted[row.forwards]
    uses = asked.lookup & ~row.done
    return row.replace(draft=jnp.where(uses, draft, row.draft), drafted=jnp.where(uses, drafted, row.drafted))


def following(tokens: Array, length: Array, most: int) -> tuple[Array, Array]:
    """(int32 [most], int32): the tokens that followed the match, and how many of them there are.

    Args:
      tokens: int32 [S].
      length: int32, the number of leading `tokens` that count.
      most: the most tokens to return.
    """
    place = jnp.arange(tokens.shape[0])
    same, run = (place < length - 1), jnp.zeros_like(place)  # run: tokens that match, up to each place
    for back in range(LONGEST_MATCH):
        last = tokens[jnp.maximum(length - 1 - back, 0)]
        same &= (jnp.roll(tokens, back) == last) & (place >= back)
        run += same
    # The longest match; of equally long ones the latest.
    after = jnp.max(jnp.where(run == run.max(), place + 1, 0))
    count = jnp.where(run.max() > 0, jnp.clip(length - after, 0, most), 0)
    return tokens.at[after + jnp.arange(most)].get(mode="clip"), count
