"""The tokens that a forward pass of a decoder feeds, whatever phase or method they belong to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from refusion_jax.decode.scores import DraftSampling

Array = jax.Array


class TokensFed(NamedTuple):
    """The tokens that a row feeds in one pass. Outside `vmap` every field has a leading batch axis.

    Attributes:
      tokens, positions: int32 [Q]; positions count from the start of the prompt.
      active: bool [Q], entries that hold a token.
      target: int32 [Q], the token whose probability is read from each token's logits.
      mask: bool [Q, S + Q], the cache entries and the fed tokens that each token sees.
      sampling: how the draft at each token is sampled, arrays [Q].
    """

    tokens: Array
    positions: Array
    active: Array
    target: Array
    mask: Array
    sampling: DraftSampling

    def padded(self, size: int) -> "TokensFed":
        """A batch [B, Q, ...] with Q enlarged to `size` by inactive entries."""
        more = size - self.tokens.shape[1]

        def pad(x: Array) -> Array:
            return jnp.pad(x, ((0, 0), (0, more)))

        tokens, positions, active, target = map(pad, self[:4])
        mask = jnp.pad(self.mask, ((0, 0), (0, more), (0, more)))
        return TokensFed(tokens, positions, active, target, mask, jax.tree.map(pad, self.sampling))
