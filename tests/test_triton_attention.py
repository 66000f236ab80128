"""The decoding kernel, interpreted, against the dense reference: by itself, in a model, on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from whole_params import stack_layers

from refusion_jax import sharding
from refusion_jax.model.attention import attend, attend_visible, fitting_decode_kernel
from refusion_jax.model.kernels.visible import visible
from refusion_jax.model.transformer import ModelConfig, Ragged, Transformer
from refusion_jax.sharding import MeshConfig, make_mesh
from refusion_jax.weights.fused import fuse_projections

CONFIG = ModelConfig(40, 2, 16, 4, 2, 16, 24, rope_theta=1e4)
CLOSE = {"rtol": 0, "atol": 1e-5}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_mask(B: int, T: int, filled: np.ndarray) -> np.ndarray:
    """bool [B, T, S + T]: random filled entries and random tokens fed; one query sees nothing."""
    random = np.random.default_rng(1)
    fed = np.tril(np.ones((T, T), bool)) & (random.random((B, T, T)) < 0.8)
    cached = filled[:, None] & (random.random((B, T, filled.shape[1])) < 0.9)
    mask = np.concatenate([cached, fed], axis=2)
    mask[:, T // 2] &= T == 1
    return mask


@jax.jit
def kernel(qkv, cache, mask):
    return attend_visible(qkv, cache, 1, visible(jnp.asarray(mask), qkv.shape[3] - 2))


@pytest.mark.parametrize(
    ("B", "T", "S", "K", "G"),
    [
        (1, 1, 100, 2, 4),  # AR decoding
        (3, 8, 128, 1, 2),
        (3, 33, 200, 2, 3),  # heads and tokens that do not fill a tile
        (1, 128, 64, 2, 4),  # more than a tile of queries
        (1, 70, 0, 1, 1),  # a prompt
    ],
)
def test_the_kernel_is_the_reference(B, T, S, K, G):
    H, L = 16, 2
    qkv, (keys, values) = normal(B, T, K, G + 2, H), normal(2, L, B, S, K, H, seed=2)
    filled = np.random.default_rng(3).random((B, S)) < 0.7
    filled[:, S // 2 :] = False
    mask = random_mask(B, T, filled)
    zeros = [np.where(filled[..., None, None], x, 0) for x in (keys, values)]
    # Unfilled entries have no influence, whatever they hold.
    rubbish = [np.where(filled[..., None, None], x, y) for x, y in ((keys, 1e15), (values, np.nan))]
    found = kernel(qkv, tuple(rubbish) if S else None, mask)
    q, k, v = qkv[..., :G, :].reshape(B, T, K * G, H), qkv[..., G, :], qkv[..., G + 1, :]
    wanted = attend(q, (k, v), tuple(x[1] for x in zeros) if S else None, mask).reshape(found.shape)
    assert np.isfinite(found).all()
    sees = mask.any(2)
    np.testing.assert_allclose(found[sees], wanted[sees], **CLOSE)


def params_of(config: ModelConfig):
    """Random parameters of the plain model, and boxed shapes of the fused model."""
    nothing = jnp.zeros((1, 1), jnp.int32)

    def shapes(model):
        return jax.eval_shape(model.init, jax.random.key(0), nothing, nothing)["params"]

    random = np.random.default_rng(4)
    params = jax.tree.map(
        lambda leaf: (0.3 * random.normal(size=leaf.shape)).astype(np.float32),
        sharding.unbox(shapes(Transformer(config))),
    )
    return params, shapes(Transformer(config, fused=True))


PARAMS, _ = params_of(CONFIG)
FUSED = fuse_projections(PARAMS)


@functools.partial(jax.jit, static_argnames="model")
def hidden(model, params, tokens, positions, cache=None, mask=None, rows=None):
    return model.apply({"params": params}, tokens, positions, cache, mask, ragged=rows, method="hidden")


def assert_agree(found, wanted, **close):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, **(close or {"rtol": 0, "atol": 3e-5}))


def fed_twice(model, params, B: int = 3, T: int = 6):
    """A prompt without a mask, then six tokens with a mask and a cache of the prompt."""
    random = np.random.default_rng(5)
    tokens = random.integers(0, 40, (B, 2 * T))
    positions = np.stack([random.permutation(2 * T) for _ in range(B)])
    first, cache = hidden(model, params, tokens[:, :T], positions[:, :T])
    mask = random_mask(B, T, np.ones((B, T), bool)) | (np.arange(2 * T) < 2)
    return first, cache, hidden(model, params, tokens[:, T:], positions[:, T:], cache, mask)


@pytest.fixture(scope="module")
def plain():
    return fed_twice(Transformer(CONFIG), PARAMS)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_model_with_the_kernel_is_the_dense_one(plain, scan_layers):
    model = Transformer(CONFIG, kernel="triton", fused=True, scan_layers=scan_layers)
    assert_agree(fed_twice(model, stack_layers(FUSED) if scan_layers else FUSED), plain)


def test_the_kernel_takes_separate_projections(plain):
    assert_agree(fed_twice(Transformer(CONFIG, kernel="triton"), PARAMS), plain)


@pytest.mark.parametrize("kernel_name", ["dense", "triton"])
def test_ragged_rows_are_rows_by_themselves(kernel_name):
    """Rows of 5, 1, 0 and 3 tokens as one shuffled sequence, against the same rows padded to 5."""
    model = Transformer(CONFIG, kernel=kernel_name, fused=True)
    lengths, T, S = [5, 1, 0, 3], 5, 7
    B, N = len(lengths), sum(lengths)
    random = np.random.default_rng(6)
    tokens, positions = random.integers(0, 40, (B, T)), random.integers(0, 60, (B, T))
    cache = tuple(normal(2, 2, B, S, 2, 16, seed=7))
    real = np.arange(T) < np.asarray(lengths)[:, None]
    mask = random_mask(B, T, np.ones((B, S), bool)) | (np.arange(S + T) < 1)
    mask[:, :, S:] &= real[:, None]
    order = random.permutation(N)
    row, place = (x[order] for x in np.nonzero(real))
    flat = np.full((B, T), N)
    flat[row, place] = np.arange(N)
    rows = Ragged(*(jnp.asarray(x, jnp.int32) for x in (flat, row, place)))
    x, fresh = hidden(model, FUSED, tokens[row, place][None], positions[row, place][None], cache, mask, rows)
    wanted, kv = hidden(Transformer(CONFIG), PARAMS, tokens, positions, cache, mask)
    assert x.shape == (1, N, 16) and fresh[0].shape == (2, 1, N, 2, 16)
    assert_agree(x[0], wanted[row, place])
    assert_agree([part[:, 0] for part in fresh], [part[:, row, place] for part in kv])


@pytest.mark.parametrize("kernel_name", ["dense", "triton"])
@pytest.mark.parametrize("heads", [(4, 2), (9, 3)], ids=["heads split", "heads whole"])
@pytest.mark.parametrize("sizes", [(1, 1, 2), (2, 2, 2)], ids=str)
def test_on_a_mesh(heads, kernel_name, sizes):
    """Tensor parallel: logits are those of one device, also where the mesh divides neither heads nor rows."""
    config = ModelConfig(40, 2, 16, *heads, 16, 24, rope_theta=1e4)
    params, boxed = params_of(config)
    wanted = fed_twice(Transformer(config), params)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    layout = sharding.layout(boxed, mesh)
    spread = jax.device_put(fuse_projections(params), layout.shardings)
    qkv = spread["layers_0"]["attention"]["qkv"]
    assert qkv.addressable_shards[0].data.shape[1] == heads[1] // (2 if heads[1] % 2 == 0 else 1)

    class Scoped(Transformer):
        def hidden(self, *args, **kwargs):
            with layout.scope():
                return super().hidden(*args, **kwargs)

    assert_agree(fed_twice(Scoped(config, kernel=kernel_name, fused=True), spread), wanted)


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "kernel_name"),
    [
        ("gpu", jnp.bfloat16, 128, "triton"),
        ("gpu", jnp.bfloat16, 96, "dense"),
        ("gpu", jnp.float32, 128, "dense"),
        ("tpu", jnp.bfloat16, 128, "dense"),
        ("cpu", jnp.bfloat16, 128, "dense"),
    ],
)
def test_what_fits(platform, dtype, head_dim, kernel_name):
    assert fitting_decode_kernel(platform, jnp.dtype(dtype), head_dim) == kernel_name


@pytest.mark.parametrize("T", [1, 32, 512])
def test_it_lowers_for_a_gpu(T, monkeypatch):
    """Lowering without a GPU, up to the code that its compiler gets."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    spec, half = jax.ShapeDtypeStruct, jnp.bfloat16
    cache = (spec((36, 1, 1024, 8, 128), half),) * 2
    arguments = spec((1, T, 8, 6, 128), half), cache, spec((1, T, 1024 + T), bool)

    def lowered(qkv, cache, mask):
        return attend_visible(qkv, cache, 35, visible(mask, 4))

    try:
        text = jax.jit(lowered).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as e:
        pytest.skip(f"this JAX lowers for a GPU only where there is one: {e}")
    assert text.count("triton") >= 1
