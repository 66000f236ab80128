"""From logits to a draft and its probability for each token fed, in float32.

N is the number of tokens fed, in any layout; V the vocabulary size.
"""

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


class DraftSampling(struct.PyTreeNode):
    """How the draft at each of N tokens is sampled; arrays [N].

    Attributes:
      temperature: float32; 0 takes the argmax.
      seed: uint32, the seed of the request.
      iteration: int32, the index of the plan.
      place: int32, the index of the token in the response.
      rounded: bool, whether logits are rounded to the model's dtype first, as in `release` semantics; None
        for no rounding.
      removed: int32 arrays, token ids that are never chosen and have no probability; -1 for none.
    """

    temperature: Array
    seed: Array
    iteration: Array
    place: Array
    rounded: Array | None = None
    removed: tuple[Array, ...] = ()

    def allowed(self, logits: Array) -> Array:
        """The logits [N, V] with -inf for the removed tokens."""
        tokens = jnp.arange(logits.shape[-1])
        for removed in self.removed:
            logits = jnp.where(tokens == removed[:, None], -jnp.inf, logits)
        return logits


class Scores(struct.PyTreeNode):
    """The scores of N tokens fed.

    Attributes:
      draft: int32 [N], the token drafted from the logits.
      confidence: float32 [N], the softmax probability of the draft, at temperature 1.
      of_target: float32 [N], the softmax probability of the target token.
      entropy: float32 [N], the entropy of the softmax in nats; None if not asked for.
    """

    draft: Array
    confidence: Array
    of_target: Array
    entropy: Array | None


def score(
    logits: Array, target: Array, sampling: DraftSampling, entropy: bool = False, dtype=jnp.float32
) -> Scores:
    """The scores of N tokens.

    Args:
      logits: [N, V], of any float dtype; computed with in float32.
      target: int32 [N], the token after each of them, whose probability is wanted.
      sampling: how drafts are sampled.
      entropy: whether to compute the entropy.
      dtype: the model's, to which `sampling.rounded` rounds.
    """
    logits = logits.astype(jnp.float32)
    if sampling.rounded is not None and dtype != jnp.float32:
        logits = jnp.where(sampling.rounded[:, None], logits.astype(dtype).astype(jnp.float32), logits)
    logits = sampling.allowed(logits)
    normaliser = jax.nn.logsumexp(logits, axis=-1)

    def probability(token: Array) -> Array:
        chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        return jnp.exp(chosen - normaliser)

    drafted = _chosen(logits, sampling)
    entropies = None
    if entropy:
        entropies = jnp.sum(jax.scipy.special.entr(jnp.exp(logits - normaliser[:, None])), axis=-1)
    return Scores(drafted, probability(drafted), probability(target), entropies)


def draft(logits: Array, sampling: DraftSampling) -> Array:
    """int32 [N]: the argmax of logits [N, V], or a Gumbel-max sample where the temperature is above 0.

    The noise is keyed by (seed, iteration, place), so it depends on nothing but the request.
    """
    return _chosen(sampling.allowed(logits), sampling)


def _chosen(logits: Array, sampling: DraftSampling) -> Array:
    """`draft` of logits without the removed tokens."""

    def noise(sampling: DraftSampling) -> Array:
        key = jax.random.fold_in(jax.random.key(sampling.seed), sampling.iteration)
        return (
            jax.random.gumbel(jax.random.fold_in(key, sampling.place), logits.shape[-1:])
            * sampling.temperature
        )

    def sample() -> Array:
        hot = (sampling.temperature > 0)[:, None]
        return jnp.argmax(logits + jnp.where(hot, jax.vmap(noise)(sampling), 0), axis=-1)

    any_hot = jnp.any(sampling.temperature > 0)
    return jax.lax.cond(any_hot, sample, lambda: jnp.argmax(logits, axis=-1)).astype(jnp.int32)
