"""The transformer: sizes, switches, cache and positions, on a tiny random model."""

import dataclasses
import functools
import itertools
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from whole_params import stack_layers, unstack_layers

from refusion_jax.decode.kv_cache import KVCache
from refusion_jax.model.attention import attend
from refusion_jax.model.rope import apply_rope, rope_tables
from refusion_jax.model.transformer import REMAT_POLICIES, ModelConfig, Transformer, exact_matmuls
from refusion_jax.sharding import unbox

TINY = ModelConfig(
    vocab_size=37,
    num_layers=2,
    embed_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=40,
    rope_theta=1e4,
)
B, T = 2, 10
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (B, T), np.int32)
# In no order: attention must not depend on positions.
POSITIONS = np.stack([np.random.default_rng(seed).permutation(3 * T)[:T] for seed in (1, 2)]).astype(np.int32)
CAUSAL = np.tril(np.ones((1, T, T), bool))
CLOSE = {"rtol": 0, "atol": 2e-5}


def abstract_params(config: ModelConfig, **options):
    model, nothing = Transformer(config, **options), jnp.zeros((1, 1), jnp.int32)
    return unbox(jax.eval_shape(model.init, jax.random.key(0), nothing, nothing)["params"])


def random_params(config: ModelConfig):
    """Parameters that differ from the ones and zeros of initialisation; compiles nothing."""
    random = np.random.default_rng(3)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + 0.2 * random.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def jitted(model: Transformer):
    """params, tokens, positions, cache, mask -> logits, kv; compiled once per shape."""
    return jax.jit(lambda params, *args: model.apply({"params": params}, *args))


def names(params) -> set[str]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}


PARAMS = random_params(TINY)
MODEL = Transformer(TINY)
SCANNED = Transformer(TINY, scan_layers=True)
apply, apply_scanned = jitted(MODEL), jitted(SCANNED)


@pytest.fixture(scope="module")
def whole():
    """Logits, keys and values of TOKENS in one causal pass."""
    return jax.device_get(apply(PARAMS, TOKENS, POSITIONS))


