"""The autoregressive objective: each response token is predicted from the token before it.

The first response token is predicted from the last prompt token. The loss is the mean cross entropy over all
labelled tokens of the batch, EOS included. There is no noise.
"""

import jax
import jax.numpy as jnp

from refusion_jax.diffusion import segments
from refusion_jax.diffusion.segments import Batch
from refusion_jax.diffusion.slot_diffusion import DiffusionConfig, Noised

Array = jax.Array


def corrupt(key: Array, batch: Batch, config: DiffusionConfig, mask_id: int | None) -> Noised:
    """The rows unchanged, with next-token targets; uses only `batch`. Arguments as in `slot_diffusion`."""
    del key, config, mask_id

    def one(tokens: Array, prompt_len: Array, total_len: Array) -> Noised:
        at = segments.locate_tokens(prompt_len, total_len, tokens.shape[0])
        weights = segments.before_response(at).astype(jnp.float32)
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

    lengths = segments.columns(batch["prompt_len"]), segments.columns(batch["total_len"])
    return jax.vmap(one)(batch["tokens"], *lengths)
