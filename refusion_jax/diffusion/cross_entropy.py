"""Weighted cross entropy of final states under a head, without the logits of a whole batch.

The loss is a weighted sum over tokens whose weights are known in advance. Its gradient with respect to the
logits, weight * (softmax - one-hot), is therefore known as soon as the logits are. The forward pass turns it
into the gradients of states and head at once, one chunk of tokens after another; the backward pass only
scales them. No logits outlive their chunk and none are computed twice. Tokens of weight 0 (prompts, ends of
slots, padding) are skipped, except for those that fill up the last chunk. The gradient of a head that is not
differentiated, as in low-rank adaptation, is not computed.

With a teacher, the loss of a token is (1 - s) ce + s KL(teacher || student). The divergence is computed from
the teacher's most probable tokens, with all others as one bucket: with p and q the two models' probabilities,

  KL = sum over named tokens v of p_v log(p_v / q_v) + p_rest log(p_rest / q_rest)

It includes the teacher's entropy, which has no gradient, so it is 0 where the two agree. Its gradient in the
logits is q_v - p_v at named tokens and q_v - p_rest q_v / q_rest at the others, again known with the logits.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array
TINY = jnp.finfo(jnp.float32).tiny


class SoftTargets(struct.PyTreeNode):
    """A teacher's predictions of the targets. They have no gradient.

    Attributes:
      states: [B, T, C], the teacher's final states, of width C, that predict the targets.
      head: [C, V], of the same dtype.
      shares: float32 [B, T] in [0, 1], s: share of the divergence in each token's loss.
      top_k: number of the teacher's most probable tokens that are compared one by one. Tokens as probable as
        the last of them are named too.
    """

    states: Array
    head: Array
    shares: Array
    top_k: int = struct.field(pytree_node=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_cross_entropy(
    states: Array,
    head: Array,
    targets: Array,
    weights: Array,
    num_chunks: int,
    soft: SoftTargets | None = None,
) -> tuple[Array, Array]:
    """The sum over tokens of w_i ce_i, and ce_i itself for reporting.

    With `soft`, the loss of a token with a teacher takes the place of ce_i in both.

    Args:
      states: [B, T, D], final states.
      head: [D, V], of the same dtype. Matrix products are computed in it, softmax statistics in float32.
      targets: int32 [B, T].
      weights: float32 [B, T], w.
      num_chunks: number of parts of T, computed one after another; must divide T.
      soft: the teacher's predictions; None trains on the targets alone.

    Returns:
      float32 [], differentiable in states and head; and float32 [B, T] without a gradient, 0 where w_i is 0.
    """
    return _forward(states, head, targets, weights, num_chunks, soft, False)[0]


def _forward(
    states: Array,
    head: Array,
    targets: Array,
    weights: Array,
    num_chunks: int,
    soft: SoftTargets | None,
    train_head: bool,
):
    """The results, and the gradients of states and head; None instead of the latter without `train_head`."""
    if num_chunks == 1:
        ce, d_states, d_head = _chunk(states, head, targets, weights, soft, train_head)
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
        taken = [take(x, indices) if x is not head else x for x in (states, head, targets, weights)]
        if soft is None:
            part = _chunk(*taken, None, train_head)
        else:
            of_teacher = {name: take(getattr(soft, name), indices) for name in ("states", "shares")}
            part = _chunk(*taken, soft.replace(**of_teacher), train_head)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * length, axis=1)
        summed = d_head + part[2] if train_head else None
        return put(ce, part[0]), put(d_states, part[1]), summed

    nothing = jnp.zeros(weights.shape), jnp.zeros_like(states), jnp.zeros(head.shape) if train_head else None
    ce, d_states, d_head = jax.lax.fori_loop(0, num_live, chunk, nothing)
    back = jnp.argsort(order, axis=1)
    ce, d_states = take(ce, back), take(d_states, back)
    return (jnp.sum(ce * weights), ce), (d_states, _cast(d_head, head.dtype))


def _chunk(
    states: Array, head: Array, targets: Array, weights: Array, soft: SoftTargets | None, train_head: bool
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
    wanted = is_target
    if soft is not None:
        divergence, expected = _divergence(shifted, exponentials, total, soft)
        ce = (1 - soft.shares) * ce + soft.shares * divergence
        share = soft.shares[..., None]
        wanted = (1 - share) * is_target + share * expected
    ce = jnp.where(weights == 0, 0, ce)
    d_logits = (exponentials / total - wanted) * weights[..., None]
    d_logits = d_logits.astype(states.dtype)
    d_states = jnp.einsum("BTV,DV->BTD", d_logits, head)
    d_head = None
    if train_head:
        d_head = jnp.einsum("BTD,BTV->DV", states, d_logits, preferred_element_type=jnp.float32)
    return ce, d_states, d_head


def _divergence(shifted: Array, exponentials: Array, total: Array, soft: SoftTargets) -> tuple[Array, Array]:
    """KL(teacher || student), [B, T], and the distribution [B, T, V] that takes the target's place in its
    gradient; from the student's logits minus the largest, their exponentials, and the sum of these."""
    logits = jnp.einsum("BTC,CV->BTV", soft.states, soft.head).astype(jnp.float32)
    least = jax.lax.top_k(logits, min(soft.top_k, logits.shape[-1]))[0][..., -1:]
    named = logits >= least
    log_p, log_q = jax.nn.log_softmax(logits), shifted - jnp.log(total)
    p = jnp.exp(log_p)
    of_named = jnp.sum(jnp.where(named, p * (log_p - log_q), 0), axis=-1)
    p_rest = jnp.sum(jnp.where(named, 0, p), axis=-1, keepdims=True)
    # Summed from the other tokens: 1 - sum over named tokens would be rounding error for a confident model.
    rest = jnp.maximum(jnp.sum(jnp.where(named, 0, exponentials), axis=-1, keepdims=True), TINY)
    of_rest = p_rest * (jnp.log(jnp.maximum(p_rest, TINY)) - jnp.log(rest) + jnp.log(total))
    return of_named + of_rest[..., 0], jnp.where(named, p, p_rest * (exponentials / rest))


def _cast(x: Array | None, dtype: jnp.dtype) -> Array | None:
    return None if x is None else x.astype(dtype)


def _forward_rule(states, head, targets, weights, num_chunks: int, soft):
    # With symbolic_zeros each argument has a value and a flag, whether it is differentiated.
    values = (x.value for x in (states, head, targets, weights))
    soft = jax.tree.map(lambda x: x.value, soft, is_leaf=lambda x: hasattr(x, "perturbed"))
    return _forward(*values, num_chunks, soft, head.perturbed)


def _backward(num_chunks: int, gradients: tuple[Array, Array | None], cotangents: tuple[Array, Array]):
    scale, _ = cotangents
    d_states, d_head = (None if g is None else g * scale.astype(g.dtype) for g in gradients)
    return d_states, d_head, None, None, None


weighted_cross_entropy.defvjp(_forward_rule, _backward, symbolic_zeros=True)