# Sizes.


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (ModelConfig.smollm2_135m(), 134_515_008),
        (ModelConfig.qwen3_0p6b(), 596_049_920),
        (ModelConfig.qwen3_1p7b(), 1_720_574_976),
        (ModelConfig.qwen3_4b(), 4_022_468_096),
        (ModelConfig.qwen3_8b(), 8_190_735_360),
        (ModelConfig.qwen2p5_7b(), 7_615_616_512),
        # Qwen3-8B with 151936 - 151671 rows fewer in the table and in the head.
        (ModelConfig.refusion_8b(), 8_190_735_360 - 2 * 4096 * (151936 - 151671)),
    ],
    ids=["smollm2_135m", "qwen3_0p6b", "qwen3_1p7b", "qwen3_4b", "qwen3_8b", "qwen2p5_7b", "refusion_8b"],
)
def test_parameter_counts_are_the_published_ones(config, count):
    # Unrolled models of the same layers: test_scanned_layers_are_the_unrolled_ones.
    leaves = jax.tree.leaves(abstract_params(config, scan_layers=True))
    assert sum(leaf.size for leaf in leaves) == count
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def test_full_size_logits_and_cache_shapes():
    config = ModelConfig.qwen3_0p6b()
    model, params = Transformer(config, jnp.bfloat16, jnp.bfloat16), abstract_params(config)
    tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    logits, kv = jax.eval_shape(model.apply, {"params": params}, tokens, tokens)
    assert (logits.shape, logits.dtype) == ((2, 5, 151936), jnp.float32)
    assert [x.shape for x in kv] == [(28, 2, 5, 8, 128)] * 2
    cache = jax.eval_shape(lambda: KVCache.zeros(config, 1, 4096, jnp.bfloat16))
    num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))
    assert num_bytes == 28 * 2 * 4096 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"vocab_size": -1}, "vocab_size must be at least 1, got -1"),
        ({"embed_dim": 0}, "embed_dim"),
        ({"mlp_dim": 0}, "mlp_dim"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"head_dim": 7}, "head_dim must be even .* got 7"),
    ],
)
def test_impossible_configs(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize("change", [{"rope_theta": 0.0}, {"rope_theta": -1.0}, {"norm_eps": -1.0}], ids=str)
def test_configs_without_a_finite_logit(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(TINY, **change)


def test_unknown_remat_policy():
    with pytest.raises(KeyError, match="some"):
        abstract_params(TINY, remat="some")


# Switches.


@pytest.mark.parametrize(
    ("change", "extra", "gone"),
    [
        ({"qkv_bias": True}, {f"attention/{x}_bias" for x in "qkv"}, set()),
        ({"qk_norm": False}, set(), {f"attention/{x}_norm/scale" for x in "qk"}),
    ],
    ids=["qkv_bias", "no_qk_norm"],
)
def test_switches_of_a_layer_create_what_they_say(change, extra, gone):
    before, after = names(PARAMS), names(abstract_params(dataclasses.replace(TINY, **change)))
    layers = [f"layers_{i}/" for i in range(TINY.num_layers)]
    assert after - before == {layer + name for layer in layers for name in extra}
    assert before - after == {layer + name for layer in layers for name in gone}


def test_biases_are_used():
    config = dataclasses.replace(TINY, qkv_bias=True, qk_norm=False)
    biased, params = jitted(Transformer(config)), random_params(config)
    attention = params["layers_1"]["attention"]
    assert {x: attention[f"{x}_bias"].shape for x in "qkv"} == {"q": (4, 8), "k": (2, 8), "v": (2, 8)}
    before, _ = biased(params, TOKENS, POSITIONS)
    for x in "qkv":
        changed = attention | {f"{x}_bias": attention[f"{x}_bias"] + 1}
        layer = params["layers_1"] | {"attention": changed}
        after, _ = biased(params | {"layers_1": layer}, TOKENS, POSITIONS)
        assert np.abs(before - after).max() > 1e-2, x


def test_tied_head_is_the_table(whole):
    tied = dataclasses.replace(TINY, tie_embeddings=True)
    assert names(PARAMS) - names(abstract_params(tied)) == {"head"}
    params = {name: leaf for name, leaf in PARAMS.items() if name != "head"}
    ours, _ = jitted(Transformer(tied))(params, TOKENS, POSITIONS)
    same, _ = apply(PARAMS | {"head": PARAMS["embedding"].T.copy()}, TOKENS, POSITIONS)
    np.testing.assert_allclose(ours, same, **CLOSE)
    assert np.abs(ours - whole[0]).max() > 0.1


# Different computations of the same function.


def test_scanned_layers_are_the_unrolled_ones(whole):
    logits, kv = whole
    stacked = stack_layers(PARAMS)
    assert names(stacked) == names(abstract_params(TINY, scan_layers=True))
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked), PARAMS)
    scanned, scanned_kv = apply_scanned(stacked, TOKENS, POSITIONS)
    np.testing.assert_allclose(scanned, logits, **CLOSE)
    for ours, theirs in zip(scanned_kv, kv, strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)

    # The second half through a stacked cache of the first.
    half = T // 2
    cache = tuple(x[:, :, :half] for x in scanned_kv)
    second, _ = apply_scanned(stacked, TOKENS[:, half:], POSITIONS[:, half:], cache, CAUSAL[:, half:])
    np.testing.assert_allclose(second, logits[:, half:], **CLOSE)


@pytest.mark.parametrize("borders", [[0, 5, 10], [0, 1, 2, 6, 10]])
def test_pieces_through_a_cache_are_the_whole(whole, borders):
    logits, kv = whole
    cache = KVCache.zeros(TINY, B, T, jnp.float32)
    pieces = []
    for start, end in itertools.pairwise(borders):
        part = slice(start, end)
        filled = jnp.broadcast_to(cache.filled[:, None], (B, end - start, T))
        causal = np.broadcast_to(CAUSAL[:, : end - start, : end - start], (B, end - start, end - start))
        mask = jnp.concatenate([filled, causal], axis=-1)
        piece, fresh = apply(PARAMS, TOKENS[:, part], POSITIONS[:, part], cache.layers, mask)
        # This cache is indexed by the order fed.
        places = np.broadcast_to(np.arange(start, end), (B, end - start))
        cache = cache.commit(fresh, places, np.ones_like(places, bool))
        pieces.append(piece)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), logits, **CLOSE)
    assert cache.filled.all()
    for ours, theirs in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(kv), strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)


def test_a_cache_needs_a_mask():
    cache = KVCache.zeros(TINY, B, T, jnp.float32)
    with pytest.raises(ValueError, match="mask"):
        jax.eval_shape(apply, PARAMS, TOKENS, POSITIONS, cache.layers)


def test_commit_keeps_what_it_is_told_to(whole):
    _, fresh = whole
    keep = np.arange(T) % 2 == np.arange(B)[:, None]
    cache = jax.device_get(KVCache.zeros(TINY, B, 3 * T, jnp.float32).commit(fresh, POSITIONS, keep))
    for row in range(B):
        kept = POSITIONS[row][keep[row]]
        assert np.flatnonzero(cache.filled[row]).tolist() == sorted(kept.tolist())
        for buffer, new in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(fresh), strict=True):
            np.testing.assert_array_equal(buffer[:, row, kept], new[:, row][:, keep[row]])
            np.testing.assert_array_equal(buffer[:, row, ~cache.filled[row]], 0)


