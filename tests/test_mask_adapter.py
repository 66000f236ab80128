"""Adapters for mask tokens only: clean tokens get what the base computes, to the bit; masks are adapted.

Two programs may round differently, since XLA fuses each in its own way. So bits are compared with the base's
operation by operation, without jit, and between different adapters in one compiled program.
"""

import dataclasses
import functools

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from whole_params import merge_adapters, stack_layers

from refusion_jax import sharding
from refusion_jax.decode.forward import ragged_layout
from refusion_jax.diffusion import slot_diffusion
from refusion_jax.diffusion.slot_diffusion import DiffusionConfig
from refusion_jax.model.adapter import Adapter
from refusion_jax.model.transformer import ModelConfig, Transformer
from refusion_jax.weights import fused, lora, quantized
from refusion_jax.weights.lora import LoraConfig

MASK = 63
CONFIG = ModelConfig(64, 2, 16, 4, 2, 8, 24)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)
LORA = LoraConfig(rank=3, alpha=6, only_masks=True)
ADAPTER = Adapter(3, 2.0, LORA.targets, MASK)


@functools.cache
def learned(config: ModelConfig = CONFIG):
    """The parameters of an adapted model that has learned something."""
    nothing = jnp.zeros((1, 1), jnp.int32)
    boxed = jax.eval_shape(Transformer(config).init, jax.random.key(0), nothing, nothing)["params"]
    random = np.random.default_rng(0)

    def values(x):
        return random.normal(size=x.shape, scale=0.3).astype("f4")

    params = lora.init(
        LORA, jax.random.key(0), jax.tree.map(values, sharding.unbox(boxed)), jnp.float32, MASK
    )
    np.testing.assert_array_equal(params["lora"]["mask_embedding"], params["base"]["embedding"][MASK])
    return params | {"lora": jax.tree.map(values, params["lora"])}


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, *arguments, **keywords):
    return model.apply({"params": params}, *arguments, **keywords)


def assert_untouched(model, prepared, params, clean, masked, *fed):
    """Asserts that the logits of clean tokens are those of the base, and that those of masks are not.

    Args:
      model: the Transformer without adapters.
      prepared: function from unfused parameters to those of the model.
      params: tree of an adapted model.
      clean, masked: bool, the tokens that see no mask, and the masks, in the layout of the tokens fed.
      fed: arguments of the model.
    """
    gated, base = model.clone(adapter=ADAPTER), prepared(params["base"])
    found, _ = apply(gated, prepared(lora.beside(params)), *fed)
    wanted, _ = apply(model, base, *fed)
    exact = found.dtype == jnp.float32
    np.testing.assert_allclose(
        found[clean].astype("f4"), wanted[clean].astype("f4"), atol=1e-5 if exact else 0.1
    )
    assert (np.abs(found - wanted)[masked].max(-1) > 0.1).all()
    others = params | {"lora": jax.tree.map(jnp.zeros_like, params["lora"])}
    without, _ = apply(gated, prepared(lora.beside(others)), *fed)
    np.testing.assert_array_equal(without[clean], found[clean])
    if not model.scan_layers:
        found, kv = gated.apply({"params": prepared(lora.beside(params))}, *fed)
        wanted, base_kv = model.apply({"params": base}, *fed)
        np.testing.assert_array_equal(found[clean], wanted[clean])
        for ours, theirs in zip(kv, base_kv, strict=True):
            np.testing.assert_array_equal(ours[:, clean], theirs[:, clean])


def training_rows():
    """Two packed rows of two examples each, slots permuted, masks last in each example."""
    random = np.random.default_rng(1)
    batch = {
        "tokens": random.integers(0, MASK, (2, 48)).astype("i4"),
        "prompt_len": np.array([[5, 3], [1, 8]], "i4"),
        "total_len": np.array([[22, 20], [19, 24]], "i4"),
        "example_id": np.arange(4, dtype="i4").reshape(2, 2),
    }
    return slot_diffusion.corrupt(jax.random.key(3), batch, DiffusionConfig((4,)), MASK)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [CONFIG, TIED])
