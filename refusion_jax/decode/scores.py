"""What is read off the logits: a draft for each token fed, and probabilities, in float32.

N is the number of tokens fed, in any layout.
"""

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


class DraftSampling(struct.PyTreeNode):
    """How each of N tokens is drafted, each [N].

    Attributes:
      temperature: float32; 0 is the argmax.
      seed: uint32, of the request.
      iteration, place: int32, of the plan and of the token in the response.
    """

    temperature: Array
    seed: Array
    iteration: Array
    place: Array


class Scores(struct.PyTreeNode):
    """Of each of N tokens fed.

    Attributes:
      draft: int32 [N], the token that its logits name.
      confidence: float32 [N], the probability of that.
      of_target: float32 [N], the probability of the token that follows it.
      entropy: float32 [N], in nats, of its softmax; None where it was not asked for.
    """

    draft: Array
    confidence: Array
    of_target: Array
    entropy: Array | None


def score(logits: Array, target: Array, sampling: DraftSampling, entropy: bool = False) -> Scores:
    """Scores of N tokens.

    Args:
      logits: [N, V], of any float dtype; what is computed of them is float32.
      target: int32 [N], the token that follows each.
      sampling: how they are drafted.
      entropy: whether that is asked for.
    """
    exact = logits.astype(jnp.float32)
    normaliser = jax.nn.logsumexp(exact, axis=-1)

    def probability(of: Array) -> Array:
        chosen = jnp.take_along_axis(logits, of[:, None], axis=-1)[:, 0].astype(jnp.float32)
        return jnp.exp(chosen - normaliser)

    drafted = draft(exact, sampling)
    spread = None
    if entropy:
        spread = jnp.sum(jax.scipy.special.entr(jnp.exp(exact - normaliser[:, None])), axis=-1)
    return Scores(drafted, probability(drafted), probability(target), spread)


def draft(logits: Array, sampling: DraftSampling) -> Array:
    """int32 [N]: the argmax of logits [N, V], or a Gumbel-max sample where the temperature is above 0.

    The noise is keyed by (seed, iteration, place in the response): it depends on the request alone.
    """

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
