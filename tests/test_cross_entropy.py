"""The fused cross entropy against logits in full."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refusion_jax.diffusion.cross_entropy import weighted_cross_entropy
from refusion_jax.diffusion.slot_diffusion import cross_entropy

B, T, D, V = 3, 24, 8, 50
RNG = np.random.default_rng(0)
STATES = RNG.normal(size=(B, T, D)).astype(np.float32)
HEAD = RNG.normal(size=(D, V)).astype(np.float32)
TARGETS = RNG.integers(0, V, (B, T), np.int32)
SOME = np.where(RNG.random((B, T)) < 0.4, 0, RNG.random((B, T))).astype(np.float32)
WEIGHTS = {
    "all": RNG.random((B, T)).astype(np.float32),
    "some": SOME,
    "none": np.zeros((B, T), np.float32),
    "one row": np.where(np.arange(B)[:, None] == 1, SOME, 0),
    "the last": np.where(np.arange(T) == T - 1, 1.0, 0) * np.ones((B, 1), np.float32),
}


@functools.cache
def in_chunks(num_chunks):
    """One function for each number, so that it is compiled once for all weights."""
    return functools.partial(weighted_cross_entropy, num_chunks=num_chunks)


def in_full(states, head, targets, weights):
    ce = cross_entropy(jnp.einsum("BTD,DV->BTV", states, head), targets)
    return jnp.sum(ce * weights), ce


fused = jax.jit(weighted_cross_entropy, static_argnums=4)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, *arguments):
    """Of three times the sum, in the states and the head."""
    return jax.value_and_grad(lambda *x: 3 * function(*x)[0], argnums=(0, 1))(*arguments)


@pytest.mark.parametrize("num_chunks", [1, 2, 6, 24])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_value_and_gradients(weights, num_chunks):
    arguments = STATES, HEAD, TARGETS, jnp.asarray(WEIGHTS[weights], jnp.float32)
    found = value_and_gradients(in_chunks(num_chunks), *arguments)
    wanted = value_and_gradients(in_full, *arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, wanted)
    ce = fused(*arguments, num_chunks)[1]
    np.testing.assert_allclose(ce, in_full(*arguments)[1] * (arguments[3] != 0), atol=2e-5)


@pytest.mark.parametrize("num_chunks", [1, 4])
def test_no_logits_of_the_whole_are_kept(num_chunks):
    """Nor any other array of B x T x V entries but within a chunk."""
    jaxpr = jax.make_jaxpr(jax.grad(lambda s, h: weighted_cross_entropy(s, h, TARGETS, SOME, num_chunks)[0]))(
        STATES, HEAD
    )
    sizes = [v.aval.size for equation in jaxpr.eqns for v in equation.outvars]
    assert max(sizes) == (B * T * V if num_chunks == 1 else B * T * D)


def test_confident_tokens_keep_their_digits():
    """Of losses as small as the last place of the logits, logsumexp - logit would leave noise."""
    head = np.array([[1000.0, 993.0, 0.0]], np.float32)
    states, targets = np.ones((1, 2, 1), np.float32), np.zeros((1, 2), np.int32)
    _, ce = weighted_cross_entropy(states, head, targets, np.ones((1, 2), np.float32), 2)
    np.testing.assert_allclose(ce, np.log1p(np.exp(-7.0)), rtol=1e-4)


def test_bfloat16_products_with_float32_statistics():
    states, head = (x.astype(jnp.bfloat16) for x in (STATES, HEAD))
    total, ce = weighted_cross_entropy(states, head, TARGETS, SOME, 4)
    grads = jax.grad(lambda s, h: weighted_cross_entropy(s, h, TARGETS, SOME, 4)[0], argnums=(0, 1))(
        states, head
    )
    assert total.dtype == ce.dtype == jnp.float32
    assert all(g.dtype == jnp.bfloat16 for g in grads)
    np.testing.assert_allclose(total, in_full(STATES, HEAD, TARGETS, SOME)[0], rtol=1e-2)