def test_clean_tokens_of_training_rows(config, dtype, scan_layers):
    noised, params = training_rows(), learned(config)
    params = params | {"base": jax.tree.map(lambda x: x.astype(dtype), params["base"])}
    if scan_layers:
        params = params | {name: stack_layers(params[name]) for name in ("base", "lora")}
    model = Transformer(config, jnp.dtype(dtype), scan_layers=scan_layers, max_segments=3)
    clean = np.asarray(noised.tokens) != MASK
    assert 20 < clean.sum() < 90
    fed = noised.tokens, noised.positions, None, None, noised.segments
    assert_untouched(model, lambda params: params, params, clean, ~clean, *fed)


@pytest.mark.parametrize("config", [CONFIG, TIED])
def test_masks_are_read_by_the_merged_model(config):
    """Clean tokens through the base, then masks after their cache through W + scale * A B."""
    params, model = learned(config), Transformer(config)
    tokens = np.concatenate([np.arange(10, 19), np.full(5, MASK)])[None].astype("i4")
    positions = np.array([[0, 1, 2, 7, 8, 9, 3, 4, 5, 10, 11, 12, 6, 13]], "i4")
    found, _ = apply(model.clone(adapter=ADAPTER), lora.beside(params), tokens, positions)
    clean = 9
    wanted, cache = apply(model, params["base"], tokens[:, :clean], positions[:, :clean])
    np.testing.assert_allclose(found[:, :clean], wanted, atol=1e-5)
    # A tied head stays the base's: give the merged model a head of its own beside the changed embedding.
    untied, merged = dataclasses.replace(config, tie_embeddings=False), merge_adapters(params)
    embedding = np.array(params["base"]["embedding"])
    head = merged.get("head", embedding.T.copy())
    embedding[MASK] = params["lora"]["mask_embedding"]
    mask = np.concatenate([np.ones((5, clean), bool), np.tri(5, dtype=bool)], axis=1)[None]
    wanted, _ = apply(
        Transformer(untied),
        merged | {"embedding": embedding, "head": head},
        tokens[:, clean:],
        positions[:, clean:],
        cache,
        mask,
    )
    np.testing.assert_allclose(found[:, clean:], wanted, atol=2e-4)


def decode_pass(kernel="dense"):
    """A pass after a cache: two rows, ragged, verified drafts and masks that ride along in one."""
    random = np.random.default_rng(2)
    active = np.array([[True] * 6 + [False] * 2, [True] * 8])
    tokens = random.integers(0, MASK, (2, 8)).astype("i4")
    tokens[0, 3:6] = tokens[1, 5:] = MASK
    positions = np.arange(4, 12, dtype="i4") + np.zeros((2, 1), "i4")
    cache = tuple(random.normal(size=(2, 2, 4, 2, 8)).astype("f4") for _ in range(2))
    # Drafts see the cache and the drafts before them; masks see all of these and the masks before them.
    mask = np.concatenate([np.ones((2, 8, 4), bool), np.tri(8, dtype=bool) & active[:, None]], axis=2)
    ragged = ragged_layout(jnp.asarray(active))
    fed = (x[ragged.row.clip(0, 1), ragged.place][None] for x in (tokens, positions))
    return (*fed, cache, mask, None, ragged), active.sum()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("joined", [False, True])
