"""The objective of masked diffusion models (LLaDA, arXiv 2502.09992, supervised fine-tuning).

Tokens of the response are masked one by one, with a probability that is drawn for the example, and each
masked position is trained to predict its own token, seeing all of the example, before it and after it:

  t ~ U(0, 1),  p = (1 - eps) t + eps
  L = 1/B sum_b sum over masked tokens i of ce_i / (p_b A_b)

with A the tokens of a response and b running over the B examples that have one. As in `diffusion`, `draw` is
the only place with randomness, and an example's noise depends on the key and its number alone.
"""

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.diffusion import segments
from refusion_jax.diffusion.slot_diffusion import Batch, DiffusionConfig, Noised

Array = jax.Array


class Draw(struct.PyTreeNode):
    """The random choices of a batch; entries outside responses have no meaning.

    Attributes:
      mask_probability: float32 [B, T], p.
      masked: bool [B, T].
    """

    mask_probability: Array
    masked: Array


def draw(
    key: Array,
    example: Array,
    prompt_len: Array,
    total_len: Array,
    length: int,
    eps: float,
    block_len: int | None = None,
) -> Draw:
    """Draws a probability for every example, or for every block of it, and what is masked.

    Args:
      key: the key of this training step, `fold_in(seed_key, step)`.
      example: int32 [B, E], a number that names each example.
      prompt_len: int32 [B, E], P.
      total_len: int32 [B, E], P + A; 0 where there is no example.
      length: T, tokens of a row.
      eps: smallest masking probability.
      block_len: response tokens that share a probability; None is all of them.
    """
    # One number a token (or block) and key, so that a draw does not depend on how far rows are padded.
    uniform = jax.vmap(lambda key, number: jax.random.uniform(jax.random.fold_in(key, number)))

    def one(example: Array, prompt_len: Array, total_len: Array) -> Draw:
        at = segments.locate_tokens(prompt_len, total_len, length)
        keys = jax.vmap(lambda number: jax.random.split(jax.random.fold_in(key, number)))(example)
        t = uniform(keys[at.owner, 0], at.offset // (block_len or length))
        p = (1 - eps) * t + eps
        return Draw(p, uniform(keys[at.owner, 1], at.offset) < p)

    return jax.vmap(one)(*map(segments.columns, (example, prompt_len, total_len)))


def corrupt(key: Array, batch: Batch, config: DiffusionConfig, mask_id: int) -> Noised:
    """`draw`, then `mask`; arguments as of `slot_diffusion.corrupt`."""
    tokens, prompt_len, total_len = batch["tokens"], batch["prompt_len"], batch["total_len"]
    drawn = draw(key, batch["example_id"], prompt_len, total_len, tokens.shape[1], config.eps)
    return mask(tokens, prompt_len, total_len, drawn, mask_id)


def mask(tokens: Array, prompt_len: Array, total_len: Array, draw: Draw, mask_id: int) -> Noised:
    """Rows with the drawn tokens masked, in text order; arguments as of `slot_diffusion.rearrange`."""

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


def flop_counts(prompt_len: Array, total_len: Array) -> tuple[Array, Array]:
    """As in Objective: every token of an example sees all of it."""
    length = jnp.asarray(total_len, jnp.float32)
    return length, jnp.square(length)