def test_masked_cache_entries_have_no_influence(whole):
    _, kv = whole
    hidden = np.arange(T) % 3 == 1
    mask = np.concatenate([np.broadcast_to(~hidden, (1, T, T)), CAUSAL], axis=-1)
    clean = apply(PARAMS, TOKENS, POSITIONS, kv, mask)
    for poison in (1e15, -1e15):
        poisoned = jax.tree.map(lambda x, v=poison: np.where(hidden[:, None, None], np.float32(v), x), kv)
        jax.tree.map(np.testing.assert_array_equal, apply(PARAMS, TOKENS, POSITIONS, poisoned, mask), clean)
    seen, _ = apply(PARAMS, TOKENS, POSITIONS, poisoned, np.ones_like(mask))
    assert not np.allclose(seen, clean[0], atol=1e-2), "the poison would not show"


def test_a_query_that_may_see_nothing_is_finite():
    blind = CAUSAL & (np.arange(T) != 3)[:, None]
    logits, kv = apply(PARAMS, TOKENS, POSITIONS, None, blind)
    assert all(np.isfinite(x).all() for x in (logits, *jax.tree.leaves(kv)))


# Order and positions.


def test_attention_is_causal_in_the_order_fed(whole):
    """Tokens fed later have no influence, although some of their positions come first."""
    before, _ = whole
    other, elsewhere = TOKENS.copy(), POSITIONS.copy()
    other[:, 6:] = (other[:, 6:] + 1) % TINY.vocab_size
    elsewhere[:, 6:] = elsewhere[:, 6:][:, ::-1]
    after, _ = apply(PARAMS, other, elsewhere)
    np.testing.assert_array_equal(after[:, :6], before[:, :6])
    assert np.abs(after - before)[:, 6:].max(axis=-1).min() > 1e-3


def test_permuting_tokens_with_their_positions_changes_who_sees_whom_and_nothing_else(whole):
    logits, _ = whole
    order = np.asarray([0, 4, 2, 7, 1, 8, 3, 6, 5, 9])
    tokens, positions = TOKENS[:, order], POSITIONS[:, order]
    permuted, _ = apply(PARAMS, tokens, positions)
    # The first token sees itself alone.
    np.testing.assert_allclose(permuted[:, 0], logits[:, 0], **CLOSE)
    assert np.abs(permuted - logits[:, order])[:, 1:-1].max(axis=(0, 2)).min() > 1e-3

    # With a mask permuted like the tokens, nothing changes.
    mask = np.random.default_rng(5).random((B, T, T)) < 0.5
    mask |= np.eye(T, dtype=bool)
    fed, _ = apply(PARAMS, TOKENS, POSITIONS, None, mask)
    moved, _ = apply(PARAMS, tokens, positions, None, mask[:, order][:, :, order])
    np.testing.assert_allclose(moved, fed[:, order], **CLOSE)


def test_only_differences_of_positions_matter(whole):
    before, (keys, values) = whole
    after, (moved_keys, moved_values) = apply(PARAMS, TOKENS, POSITIONS + 17)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-4)
    # Keys and values of the first layer, before attention mixes positions.
    np.testing.assert_allclose(moved_values[0], values[0], rtol=0, atol=1e-4)
    assert np.abs(moved_keys[0] - keys[0]).max() > 0.1
    stretched, _ = apply(PARAMS, TOKENS, POSITIONS * 2)
    assert np.abs(stretched - before).max() > 1e-3


def test_rope_turns_halves_by_position_times_frequency():
    places = np.asarray([[0, 3, 900]])
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32)
    ours = apply_rope(x, rope_tables(jnp.asarray(places), 8, 1e6))
    angles = places[0, :, None] * 1e6 ** (-np.arange(0, 8, 2) / 8)
    # Channels i and i + 4 are one complex number.
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[None, :, None]
    want = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(ours, want, rtol=0, atol=2e-4)
    np.testing.assert_array_equal(ours[:, 0], x[:, 0])


# Attention.


