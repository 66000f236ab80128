"""Low-rank adaptation: only A and B change, and a merged model is the adapted one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec as P
from whole_params import merge_adapters, stack_layers

from refusion_jax import sharding
from refusion_jax.model.adapter import Adapter
from refusion_jax.model.transformer import ModelConfig, Transformer
from refusion_jax.sharding import MeshConfig, make_mesh
from refusion_jax.weights import lora
from refusion_jax.weights.lazy import LazyArray
from refusion_jax.weights.lora import TARGETS, LoraConfig

MODEL = ModelConfig(64, 2, 16, 4, 2, 8, 24, qkv_bias=True)
TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)
POSITIONS = np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6))


def base_params(scan_layers: bool = False):
    boxed = jax.eval_shape(Transformer(MODEL).init, jax.random.key(0), TOKENS, POSITIONS)["params"]
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: random.normal(size=x.shape, scale=0.2).astype("f4"), sharding.unbox(boxed)
    )
    return stack_layers(params) if scan_layers else params


@partial(jax.jit, static_argnums=(1, 2))
def logits(params, scan_layers=False, adapter=None):
    model = Transformer(MODEL, scan_layers=scan_layers, adapter=adapter)
    return model.apply({"params": params}, TOKENS, POSITIONS)[0]


def adapted_logits(config: LoraConfig, params, scan_layers=False):
    adapter = Adapter(config.rank, config.alpha / config.rank, config.targets)
    return logits(lora.beside(params), scan_layers, adapter)


def adapted(config: LoraConfig, base, key: int = 1):
    """An adapted model that has learned something."""
    params = lora.init(config, jax.random.key(0), base, jnp.float32)
    random = np.random.default_rng(key)
    learned = jax.tree.map(lambda x: x + 0.1 * random.normal(size=x.shape).astype("f4"), params["lora"])
    return params | {"lora": learned}


def on_disk(tree):
    return jax.tree.map(
        lambda x: LazyArray(x.shape, np.dtype(x.dtype), lambda i: np.asarray(x)[i], "here"), tree
    )


@pytest.mark.parametrize("scan_layers", [False, True])
def test_at_first_it_is_the_model_there_was(scan_layers):
    base = base_params(scan_layers)
    config = LoraConfig(rank=3)
    params = lora.init(config, jax.random.key(0), base, jnp.float32)
    found = adapted_logits(config, params, scan_layers)
    np.testing.assert_allclose(found, logits(base, scan_layers), rtol=0, atol=2e-6)
    assert float(params["scale"]) == pytest.approx(16 / 3)
    for path, a, b in lora._pairs(params):
        assert not b.any() and a.any()
        inputs = 4 * 8 if path[-1] == "o" else 24 if path[-1] == "down" else 16
        assert np.abs(a).max() <= inputs**-0.5 and np.std(a) == pytest.approx((3 * inputs) ** -0.5, rel=0.3)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("targets", [("q", "o", "down"), tuple(TARGETS)])
def test_what_is_added_is_x_times_a_times_b(targets, scan_layers):
    """The model with adapters computes what the plain model does with W + scale * A B."""
    config = LoraConfig(rank=3, alpha=6, targets=targets)
    params = adapted(config, base_params(scan_layers))
    merged, base = flatten_dict(merge_adapters(params)), flatten_dict(params["base"])
    assert {path[-1] for path in base if not np.array_equal(base[path], merged[path])} == set(targets)
    found, wanted = adapted_logits(config, params, scan_layers), logits(unflatten_dict(merged), scan_layers)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert np.abs(wanted - logits(params["base"], scan_layers)).max() > 0.1


@pytest.mark.parametrize("targets", [("q", "v"), tuple(TARGETS)])
def test_gradients_reach_the_adapters_of_the_targets_and_nothing_else(targets):
    """Those of W + 2 A B are, with G the gradient of the merged kernel, 2 G B' and 2 A' G."""
    config = LoraConfig(rank=3, alpha=6, targets=targets)
    params = adapted(config, base_params())
    trained, frozen = lora.split(params)
    jax.tree.map(np.testing.assert_array_equal, lora.combine(trained, frozen), params)

    def loss(logits):
        return jnp.sum(jnp.square(logits))

    merged_grads = flatten_dict(jax.grad(lambda plain: loss(logits(plain)))(merge_adapters(params)))
    grads = jax.grad(lambda trained: loss(adapted_logits(config, lora.combine(trained, frozen))))(trained)
    for path, a, b in lora._pairs({"lora": grads}):
        assert path[-1] in targets and np.abs(a).max() > 0 and np.abs(b).max() > 0
        full = np.asarray(merged_grads[path])
        (_, was_a, was_b) = next(pair for pair in lora._pairs(params) if pair[0] == path)
        flat = full.reshape(int(np.prod(a.shape[:-1])), -1)
        wanted_a = 2 * flat @ np.asarray(was_b).reshape(3, -1).T
        wanted_b = 2 * np.asarray(was_a).reshape(-1, 3).T @ flat
        np.testing.assert_allclose(a, wanted_a.reshape(a.shape), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(b, wanted_b.reshape(b.shape), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_as_it_is_read(scan_layers, dtype):
    """Whole and in slices, to the last bit but one of float32; bfloat16 is rounded once."""
    params = adapted(LoraConfig(rank=3), base_params(scan_layers))
    params["base"] = jax.tree.map(lambda x: x.astype(dtype), params["base"])
    unrounded = merge_adapters(params)
    wanted = jax.tree.map(lambda x: x.astype(dtype), unrounded)
    stored, precise = (lora.merge_lazy(on_disk(params), asked) for asked in (None, np.float32))
    tolerance = {"atol": 1e-6} if dtype == "float32" else {"rtol": 2**-7}

    def same(leaf, value):
        value = np.asarray(value, "f4")
        assert leaf.dtype == np.dtype(dtype) and leaf.shape == value.shape
        np.testing.assert_allclose(leaf.whole().astype("f4"), value, **tolerance)
        part = tuple(slice(size // 2, size) for size in value.shape)
        np.testing.assert_allclose(leaf.read(part).astype("f4"), value[part], **tolerance)

    jax.tree.map(same, stored, wanted)
    up, wanted_up = (
        tree["layers" if scan_layers else "layers_0"]["mlp"]["up"] for tree in (precise, unrounded)
    )
    assert up.dtype == np.float32
    np.testing.assert_allclose(up.whole(), wanted_up, atol=1e-6)


def test_plain_parameters_pass_through():
    base = base_params()
    assert lora.init(LoraConfig(), jax.random.key(0), base, jnp.float32) is base
    assert lora.split(base) == (base, {}) and lora.combine(base, {}) is base
    assert lora.beside(base) is base and lora.merge_lazy(base) is base and lora.base_of(base) is base


@pytest.mark.parametrize("scan_layers", [False, True])
def test_adapters_lie_as_their_kernels_do(scan_layers):
    model = Transformer(MODEL, scan_layers=scan_layers)

    def init():
        params = model.init(jax.random.key(0), TOKENS, POSITIONS)["params"]
        return lora.init(LoraConfig(rank=3), jax.random.key(0), params, jnp.bfloat16)

    boxed = jax.eval_shape(init)
    specs = jax.tree.map(lambda s: s.spec, sharding.layout(boxed, make_mesh(MeshConfig(2, 2, 2))).shardings)
    layer = specs["lora"]["layers" if scan_layers else "layers_0"]
    first = (None,) if scan_layers else ()
    assert layer["attention"]["q"] == {"a": P(*first, "fsdp", None), "b": P(*first, None, "tensor", None)}
    assert layer["attention"]["o"] == {"a": P(*first, "tensor", None, None), "b": P(*first, None, "fsdp")}
    assert layer["mlp"]["up"] == {"a": P(*first, "fsdp", None), "b": P(*first, None, "tensor")}
    assert layer["mlp"]["down"] == {"a": P(*first, "tensor", None), "b": P(*first, None, "fsdp")}
    assert {leaf.dtype for leaf in jax.tree.leaves(boxed["base"])} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(boxed["lora"])} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": -1}, "rank must be at least 0, got -1"),
        ({"alpha": 0}, "alpha must be above 0, got 0"),
        ({"targets": ()}, "targets must be some of q, k, v, o, gate, up, down, got ()"),
        ({"targets": ("q_proj",)}, "targets must be some of q, k, v, o, gate, up, down, got ('q_proj',)"),
    ],
)
def test_settings_that_make_no_sense(fields, message):
    with pytest.raises(ValueError) as error:
        LoraConfig(**fields)
    assert str(error.value) == message
