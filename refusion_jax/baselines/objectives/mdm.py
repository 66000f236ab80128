"""The objective of masked diffusion models (LLaDA, arXiv 2502.09992, supervised fine-tuning).

Each response token is masked independently, with a probability drawn per example. Each masked position is
trained to predict its own token and sees the whole example, before it and after it:

  t ~ U(0, 1),  p = (1 - eps) t + eps
  L = 1/B sum_b sum over masked tokens i of ce_i / (p_b A_b)

A is the number of response tokens; b runs over the B examples that have a response. As in `slot_diffusion`,
`draw` is the only function that uses randomness, and an example's noise depends only on the key and its id.
"""

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.diffusion import segments
from refusion_jax.diffusion.segments import Batch
from refusion_jax.diffusion.slot_diffusion import DiffusionConfig, Noised

Array = jax.Array


class Draw(struct.PyTreeNode):
    """The random choices of a batch; entries outside responses have no meaning.

    Attributes:
      mask_probability: float32 [B, T], p.
      masked: bool [B, T].
    """

    mask_probability: Array
    masked: Array


def corrupt(key: Array, batch: Batch, config: DiffusionConfig, mask_id: int) -> Noised:
    """The noised batch: `draw`, then `mask`. Arguments as in `slot_diffusion.corrupt`."""
    lengths = batch["prompt_len"], batch["total_len"]
    drawn = draw(key, batch["example_id"], *lengths, batch["tokens"].shape[1], config.eps)
    return mask(batch["tokens"], *lengths, drawn, mask_id)


def draw(
    key: Array,
    example_id: Array,
    prompt_len: Array,
    total_len: Array,
    length: int,
    eps: float,
    block_len: int | None = None,
) -> Draw:
    """Draws a masking probability per example, or per block of it, and the tokens to mask.

    Args:
      key: the key of this training step, `fold_in(seed_key, step)`.
      example_id: int32 [B, E], id of each example.
      prompt_len: int32 [B, E], P.
      total_len: int32 [B, E], P + A; 0 for unused entries.
      length: T, tokens of a row.
      eps: smallest masking probability.
      block_len: number of consecutive response tokens that share a probability; None: all of a response.
    """
    # Every number is drawn from its own key, so that a draw does not depend on the padding of rows.
    uniform = jax.vmap(lambda key, number: jax.random.uniform(jax.random.fold_in(key, number)))

    def one(example_id: Array, prompt_len: Array, total_len: Array) -> Draw:
        at = segments.locate_tokens(prompt_len, total_len, length)
        keys = jax.vmap(lambda number: jax.random.split(jax.random.fold_in(key, number)))(example_id)
        t = uniform(keys[at.owner, 0], at.offset // (block_len or length))
        p = (1 - eps) * t + eps
        return Draw(p, uniform(keys[at.owner, 1], at.offset) < p)

    return jax.vmap(one)(*map(segments.columns, (example_id, prompt_len, total_len)))


def mask(tokens: Array, prompt_len: Array, total_len: Array, draw: Draw, mask_id: int) -> Noised:
    """Rows in text order with the drawn tokens masked. Arguments as in `slot_diffusion.rearrange`."""

    def one(tokens: Array, prompt_len: Array, total_len: Array, draw: Draw) -> Noised:
        at = segments.locate_tokens(prompt_len, total_len, tokens.shape[0])
        masked, response_len = at.response & draw.masked, total_len - prompt_len
        weights = jnp.where(masked, 1 / (draw.mask_probability * response_len[at.owner]), 0)
        return Noised(
            tokens=jnp.where(masked, mask_id, tokens),
            positions=at.position,
            segments=at.segments,
            targets=tokens,
            ar_weights=jnp.zeros_like(weights),
            diffusion_weights=weights,
            ar_count=jnp.float32(0),
            has_response=jnp.sum(response_len > 0).astype(jnp.float32),
        )

    return jax.vmap(one)(tokens, segments.columns(prompt_len), segments.columns(total_len), draw)


def flop_counts(prompt_len: Array, total_len: Array, config: DiffusionConfig) -> tuple[Array, Array]:
    """As `Objective.flop_counts`: every token of an example sees the whole example."""
    length = jnp.asarray(total_len, jnp.float32)
    return length, jnp.square(length)
