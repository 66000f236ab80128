"""The TPU attention kernel, interpreted on simulated devices, against the dense reference."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention

from refusion_jax import sharding
from refusion_jax.model.attention import attend_fed, fitting_kernel
from refusion_jax.model.transformer import ModelConfig, Transformer
from refusion_jax.sharding import MeshConfig, make_mesh


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the kernel in the interpreter: there is no TPU here to compile it for."""
    interpreting = functools.partial(splash_attention.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha_single_device", interpreting)


def random_inputs(rows: int, length: int, heads: int, kv_heads: int, head_dim: int):
    random = np.random.default_rng(0)
    shapes = [(rows, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    *qkv, weights = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)
    segments = jnp.asarray(np.sort(random.integers(0, 3, (rows, length)), axis=1), jnp.int32)
    return qkv, weights, segments


def value_and_gradients(kernel: str, qkv, weights, segments, causal=True):
    def value(q, k, v):
        out = attend_fed(q, (k, v), segments, kernel, causal=causal)
        return jnp.sum(out * weights), out

    (_, out), gradients = jax.value_and_grad(value, (0, 1, 2), has_aux=True)(*qkv)
    return out, gradients


dense = jax.jit(functools.partial(value_and_gradients, "dense"), static_argnames="causal")


def assert_agree(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segmented", [True, False])
def test_grouped_queries_and_segments(interpreted, segmented, causal):
    qkv, weights, segments = random_inputs(2, 256, 4, 2, 64)
    segments = segments if segmented else None
    found = jax.jit(functools.partial(value_and_gradients, "splash", causal=causal))(qkv, weights, segments)
    assert_agree(found, dense(qkv, weights, segments, causal=causal))


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(4, 2), (4, 1), (3, 3)], ids=["all split", "queries split", "none split"]
)
def test_on_a_mesh(interpreted, heads, kv_heads):
    """Each device calls the kernel on its rows and heads, whatever the mesh divides."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    config = ModelConfig(16, 1, 8, heads, kv_heads, 64, 8)
    nothing = jnp.zeros((1, 1), jnp.int32)
    boxed = jax.eval_shape(lambda: Transformer(config).init(jax.random.key(0), nothing, nothing))
    layout = sharding.layout(boxed, mesh)
    qkv, weights, segments = random_inputs(4, 128, heads, kv_heads, 64)

    @jax.jit
    def run(qkv, weights, segments):
        with layout.scope():
            q, k, v = qkv
            q = nn.with_logical_constraint(q, ("act_batch", "act_length", "act_heads", None))
            return value_and_gradients("splash", (q, k, v), weights, segments)

    rows = sharding.batch_sharding(mesh)
    out, gradients = run(*jax.device_put((qkv, weights, segments), rows))
    assert_agree((out, gradients), dense(qkv, weights, segments))
    split = heads // 2 if heads % 2 == 0 else heads
    assert out.addressable_shards[0].data.shape == (1, 128, split, 64)


@pytest.mark.parametrize(
    ("platform", "head_dim", "length", "dtype", "kernel"),
    [
        ("tpu", 128, 4096, jnp.bfloat16, "splash"),
        ("tpu", 64, 384, jnp.bfloat16, "splash"),
        ("tpu", 128, 92, jnp.bfloat16, "dense"),  # no whole tiles
        ("tpu", 16, 128, jnp.bfloat16, "dense"),
        ("tpu", 128, 4096, jnp.float32, "dense"),
        ("cpu", 128, 4096, jnp.bfloat16, "dense"),
    ],
)
def test_what_fits(platform, head_dim, length, dtype, kernel):
    assert fitting_kernel(platform, jnp.dtype(dtype), head_dim, length) == kernel