def test_a_pass_that_mixes_drafts_and_masks(joined, int8):
    (tokens, *rest), num = decode_pass()
    params = learned()
    model = Transformer(CONFIG, fused=joined, int8=int8)

    def prepared(params):
        params = fused.fuse_projections(params) if joined else params
        return quantized.quantize(params) if int8 else params

    fed = np.arange(tokens.shape[1]) < num
    clean = (tokens != MASK) & fed
    assert clean.sum() == 8 and (~clean & fed).sum() == 6
    assert_untouched(model, prepared, params, clean, ~clean & fed, tokens, *rest)
    found, _ = apply(model.clone(adapter=ADAPTER), prepared(lora.beside(params)), tokens, *rest)
    # The same adapters beside a plain model with the values that int8 stands for.
    plain = params["base"] if not int8 else dequantized(quantized.quantize(params["base"]))
    wanted, _ = apply(
        Transformer(CONFIG, adapter=ADAPTER), lora.beside(params | {"base": plain}), tokens, *rest
    )
    np.testing.assert_allclose(found[0, fed], wanted[0, fed], atol=1e-4)


def dequantized(params):
    found = {}
    for name, leaf in params.items():
        if isinstance(leaf, dict):
            found[name] = dequantized(leaf)
        elif f"{name}_scale" in params:
            num_in = quantized.MATRICES[name]
            scale = params[f"{name}_scale"]
            matrix = np.asarray(leaf, "f4") * np.asarray(scale).reshape(*scale.shape, *(1,) * num_in)
            found[name] = np.moveaxis(matrix, range(-num_in, 0), range(num_in))
        elif not name.endswith("_scale"):
            found[name] = leaf
    return found


def test_the_autoregressive_loss_has_no_gradient():
    """So leaving it out of training changes nothing; and L_diff has one in A, B and the mask's embedding."""
    noised, params = training_rows(), learned()
    trained, frozen = lora.split(params)
    model = Transformer(CONFIG, adapter=ADAPTER)

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(trained, part):
        def loss(trained):
            beside = lora.beside(lora.combine(trained, frozen))
            fed = noised.tokens, noised.positions
            logits, _ = model.apply({"params": beside}, *fed, segments=noised.segments)
            return slot_diffusion.loss(logits, noised)[1][part]

        return jax.grad(loss)(trained)

    assert noised.ar_weights.sum() > 0
    for leaf in jax.tree.leaves(gradients(trained, "ar_loss")):
        np.testing.assert_array_equal(leaf, 0)
    for leaf in jax.tree.leaves(gradients(trained, "diffusion_loss")):
        assert np.abs(leaf).max() > 0 and np.isfinite(leaf).all()


def test_a_whole_decode():
    """The fused model with a cache against the plain transcription, which feeds the unfused one anew."""
    nothing = jnp.zeros((1, 1), jnp.int32)
    adapter = dataclasses.replace(ADAPTER, mask_id=decoding.MASK)
    model = Transformer(decoding.CONFIG, adapter=adapter)
    boxed = jax.eval_shape(model.init, jax.random.key(0), nothing, nothing)["params"]
    random = np.random.default_rng(5)
    extra = {
        path: random.normal(size=leaf.shape, scale=0.2).astype("f4")
        for path, leaf in flatten_dict(sharding.unbox(boxed)).items()
        if "_lora_" in path[-1] or path == ("mask_embedding",)
    }
    params = unflatten_dict(flatten_dict(decoding.PARAMS) | extra)
    cases = decoding.eventful_batch()
    forward = decoding.Whole(model, params, decoding.SHAPE.prompt + decoding.SHAPE.gen)
    plain = [decoding.transcribed(case, forward) for case in cases]
    ours = decoding.sample(cases, model.clone(fused=True), fused.fuse_projections(params), decoding.AHEAD)
    compared = 0
    for case, samples, wanted in zip(cases, ours, plain, strict=True):
        if wanted.margin >= decoding.CLOSE_CALL:
            compared += 1
            assert decoding.raw_ids(samples) == wanted.in_text_order(len(case.prompt))[0]
            assert int(samples.num_iterations) == len(wanted.steps)
    assert compared >= 6
    without = [decoding.transcribed(case) for case in cases]
    assert [a.tokens for a in without] != [b.tokens for b in plain]
