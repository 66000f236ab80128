"""The cross entropy of final states under a head, without logits of the whole batch.

The loss is a weighted sum over tokens whose weights are known beforehand. So its gradient with respect to
the logits, weight * (softmax - one-hot), is there as soon as the logits are: the forward pass multiplies it
into the gradients of states and head at once, chunk after chunk, and the backward pass only scales those.
No logits outlive their chunk, none is computed twice, and none for tokens without a weight (prompts, ends of
slots, padding), but for those that fill up the last chunk.
"""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_cross_entropy(
    states: Array, head: Array, targets: Array, weights: Array, num_chunks: int
) -> tuple[Array, Array]:
    """sum_i w_i ce_i, and every ce_i, which is for reporting: it has no gradient.

    Args:
      states: [B, T, D].
      head: [D, V], of the same dtype; products are in it, statistics in float32.
      targets: int32 [B, T].
      weights: float32 [B, T].
      num_chunks: T is cut into so many parts, computed one after the other.

    Returns:
      float32 [] and float32 [B, T]; ce_i is 0 where w_i is.
    """
    return _forward(states, head, targets, weights, num_chunks)[0]


def _forward(states: Array, head: Array, targets: Array, weights: Array, num_chunks: int):
    if num_chunks == 1:
        ce, d_states, d_head = _chunk(states, head, targets, weights)
        return (jnp.sum(ce * weights), ce), (d_states, d_head.astype(head.dtype))

    weighted = weights != 0
    order = jnp.argsort(~weighted, axis=1)  # stable: weighted tokens first, else as they stand
    length = states.shape[1] // num_chunks
    num_live = -(-jnp.max(jnp.sum(weighted, axis=1)) // length)

    def take(x: Array, places: Array) -> Array:
        return jnp.take_along_axis(x, places.reshape(*places.shape, *(1,) * (x.ndim - 2)), axis=1)

    def chunk(i: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        ce, d_states, d_head = sums
        places = jax.lax.dynamic_slice_in_dim(order, i * length, length, axis=1)
        part = _chunk(*(take(x, places) if x is not head else x for x in (states, head, targets, weights)))
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * length, axis=1)
        return put(ce, part[0]), put(d_states, part[1]), d_head + part[2]

    nothing = jnp.zeros(weights.shape), jnp.zeros_like(states), jnp.zeros(head.shape)
    ce, d_states, d_head = jax.lax.fori_loop(0, num_live, chunk, nothing)
    back = jnp.argsort(order, axis=1)
    ce, d_states = take(ce, back), take(d_states, back)
    return (jnp.sum(ce * weights), ce), (d_states, d_head.astype(head.dtype))


def _chunk(states: Array, head: Array, targets: Array, weights: Array) -> tuple[Array, Array, Array]:
    """ce [B, T], and the gradients of its weighted sum: of the states, and float32 of the head."""
    logits = jnp.einsum("BTD,DV->BTV", states, head)
    # The largest logit is taken off before anything is subtracted: the loss of a confident token is a few
    # units in the last place of the logits themselves.
    shifted = logits.astype(jnp.float32) - jnp.max(logits, axis=-1, keepdims=True).astype(jnp.float32)
    exponentials = jnp.exp(shifted)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    is_target = jnp.arange(head.shape[1]) == targets[..., None]
    ce = jnp.log(total[..., 0]) - jnp.sum(jnp.where(is_target, shifted, 0), axis=-1)
    ce = jnp.where(weights == 0, 0, ce)
    d_logits = (exponentials / total - is_target) * weights[..., None]
    d_logits = d_logits.astype(states.dtype)
    d_states = jnp.einsum("BTV,DV->BTD", d_logits, head)
    d_head = jnp.einsum("BTD,BTV->DV", states, d_logits, preferred_element_type=jnp.float32)
    return ce, d_states, d_head


def _backward(num_chunks: int, gradients: tuple[Array, Array], cotangents: tuple[Array, Array]):
    scale, _ = cotangents
    d_states, d_head = (g * scale.astype(g.dtype) for g in gradients)
    return d_states, d_head, None, None


weighted_cross_entropy.defvjp(_forward, _backward)