def test_grouped_queries_are_repeated_key_value_heads():
    """Head n reads key/value head n // G, against plain attention written out in NumPy."""
    random = np.random.default_rng(0)
    q = random.normal(size=(B, 3, 6, 4)).astype(np.float32)
    fresh, cache = (
        tuple(random.normal(size=(B, length, 2, 4)).astype(np.float32) for _ in "kv") for length in (3, 5)
    )
    mask = random.random((B, 3, 8)) < 0.6
    mask[:, :, 5] = True
    ours = jax.jit(attend)(q, fresh, cache, mask)

    k, v = (np.repeat(np.concatenate(pair, axis=1), 3, axis=2) for pair in zip(cache, fresh, strict=True))
    scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(4)
    scores = np.where(mask[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(ours, np.einsum("bhts,bshd->bthd", weights, v), rtol=0, atol=1e-5)


def test_no_mask_is_causal(whole):
    explicit, _ = apply(PARAMS, TOKENS, POSITIONS, None, CAUSAL)
    np.testing.assert_allclose(explicit, whole[0], **CLOSE)


# Types and gradients.


@pytest.mark.parametrize("model", [MODEL, SCANNED], ids=["unrolled", "scanned"])
def test_segments_are_rows_of_their_own(whole, model):
    params = stack_layers(PARAMS) if model.scan_layers else PARAMS
    borders = (0, 3, 4, T)
    segments = np.repeat(np.arange(3, dtype=np.int32), np.diff(borders))[None].repeat(B, axis=0)
    together, _ = jax.jit(functools.partial(model.apply, {"params": params}))(
        TOKENS, POSITIONS, segments=segments
    )
    for begin, end in itertools.pairwise(borders):
        alone, _ = apply(PARAMS, TOKENS[:, begin:end], POSITIONS[:, begin:end])
        np.testing.assert_allclose(together[:, begin:end], alone, **CLOSE)
    assert np.abs(together - whole[0])[:, 4:].max() > 0.01


def test_bfloat16_computation_with_float32_parameters(whole):
    exact, _ = whole
    rough, kv = jitted(MODEL.clone(dtype=jnp.bfloat16))(PARAMS, TOKENS, POSITIONS)
    assert {x.dtype for x in jax.tree.leaves(kv)} == {jnp.dtype(jnp.bfloat16)}
    # Logits come out of the product in float32: rounded to bfloat16, most of them would change.
    assert rough.dtype == jnp.float32 and (rough != rough.astype(jnp.bfloat16)).mean() > 0.9
    error = np.abs(np.asarray(rough, np.float32) - exact)
    assert 0 < error.mean() < 0.02 * exact.std()
    assert abstract_params(TINY, dtype=jnp.bfloat16) == abstract_params(TINY)


def test_exact_matmuls_asks_for_float32_products_of_a_float32_model_alone():
    for dtype, precision in ((jnp.float32, "highest"), (jnp.bfloat16, None)):
        with exact_matmuls(Transformer(TINY, dtype=dtype)):
            assert jax.config.jax_default_matmul_precision == precision


def test_what_is_kept_for_the_backward_pass_changes_no_gradient():
    def gradients(model: Transformer, params):
        def loss(params):
            logits, _ = model.apply({"params": params}, TOKENS, POSITIONS)
            return jnp.mean(jnp.square(logits)) + jnp.mean(jax.nn.logsumexp(logits, axis=-1))

        return jax.device_get(jax.jit(jax.grad(loss))(params))

    want = gradients(MODEL, PARAMS)
    assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(want))
    assert set(REMAT_POLICIES) == {"none", "dots", "full"}
    dots = gradients(MODEL.clone(remat="dots"), PARAMS)
    full = unstack_layers(gradients(SCANNED.clone(remat="full"), stack_layers(PARAMS)))
    for got in (dots, full):
        for name, leaf in jax.tree_util.tree_leaves_with_path(want):
            ours = functools.reduce(lambda node, key: node[key.key], name, got)
            np.testing.assert_allclose(ours, leaf, rtol=1e-4, atol=1e-6, err_msg=str(name))


def test_a_cpu_loads_no_pallas():
    """Loading and decoding on a CPU imports no kernel, and so no deprecated module of JAX."""
    script = textwrap.dedent("""
        import sys
        from refusion_jax import load
        from refusion_jax.decode import DecodeConfig, sample

        model, params, tokenizer = load("tests/data/oracle/tiny_a")
        config = DecodeConfig(tokenizer.mask_id, tokenizer.eos_id, gen_length=4, slot_size=4, num_blocks=1)
        sample(model, params, [[7]], config)
        loaded = ("jax.experimental.pallas", "refusion_jax.model.kernels.triton")
        print([name for name in sys.modules if name.startswith(loaded)])
    """)
    root = Path(__file__).parent.parent
    found = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert found.stdout == "[]\n", found.stdout + found.stderr
