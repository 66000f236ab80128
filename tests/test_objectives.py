"""The objectives of the baselines: losses against plain computation, and who sees whom."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refusion_jax import sharding
from refusion_jax.baselines.objectives import ar, bd3, mdm
from refusion_jax.diffusion import slot_diffusion as diffusion
from refusion_jax.diffusion.slot_diffusion import DiffusionConfig
from refusion_jax.model.attention import attend_fed
from refusion_jax.model.transformer import ModelConfig, Transformer
from refusion_jax.training.objectives import OBJECTIVES

MASK, VOCAB, WIDTH, BLOCK = 38, 40, 32, 4
MODEL = ModelConfig(VOCAB, 2, 16, 4, 2, 8, 32)
KEY = jax.random.key(3)


def rows_of(groups, places: int | None, width: int = WIDTH):
    """A batch of rows, each with the examples (number, tokens, prompt length) of its group; None: one."""
    batch = {"tokens": np.full((len(groups), width), 7, np.int32)}
    batch |= {
        name: np.zeros((len(groups), places or 1), np.int32)
        for name in ("prompt_len", "total_len", "example_id")
    }
    for row, group in enumerate(groups):
        joined = [token for _, tokens, _ in group for token in tokens]
        batch["tokens"][row, : len(joined)] = joined
        for place, (number, tokens, prompt) in enumerate(group):
            batch["example_id"][row, place] = number
            batch["prompt_len"][row, place], batch["total_len"][row, place] = prompt, len(tokens)
    return batch if places else {name: x if name == "tokens" else x[:, 0] for name, x in batch.items()}


@pytest.fixture(scope="module")
def groups():
    """Examples for rows of up to 4, a response or a prompt empty here and there, one row full."""
    dice = np.random.default_rng(0)
    lengths = [[(3, 9), (1, 12), (2, 5)], [(5, 0), (4, 13)], [(10, 22)], [(2, 1), (3, 3), (4, 4), (0, 6)]]
    numbers = iter(range(100, 200, 7))
    return [
        [(next(numbers), dice.integers(0, MASK, p + a).tolist(), p) for p, a in group] for group in lengths
    ]


@pytest.fixture(scope="module")
def params():
    nothing = jnp.zeros((1, 1), jnp.int32)
    params = sharding.unbox(jax.jit(Transformer(MODEL).init)(jax.random.key(0), nothing, nothing))
    return jax.tree.map(lambda x: x * 2 if x.ndim > 1 else x, params)  # so that who attends to whom matters


def corrupt(name: str, batch, **settings):
    config = DiffusionConfig((4, 8), **{"block_len": BLOCK} | settings)
    return OBJECTIVES[name].corrupt(KEY, batch, config, MASK)


@functools.partial(jax.jit, static_argnames="name")
def of_batch(params, batch, name: str):
    """Losses of a batch, and the logits and noise they are of."""
    objective, packed = OBJECTIVES[name], batch["example_id"].size > len(batch["tokens"])
    noised = corrupt(name, batch)
    model = Transformer(MODEL, causal=objective.causal)
    visibility = objective.attention_kwargs(noised, packed)
    logits, _ = model.apply(params, noised.tokens, noised.positions, **visibility)
    return diffusion.loss(logits, noised)[1], logits, noised


@jax.jit
def masked_logits(params, tokens, positions, mask):
    return Transformer(MODEL).apply(params, tokens, positions, mask=mask)[0]


def plain_logits(params, tokens: list[int], blocks: np.ndarray) -> np.ndarray:
    """Logits of one example alone, each token seeing those of its own block and of lower ones."""
    fed, length = np.zeros((1, WIDTH), np.int32), len(tokens)
    fed[0, :length] = tokens
    mask = np.eye(WIDTH, dtype=bool)
    mask[:length, :length] = blocks[:, None] >= blocks
    return np.asarray(masked_logits(params, fed, np.arange(WIDTH)[None], mask[None]))[0, :length]


def test_ar_is_next_token_prediction(params, groups):
    """Each example by itself, its log probabilities summed up one token after the other."""
    losses, *_ = of_batch(params, rows_of(groups, 4), "ar")
    ce = []
    for _, tokens, prompt in (example for group in groups for example in group):
        log_probabilities = np.asarray(
            jax.nn.log_softmax(plain_logits(params, tokens, np.arange(len(tokens))))
        )
        ce += [-log_probabilities[i - 1, tokens[i]] for i in range(max(prompt, 1), len(tokens))]
    assert float(losses["loss"]) == pytest.approx(float(np.mean(ce)), rel=1e-5)
    assert losses["ar_loss"] == losses["loss"] and losses["diffusion_loss"] == 0


def test_mdm_loss_by_hand():
    """Two examples in a row and a third below; masks given, logits whose cross entropies are plain."""
    tokens = np.asarray([[1, 2, 3, 2, 1, 0], [3, 1, 2, 0, 0, 0]], np.int32)
    prompt_len, total_len = np.asarray([[1, 1], [2, 0]], np.int32), np.asarray([[3, 2], [3, 0]], np.int32)
    masked = np.asarray([[1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1]], bool)  # also where it means nothing
    p = np.asarray([[0.5, 0.5, 0.5, 0.25, 0.25, 0.25], [0.8] * 6], np.float32)
    noised = mdm.mask(tokens, prompt_len, total_len, mdm.Draw(p, masked), MASK)
    np.testing.assert_array_equal(noised.tokens, [[1, MASK, 3, 2, MASK, 0], [3, 1, MASK, 0, 0, 0]])
    np.testing.assert_array_equal(noised.positions[0, :5], [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(noised.segments, [[0, 0, 0, 1, 1, 2], [0, 0, 0, 2, 2, 2]])
    # At token 1 of the first row 2 has 3/4 of the probability of four, at token 4 all four are alike; in the
    # second row 2 has 1/3 of it.
    logits = np.zeros((2, 6, 4), np.float32)
    logits[0, 1, 2], logits[1, 2, 2] = math.log(9), math.log(1.5)
    loss, parts = diffusion.loss(logits, noised)
    by_hand = (-math.log(9 / 12) / (0.5 * 2) + math.log(4) / (0.25 * 1) - math.log(1.5 / 4.5) / (0.8 * 1)) / 3
    assert float(loss) == float(parts["diffusion_loss"]) == pytest.approx(by_hand, rel=1e-6)
    assert parts["ar_loss"] == 0


def test_bd3_sees_what_decoding_will_see(params, groups):
    """A noised block's logits are those of a pass over its prompt, the clean blocks before it and itself."""
    _, logits, noised = of_batch(params, rows_of(groups, 4), "bd3")
    checked = 0
    for row, group in enumerate(groups):
        start = 0
        for _, tokens, prompt in group:
            for first in range(prompt, len(tokens), BLOCK):
                end = min(first + BLOCK, len(tokens))
                copy = slice(WIDTH + start + first, WIDTH + start + end)
                fed = [*tokens[:first], *np.asarray(noised.tokens[row, copy]).tolist()]
                place = np.arange(end)
                blocks = np.where(place < prompt, place, prompt + (place - prompt) // BLOCK)
                wanted = plain_logits(params, fed, blocks)[first:]
                np.testing.assert_allclose(logits[row, copy], wanted, atol=1e-5)
                checked += 1
            start += len(tokens)
    assert checked == 3 + 3 + 2 + 4 + 6 + 1 + 1 + 1 + 2
    masked = noised.tokens == MASK
    assert masked[:, WIDTH:].any() and not masked[:, :WIDTH].any()
    assert not noised.diffusion_weights[:, :WIDTH].any()


@pytest.mark.parametrize("name", ["ar", "mdm", "bd3"])
def test_packed_examples_are_those_alone(params, groups, name):
    alone = [[example] for group in groups for example in group]
    together, _, packed = of_batch(params, rows_of(groups, 4), name)
    apart, *_ = of_batch(params, rows_of(alone, None), name)
    wider, *_ = of_batch(params, rows_of(alone, None, width=48), name)
    for other in (apart, wider):
        for part, value in together.items():
            np.testing.assert_allclose(value, other[part], rtol=1e-5, err_msg=part)
    assert together["loss"] > 0.1
    assert float(packed.has_response.sum()) == 9


@pytest.mark.parametrize("name", ["ar", "bd3"])
def test_what_comes_later_is_not_seen(params, name):
    """The last block changes no logits before it."""
    tokens = np.random.default_rng(1).integers(0, MASK, 18)
    changed = np.concatenate([tokens[:14], (tokens[14:] + 1) % MASK])
    both = rows_of([[(5, tokens.tolist(), 6)], [(5, changed.tolist(), 6)]], None)
    _, (one, other), noised = of_batch(params, both, name)
    np.testing.assert_array_equal(one[:14], other[:14])
    assert np.abs(one - other)[14:18].max() > 1e-3
    if name == "bd3":
        copy = slice(WIDTH + 6, WIDTH + 14)
        np.testing.assert_array_equal(one[copy], other[copy])
        mask = np.asarray(bd3.visible(noised))
        assert not mask[:, :WIDTH, WIDTH:].any()  # nothing clean sees anything noised


def test_mdm_sees_all_of_its_example_and_nothing_else(params, groups):
    batch = rows_of(groups, 4)
    changed = batch | {"tokens": batch["tokens"].copy()}
    changed["tokens"][0, 24] += 1  # within the second example
    objective = OBJECTIVES["mdm"]

    @jax.jit
    def logits(batch):
        clean = ar.corrupt(KEY, batch, DiffusionConfig(), None)
        model = Transformer(MODEL, causal=objective.causal)
        visibility = objective.attention_kwargs(clean, True)
        return model.apply(params, clean.tokens, clean.positions, **visibility)[0]

    difference = np.abs(logits(batch) - logits(changed))[0].max(-1)
    assert (difference[12:25] > 1e-5).all()
    assert not difference[:12].any() and not difference[25:].any()


N = 4000


@pytest.mark.parametrize("block_len", [None, 8])
def test_noise_is_drawn_as_said(block_len):
    length, eps = 24, 0.1
    zeros, lengths = jnp.zeros(N, jnp.int32), jnp.full(N, length)
    of = jax.jit(mdm.draw, static_argnums=(4, 5, 6))
    drawn = jax.device_get(of(KEY, jnp.arange(N), zeros, lengths, length, eps, block_len))
    p = drawn.mask_probability[:, :: block_len or length]
    np.testing.assert_array_equal(np.repeat(p, block_len or length, axis=1), drawn.mask_probability)
    assert len(np.unique(p)) > 0.99 * p.size
    counts, _ = np.histogram(p, bins=9, range=(0.1, 1))
    assert counts.sum() == p.size
    assert np.abs(counts - p.size / 9).max() < 4 * math.sqrt(p.size * 8 / 81)
    surplus = drawn.masked - drawn.mask_probability
    deviation = np.sqrt(drawn.mask_probability * (1 - drawn.mask_probability))
    assert abs(surplus.sum()) < 4 * math.sqrt(np.sum(deviation**2))
    # Independently: what one token, or one block, has above its mean says nothing about the next.
    assert abs(np.sum(surplus[:, 0] * surplus[:, 1])) < 4 * math.sqrt(np.sum(deviation[:, 0] ** 4))
    if block_len:
        assert abs(np.corrcoef(p[:, 0], p[:, 1])[0, 1]) < 4 / math.sqrt(N)
    again, other = (
        of(key, jnp.arange(N), zeros, lengths, length, eps, block_len) for key in (KEY, jax.random.key(4))
    )
    np.testing.assert_array_equal(again.masked, drawn.masked)
    assert (other.mask_probability != drawn.mask_probability).mean() > 0.99


def test_the_expected_loss_of_mdm_does_not_depend_on_the_noise():
    """Weighted by 1 / p, each token of a response counts 1 / A on average."""
    rows = rows_of([[(number, [1] * 10, 4)] for number in range(N)], None)
    noised = corrupt("mdm", rows, eps=0.2)
    mean = np.asarray(noised.diffusion_weights).mean(0)
    np.testing.assert_allclose(mean[4:10], 1 / 6, atol=0.02)
    assert not mean[:4].any() and not mean[10:].any()


def test_parts_of_a_row_that_hold_nothing_weigh_nothing():
    for name in OBJECTIVES:
        noised = jax.jit(functools.partial(corrupt, name))(rows_of([[], [(3, [1, 2, 3], 3)]], 4))
        for weights in (noised.ar_weights, noised.diffusion_weights, noised.ar_count, noised.has_response):
            assert not np.asarray(weights).any(), name
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(noised))


@pytest.mark.parametrize("segmented", [True, False])
def test_attention_that_is_not_causal(segmented):
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(2, 12, n, 8)).astype(np.float32) for n in (4, 2, 2))
    segments = np.sort(random.integers(0, 3, (2, 12)), axis=1) if segmented else None
    found = attend_fed(q, (k, v), segments, "dense", causal=False)
    for row in range(2):
        for place in range(12):
            seen = np.arange(12)
            if segments is not None:
                seen = np.flatnonzero(segments[row] == segments[row, place])
            for head in range(4):
                scores = k[row, seen, head // 2] @ q[row, place, head] / math.sqrt(8)
                weights = np.exp(scores) / np.exp(scores).sum()
                wanted = weights @ v[row, seen, head // 2]
                np.testing.assert_allclose(found[row, place, head], wanted, atol=1e-5)
