"""What a left-to-right teacher reads to teach a noised batch, and which targets it may teach.

The teacher reads each example once, unmasked and in text order. Its reading at text position c - 1, the
logits that follow the tokens before c, is its prediction of token c. The student is fed the same tokens in
another order; `lesson` finds, for each token that the student is fed, where in the text order the teacher
predicts the same target:

  a masked token at c predicts itself: reading c - 1;
  a labelled clean token at c predicts token c + 1: reading c.

A masked token keeps its hard label where the student knows more than the teacher: if a clean slot stands
later in the text. Clean slots are fed before all masked ones, so the masked token sees that slot, and the
teacher does not. A masked token without a token before it has no reading and keeps its hard label too.

Labelled clean tokens are always taught, also where a later slot was fed before them. Their predictions are
the left-to-right reading, with which decoding verifies drafts; it should depend on the text before the token
alone, and this is what the teacher's prediction depends on.
"""

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.diffusion import segments
from refusion_jax.diffusion.segments import Batch
from refusion_jax.diffusion.slot_diffusion import Noised

Array = jax.Array


class Lesson(struct.PyTreeNode):
    """The inputs of the teacher for a batch, and its reading for each token that the student is fed.

    Attributes:
      tokens: int32 [B, T], the rows in text order.
      positions: int32 [B, T], position ids.
      segments: int32 [B, T], index of the token's example in its row; E for padding.
      reading: int32 [B, T], index in `tokens` at which the teacher predicts the target of each fed token.
      taught: bool [B, T], whether the fed token learns from the teacher; elsewhere `reading` has no meaning.
    """

    tokens: Array
    positions: Array
    segments: Array
    reading: Array
    taught: Array


class Taught(Noised):
    """A noised batch with a teacher.

    Attributes:
      lesson: what the teacher reads.
    """

    lesson: Lesson | None = None


def taught(batch: Batch, noised: Noised) -> Taught:
    """`noised`, a batch noised by `slot_diffusion.corrupt`, with its lesson."""
    fields = {name: getattr(noised, name) for name in Noised.__dataclass_fields__}
    return Taught(**fields, lesson=lesson(batch, noised))


def lesson(batch: Batch, noised: Noised) -> Lesson:
    """The lesson of a batch that `slot_diffusion.corrupt` noised."""

    def one(tokens: Array, prompt_len: Array, total_len: Array, noised: Noised) -> Lesson:
        num_examples = total_len.shape[0]
        at = segments.locate_tokens(prompt_len, total_len, tokens.shape[0])
        position, owner = noised.positions, at.owner  # noising keeps each example in place
        masked, labelled = noised.diffusion_weights > 0, noised.ar_weights > 0
        # Prompts count as clean here; they stand before all masked tokens and change nothing.
        clean = jnp.where(masked | ~at.real, -1, position)
        last_clean = jax.ops.segment_max(clean, owner, num_examples, indices_are_sorted=True)
        alone = masked & (position > 0) & (position > last_clean[owner])
        in_text = segments.first(total_len)[owner] + position
        return Lesson(
            tokens=tokens,
            positions=at.position,
            segments=at.segments,
            reading=jnp.where(masked, jnp.maximum(in_text - 1, 0), in_text),
            taught=labelled | alone,
        )

    lengths = segments.columns(batch["prompt_len"]), segments.columns(batch["total_len"])
    return jax.vmap(one)(batch["tokens"], *lengths, noised)
