"""The autoregressive objective: each token of the response is predicted from the one before it.

The first is predicted from the last token of the prompt. The loss is the mean over all labelled tokens of the
batch, EOS included; nothing is drawn.
"""

import jax
import jax.numpy as jnp

from refusion_jax.diffusion import segments
from refusion_jax.diffusion.slot_diffusion import Batch, Noised

Array = jax.Array


def corrupt(key: Array, batch: Batch) -> Noised:
    """What is fed and asked: the rows as they are. Nothing is drawn, so the key is not used."""
    del key
    return labelled(batch["tokens"], batch["prompt_len"], batch["total_len"])


def labelled(tokens: Array, prompt_len: Array, total_len: Array) -> Noised:
    """The rows as they are, with a label for each token before one of the response.

    Arguments as of `slot_diffusion.rearrange`.
    """

    def one(tokens: Array, prompt_len: Array, total_len: Array) -> Noised:
        at = segments.locate_tokens(prompt_len, total_len, tokens.shape[0])
        asked = jnp.roll(at.response & (at.position > 0), -1)  # each token for the one after it
        weights = asked.astype(jnp.float32)
        return Noised(
            tokens=tokens,
            positions=at.position,
            segments=at.segments,
            targets=jnp.roll(tokens, -1),
            ar_weights=weights,
            diffusion_weights=jnp.zeros_like(weights),
            ar_count=jnp.sum(weights),
            has_response=jnp.sum(total_len > prompt_len).astype(jnp.float32),
        )

    return jax.vmap(one)(tokens, segments.columns(prompt_len), segments.columns(total_len))
