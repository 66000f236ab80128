"""Shardings on 8 simulated devices, and of the full-size model without allocating it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from refusion_jax import sharding
from refusion_jax.data.pipeline import DataConfig
from refusion_jax.diffusion.slot_diffusion import DiffusionConfig
from refusion_jax.errors import BadInput
from refusion_jax.model.transformer import ModelConfig, Transformer
from refusion_jax.sharding import MeshConfig, make_mesh
from refusion_jax.training.optimizer import OptimizerConfig
from refusion_jax.training.run import RunConfig, TrainConfig
from refusion_jax.training.step import make_program

THREE_KV_HEADS = ModelConfig(256, 1, 16, 9, 3, 4, 32)


def boxed_params(config: ModelConfig, scan_layers: bool = False):
    model = Transformer(config, scan_layers=scan_layers)
    nothing = jnp.zeros((1, 1), jnp.int32)
    return model, jax.eval_shape(lambda: model.init(jax.random.key(0), nothing, nothing)["params"])


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), (2, 2, 2)),
        (MeshConfig(data=1, fsdp=2, tensor=-1), (1, 2, 4)),
        (MeshConfig(data=2, fsdp=4, tensor=1), (2, 4, 1)),
    ],
)
def test_mesh_takes_all_devices(config, shape):
    mesh = make_mesh(config)
    assert tuple(mesh.shape.values()) == shape
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize("sizes", [(3, 1, -1), (2, 2, 4), (1, 1, 1), (-1, 16, 1)])
def test_mesh_that_does_not_fit_the_devices(sizes):
    with pytest.raises(BadInput, match="8 available devices"):
        make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 1, 1), (-2, 1, 1)])
def test_mesh_sizes_that_make_no_sense(sizes):
    with pytest.raises(ValueError, match="-1"):
        MeshConfig(*sizes)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_every_array_of_an_8b_training_state_is_split(scan_layers):
    run = RunConfig(
        ModelConfig.qwen3_8b(),
        DataConfig(),
        TrainConfig(steps=1, batch_size=8, save_every=1, log_every=1, scan_layers=scan_layers),
        DiffusionConfig(),
        OptimizerConfig(),
        MeshConfig(2, 2, 2),
    )
    state = make_program(run, make_mesh(run.mesh), mask_id=0).state
    params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert params == 8_190_735_360
    held = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        assert isinstance(leaf.sharding, jax.sharding.NamedSharding), path
        shard = math.prod(leaf.sharding.shard_shape(leaf.shape))
        # Only norms over heads (128 numbers per layer) and counters may be replicated.
        assert shard < leaf.size or leaf.size <= 36 * 128, path
        held += shard
    # fsdp x tensor = 4 shards of the parameters and of both moments of Adam.
    assert held == pytest.approx(3 * params / 4, rel=1e-3)


def test_specs_of_one_layer():
    _, boxed = boxed_params(ModelConfig.tiny())
    specs = jax.tree.map(lambda s: s.spec, sharding.layout(boxed, make_mesh(MeshConfig(2, 2, 2))).shardings)
    assert specs["embedding"] == P("tensor", "fsdp")
    layer = specs["layers_0"]
    assert layer["attention"]["q"] == layer["attention"]["k"] == P("fsdp", "tensor", None)
    assert layer["attention"]["o"] == P("tensor", None, "fsdp")
    assert layer["mlp"]["up"] == P("fsdp", "tensor")
    assert layer["mlp"]["down"] == P("tensor", "fsdp")
    assert layer["mlp_norm"]["scale"] == P("fsdp")


def test_an_axis_that_the_mesh_does_not_divide_stays_whole():
    _, boxed = boxed_params(THREE_KV_HEADS)
    layout = sharding.layout(boxed, make_mesh(MeshConfig(2, 2, 2)))
    attention = layout.shardings["layers_0"]["attention"]
    assert attention["k"].spec == P("fsdp", None, None)
    assert attention["q"].spec == P("fsdp", None, None)  # nor do nine heads over two devices
    assert layout.shardings["layers_0"]["mlp"]["up"].spec == P("fsdp", "tensor")
    rules = dict(layout.rules)
    assert rules["act_kv_heads"] is rules["act_heads"] is None
    assert rules["act_mlp"] == "tensor"


@pytest.mark.parametrize("config", [ModelConfig.tiny(), THREE_KV_HEADS])
def test_the_forward_pass_is_split_and_unchanged(config):
    """Constraints reach the compiler (without a mesh in scope they are silently ignored)."""
    config = dataclasses.replace(config, num_layers=1)
    model, boxed = boxed_params(config)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    layout = sharding.layout(boxed, mesh)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: random.normal(size=p.shape, scale=0.1).astype("f4"), sharding.unbox(boxed)
    )
    tokens = random.integers(0, 256, (4, 8), "i4")
    positions = np.broadcast_to(np.arange(8), (4, 8))

    def forward(params, tokens):
        with layout.scope():
            return model.apply({"params": params}, tokens, positions)[0]

    rows = sharding.batch_sharding(mesh)
    split = jax.jit(forward, in_shardings=(layout.shardings, rows), out_shardings=rows)
    text = split.lower(params, tokens).as_text()
    constraints = [line for line in text.splitlines() if "sharding_constraint" in line]
    assert any('"tensor"' in line and '"data"' in line for line in constraints)
    plain = jax.jit(lambda params: model.apply({"params": params}, tokens, positions)[0])(params)
    logits = split(jax.device_put(params, layout.shardings), jax.device_put(tokens, rows))
    assert logits.addressable_shards[0].data.shape[0] == 1
    assert jnp.allclose(logits, plain, atol=1e-5)


def test_rows_of_a_batch():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    assert sharding.batch_shards(mesh) == 4
    assert sharding.row_group(mesh) == (0, 1)
    batch = jax.device_put(jnp.arange(8), sharding.batch_sharding(mesh))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2,)}
    parts = jax.device_put(jnp.zeros((3, 8)), sharding.batch_sharding(mesh, leading=1))
    assert {shard.data.shape for shard in parts.addressable_shards} == {(3, 2)}
