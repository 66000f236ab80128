"""int8 weights: quantisation, models with them, and the Triton kernel in interpret mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refusion_jax import sharding
from refusion_jax.loader import boxed_params
from refusion_jax.model.kernels import triton_int8
from refusion_jax.model.transformer import ModelConfig, Transformer
from refusion_jax.sharding import MeshConfig, make_mesh
from refusion_jax.weights.fused import fuse_projections
from refusion_jax.weights.lazy import LazyArray, load_to_devices
from refusion_jax.weights.quantized import LARGEST, MATRICES, quantize

CONFIG = ModelConfig(40, 2, 16, 4, 2, 8, 24, rope_theta=1e4)


def params_of(config: ModelConfig):
    random = np.random.default_rng(0)
    shapes = sharding.unbox(boxed_params(Transformer(config)))
    return jax.tree.map(lambda leaf: (0.3 * random.normal(size=leaf.shape)).astype(np.float32), shapes)


def restored(params):
    """Dequantised parameters."""
    found = {}
    for name, leaf in params.items():
        if isinstance(leaf, dict):
            found[name] = restored(leaf)
        elif name in MATRICES:
            n = MATRICES[name]
            scale = np.asarray(params[f"{name}_scale"])
            scale = scale.reshape(*scale.shape, *(1,) * n)
            found[name] = np.moveaxis(np.asarray(leaf, np.float32) * scale, range(-n, 0), range(n))
        elif not name.endswith("_scale"):
            found[name] = leaf
    return found


PARAMS = params_of(CONFIG)


def on_disk(params, reads: list | None = None):
    """Parameters as LazyArrays; `reads` collects the sizes that are read."""

    def stored(leaf: np.ndarray) -> LazyArray:
        def read(index) -> np.ndarray:
            part = leaf[index]
            if reads is not None:
                reads.append(part.size)
            return part

        return LazyArray(leaf.shape, leaf.dtype, read, "a file")

    return jax.tree.map(stored, params)


def test_each_output_channel_has_its_scale():
    made = quantize(PARAMS)
    layer, mlp = made["layers_1"]["attention"], made["layers_1"]["mlp"]
    assert layer["o"].shape == (16, 4, 8) and layer["o_scale"].shape == (16,)
    assert layer["k"].shape == (2, 8, 16) and layer["k_scale"].shape == (2, 8)
    assert mlp["down"].shape == (16, 24) and made["head_scale"].shape == (40,)
    np.testing.assert_array_equal(made["embedding"], PARAMS["embedding"])

    def check(path, found, wanted):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=np.abs(wanted).max() / LARGEST / 2 + 1e-7)

    jax.tree_util.tree_map_with_path(check, restored(made), PARAMS)
    # The error is at most half a step of the channel's scale, and the largest value of a channel is 127.
    o, scale = np.asarray(layer["o"], np.float32), np.asarray(layer["o_scale"])[:, None, None]
    wanted = np.moveaxis(PARAMS["layers_1"]["attention"]["o"], 2, 0)
    assert (np.abs(o * scale - wanted) <= scale / 2 * (1 + 1e-5)).all()
    assert (np.abs(o).max((1, 2)) == LARGEST).all()


def test_a_channel_of_zeros_stays_so():
    head = np.zeros((3, 2), np.float32)
    head[:, 1] = [1, -2, 0.5]
    made = quantize({"head": head})
    np.testing.assert_array_equal(made["head"], [[0, 0, 0], [64, -127, 32]])
    assert np.isfinite(made["head_scale"]).all()


def close(found, wanted):
    """Equal up to the rounding of ties: XLA multiplies by 1 / 127, NumPy divides by 127."""
    assert found.dtype == wanted.dtype
    found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1.0 if found.max() > 100 else 0)
    assert np.isclose(found, wanted, rtol=1e-6, atol=0).mean() > 0.9


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_read_is_quantised_on_the_way(tied):
    """The same values as from arrays, sharded over a mesh."""
    config = ModelConfig(40, 2, 16, 4, 2, 8, 24, tie_embeddings=tied, qkv_bias=True)
    params, mesh = params_of(config), make_mesh(MeshConfig(2, 1, 4))
    wanted = quantize(fuse_projections(params))
    boxed = boxed_params(Transformer(config, fused=True, int8=True))
    abstract = sharding.with_shardings(sharding.unbox(boxed), sharding.layout(boxed, mesh).shardings)
    found = load_to_devices(quantize(fuse_projections(on_disk(params))), abstract)
    jax.tree.map(close, found, wanted)
    assert ("head" in found) != tied
    assert found["layers_0"]["mlp"]["gate_up"].addressable_shards[0].data.shape == (2, 6, 16)


def test_no_more_is_read_than_the_outputs_asked_for():
    reads = []
    made = quantize(on_disk({"down": PARAMS["layers_0"]["mlp"]["down"]}, reads))
    part = made["down"].read((slice(4, 8), slice(None)))
    assert part.shape == (4, 24) and set(reads) == {4 * 24}
    count = len(reads)
    assert made["down_scale"].read((slice(4, 8),)).shape == (4,) and len(reads) == count


@pytest.mark.parametrize("joined", [False, True])
def test_a_model_computes_with_what_they_stand_for(joined):
    made = quantize(fuse_projections(PARAMS) if joined else PARAMS)
    plain = restored(made)
    tokens = np.random.default_rng(1).integers(0, 40, (2, 7))
    positions = np.broadcast_to(np.arange(7), (2, 7))
    logits, kv = jax.jit(Transformer(CONFIG, fused=joined, int8=True).apply)(
        {"params": made}, tokens, positions
    )
    wanted, wanted_kv = jax.jit(Transformer(CONFIG, fused=joined).apply)({"params": plain}, tokens, positions)
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), kv, wanted_kv)


# The kernel.


@pytest.mark.parametrize(("N", "D", "F"), [(1, 256, 200), (33, 128, 128), (64, 1024, 384)])
def test_the_kernel_is_a_matrix_product(N, D, F):
    random = np.random.default_rng(2)
    x = jnp.asarray(random.normal(size=(N, D)), jnp.bfloat16)
    matrix = random.integers(-127, 128, (F, D)).astype(np.int8)
    assert triton_int8.fits(x, matrix)
    found = jax.jit(lambda x, m: triton_int8.product(x, m, interpret=True))(x, matrix)
    wanted = np.asarray(x, np.float32) @ matrix.T.astype(np.float32)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3 * np.sqrt(D))


def test_where_the_kernel_does_not_fit():
    x, matrix = jnp.zeros((8, 128), jnp.bfloat16), jnp.zeros((16, 128), jnp.int8)
    assert triton_int8.fits(x, matrix)
    assert not triton_int8.fits(x.astype(jnp.float32), matrix)
    assert not triton_int8.fits(jnp.zeros((65, 128), jnp.bfloat16), matrix)
    assert not triton_int8.fits(x[:, :96], matrix[:, :96])


def test_a_model_with_the_kernel_is_one_without():
    config = ModelConfig(150, 1, 128, 4, 2, 32, 128)
    made = quantize(fuse_projections(params_of(config)), rest=jnp.bfloat16)
    model = Transformer(config, jnp.bfloat16, jnp.bfloat16, kernel="triton", fused=True, int8=True)
    tokens = np.random.default_rng(3).integers(0, 150, (1, 5))
    positions = np.arange(5)[None]
    found, _ = jax.jit(model.apply)({"params": made}, tokens, positions)
    wanted, _ = jax.jit(model.clone(kernel="dense").apply)({"params": made}, tokens, positions)
    assert found.dtype == jnp.float32  # logits come out of the product in float32
    error = np.asarray(found - wanted, np.float32)
    assert np.linalg.norm(error) < 0.02 * np.linalg.norm(np.asarray(wanted, np.float32))


@pytest.mark.parametrize("N", [1, 64])
def test_it_lowers_for_a_gpu(N):
    """Without a GPU, up to the code that its compiler would get."""
    spec = jax.ShapeDtypeStruct
    program = jax.jit(lambda x, matrix: triton_int8.product(x, matrix, interpret=False))
    traced = program.trace(spec((N, 4096), jnp.bfloat16), spec((151671, 4096), jnp.int8))
    try:
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as e:
        pytest.skip(f"this JAX lowers for a GPU only where there is one: {e}")
    assert "triton" in text
