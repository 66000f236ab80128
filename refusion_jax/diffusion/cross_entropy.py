"""Weighted cross entropy of final states under a head, without the logits of a whole batch.

The loss is a weighted sum over tokens whose weights are known in advance. Its gradient with respect to the
logits, weight * (softmax - one-hot), is therefore known as soon as the logits are. The forward pass turns it
into the gradients of states and head at once, one chunk of tokens after another; the backward pass only
scales them. No logits outlive their chunk and none are computed twice. Tokens of weight 0 (prompts, ends of
slots, padding) are skipped, except for those that fill up the last chunk. The gradient of a head that is not
differentiated, as in low-rank adaptation, is not computed.
"""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_cross_entropy(
    states: Array, head: Array, targets: Array, weights: Array, num_chunks: int
) -> tuple[Array, Array]:
    """The sum over tokens of w_i ce_i, and ce_i itself for reporting.

    Args:
      states: [B, T, D], final states.
      head: [D, V], of the same dtype. Matrix products are computed in it, softmax statistics in float32.
      targets: int32 [B, T].
      weights: float32 [B, T], w.
      num_chunks: number of parts of T, computed one after another; must divide T.

    Returns:
      float32 [], differentiable in states and head; and float32 [B, T] without a gradient, 0 where w_i is 0.
    """
    return _forward(states, head, targets, weights, num_chunks, False)[0]


def _forward(states: Array, head: Array, targets: Array, weights: Array, num_chunks: int, train_head: bool):
    """The results, and the gradients of states and head; None instead of the latter without `train_head`."""
    if num_chunks == 1:
        ce, d_states, d_head = _chunk(states, head, targets, weights, train_head)
        return (jnp.sum(ce * weights), ce), (d_states, _cast(d_head, head.dtype))

    weighted = weights != 0
    order = jnp.argsort(~weighted, axis=1)  # stable: weighted tokens first, otherwise in their order
    length = states.shape[1] // num_chunks
    num_live = -(-jnp.max(jnp.sum(weighted, axis=1)) // length)

    def take(x: Array, indices: Array) -> Array:
        return jnp.take_along_axis(x, indices.reshape(*indices.shape, *(1,) * (x.ndim - 2)), axis=1)

    def chunk(i: Array, sums: tuple[Array, Array, Array | None]) -> tuple[Array, Array, Array | None]:
        ce, d_states, d_head = sums
        indices = jax.lax.dynamic_slice_in_dim(order, i * length, length, axis=1)
        inputs = (take(x, indices) if x is not head else x for x in (states, head, targets, weights))
        part = _chunk(*inputs, train_head)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * length, axis=1)
        summed = d_head + part[2] if train_head else None
        return put(ce, part[0]), put(d_states, part[1]), summed

    nothing = jnp.zeros(weights.shape), jnp.zeros_like(states), jnp.zeros(head.shape) if train_head else None
    ce, d_states, d_head = jax.lax.fori_loop(0, num_live, chunk, nothing)
    back = jnp.argsort(order, axis=1)
    ce, d_states = take(ce, back), take(d_states, back)
    return (jnp.sum(ce * weights), ce), (d_states, _cast(d_head, head.dtype))


def _chunk(
    states: Array, head: Array, targets: Array, weights: Array, train_head: bool
) -> tuple[Array, Array, Array | None]:
    """ce [B, T], and the gradients of its weighted sum with respect to the states and (float32) the head."""
    logits = jnp.einsum("BTD,DV->BTV", states, head)
    # Subtract the largest logit first: the loss of a confident token is only a few units in the last place
    # of the logits.
    shifted = logits.astype(jnp.float32) - jnp.max(logits, axis=-1, keepdims=True).astype(jnp.float32)
    exponentials = jnp.exp(shifted)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    is_target = jnp.arange(head.shape[1]) == targets[..., None]
    ce = jnp.log(total[..., 0]) - jnp.sum(jnp.where(is_target, shifted, 0), axis=-1)
    ce = jnp.where(weights == 0, 0, ce)
    d_logits = (exponentials / total - is_target) * weights[..., None]
    d_logits = d_logits.astype(states.dtype)
    d_states = jnp.einsum("BTV,DV->BTD", d_logits, head)
    d_head = None
    if train_head:
        d_head = jnp.einsum("BTD,BTV->DV", states, d_logits, preferred_element_type=jnp.float32)
    return ce, d_states, d_head


def _cast(x: Array | None, dtype: jnp.dtype) -> Array | None:
    return None if x is None else x.astype(dtype)


def _forward_rule(states, head, targets, weights, num_chunks: int):
    # With symbolic_zeros each argument has a value and a flag, whether it is differentiated.
    values = (x.value for x in (states, head, targets, weights))
    return _forward(*values, num_chunks, head.perturbed)


def _backward(num_chunks: int, gradients: tuple[Array, Array | None], cotangents: tuple[Array, Array]):
    scale, _ = cotangents
    d_states, d_head = (None if g is None else g * scale.astype(g.dtype) for g in gradients)
    return d_states, d_head, None, None


weighted_cross_entropy.defvjp(_forward_rule, _backward, symbolic_zeros=True)
