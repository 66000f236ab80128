"""The objective: what is drawn, how it is laid out, and what it costs, against plain Python and NumPy."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refusion_jax.diffusion import slot_diffusion as diffusion
from refusion_jax.diffusion.slot_diffusion import DiffusionConfig, Draw, Noised
from refusion_jax.sharding import MeshConfig, batch_sharding, make_mesh

MASK, VOCAB = 98, 100
RELEASE, PAPER = (DiffusionConfig(normalisation=name) for name in ("release", "paper"))

draw = jax.jit(diffusion.draw, static_argnames=("max_slots", "config"))


@functools.partial(jax.jit, static_argnames=("max_slots", "config"))
def draw_and_rearrange(tokens, prompt_len, total_len, examples, max_slots: int, config: DiffusionConfig):
    drawn = diffusion.draw(jax.random.key(3), examples, total_len - prompt_len, max_slots, config)
    return diffusion.rearrange(tokens, prompt_len, total_len, drawn, MASK, config)


rearrange = jax.jit(diffusion.rearrange, static_argnames=("mask_id", "config"))
loss_and_gradient = jax.jit(jax.value_and_grad(diffusion.loss, has_aux=True))


def batch(lengths: list[tuple[int, int]], width: int):
    """Random rows of (prompt, response) lengths, zeros after them: tokens, prompt_len, total_len."""
    random = np.random.default_rng(len(lengths))
    tokens = np.zeros((len(lengths), width), np.int32)
    for row, (prompt, response) in zip(tokens, lengths, strict=True):
        row[: prompt + response] = random.integers(1, MASK, prompt + response)
    prompt_len, response_len = np.asarray(lengths, np.int32).T
    return tokens, prompt_len, prompt_len + response_len


# Drawing.

LENGTHS = [(3, 40), (0, 61), (7, 0), (5, 1), (1, 33), (9, 50), (2, 8), (4, 17)]
EXAMPLES = np.asarray([5, 1000, 17, 2**31 - 1, 0, 6, 8, 77], np.int32)


def noised(rows, width=64, max_slots=16, config=RELEASE, place=lambda x: x) -> Noised:
    """Drawn and rearranged: rows of LENGTHS, padded to a width and a number of slots."""
    tokens, prompt_len, total_len = (x[rows] for x in batch(LENGTHS, 64))
    tokens = np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
    placed = map(place, (tokens, prompt_len, total_len, EXAMPLES[rows]))
    return draw_and_rearrange(*placed, max_slots=max_slots, config=config)


def assert_rows_equal(ours: Noised, theirs: Noised) -> None:
    """Equal over the columns both have; what is beyond is padding."""
    assert ours.blocks is None and theirs.blocks is None
    for field in dataclasses.fields(Noised)[:-1]:
        a, b = np.asarray(getattr(ours, field.name)), np.asarray(getattr(theirs, field.name))
        columns = slice(min(a.shape[-1], b.shape[-1]) if a.ndim > 1 else None)
        np.testing.assert_array_equal(a[..., columns], b[..., columns], field.name)


@pytest.mark.parametrize("config", [RELEASE, PAPER], ids=["release", "paper"])
def test_a_row_is_drawn_alike_in_any_company_and_under_any_padding(config):
    together = jax.device_get(noised(slice(None), config=config))
    order = [6, 0, 3, 5, 1, 1, 2, 7]
    assert_rows_equal(noised(order, config=config), jax.tree.map(lambda x: x[order], together))
    for row in range(len(LENGTHS)):
        alone = noised([row], width=128, max_slots=35, config=config)
        assert_rows_equal(alone, jax.tree.map(lambda x, row=row: x[row : row + 1], together))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 4, 2)])
def test_a_row_is_drawn_alike_on_one_device_and_on_eight(sizes):
    mesh = make_mesh(MeshConfig(*sizes))
    place = functools.partial(jax.device_put, device=batch_sharding(mesh))
    sharded = noised(slice(None), place=place)
    assert len(sharded.tokens.sharding.device_set) == 8
    assert_rows_equal(sharded, noised(slice(None)))


def test_other_keys_and_examples_are_drawn_otherwise():
    examples, lengths = jnp.arange(64), jnp.full(64, 64)
    first, again, other = (
        jax.device_get(draw(jax.random.key(seed), examples, lengths, max_slots=16, config=RELEASE))
        for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first.mask_probability != other.mask_probability).all()
    assert len(set(np.asarray(first.mask_probability).tolist())) == 64
    assert len(set(map(tuple, np.asarray(first.slot_rank).tolist()))) == 64


N, M = 6000, 8


@pytest.fixture(scope="module")
def many() -> Draw:
    config = dataclasses.replace(RELEASE, eps=0.1)
    return jax.device_get(
        draw(jax.random.key(11), jnp.arange(N), jnp.full(N, 32), max_slots=M, config=config)
    )


def test_slot_sizes_are_uniform(many):
    sizes, counts = np.unique(many.slot_size, return_counts=True)
    assert sizes.tolist() == [4, 8, 16, 32]
    assert np.abs(counts - N / 4).max() < 4 * math.sqrt(N * 3 / 16)


def test_masking_probability_is_uniform_from_eps(many):
    assert many.mask_probability.min() >= 0.1 and many.mask_probability.max() < 1
    counts, _ = np.histogram(many.mask_probability, bins=9, range=(0.1, 1))
    assert np.abs(counts - N / 9).max() < 4 * math.sqrt(N * 8 / 81)


def test_slots_are_masked_with_their_rows_probability(many):
    p = many.mask_probability[:, None]
    surplus = many.slot_masked - p
    deviation = np.sqrt(p * (1 - p))
    assert abs(surplus.sum()) < 4 * math.sqrt(M * np.sum(deviation**2))
    for low in np.arange(0.1, 1, 0.1):
        within = (p >= low) & (p < low + 0.1)
        rate, expected = many.slot_masked[within[:, 0]].mean(), p[within].mean()
        assert abs(rate - expected) < 4 * 0.5 / math.sqrt(M * within.sum())
    # Independently: what one slot has above p says nothing about the next.
    together = np.sum(surplus[:, 0] * surplus[:, 1])
    assert abs(together) < 4 * math.sqrt(np.sum(deviation**4))


def test_orders_are_uniform(many):
    assert (np.sort(many.slot_rank, axis=1) == np.arange(M)).all()
    for m in range(M):
        counts = np.bincount(many.slot_rank[:, m], minlength=M)
        assert np.abs(counts - N / M).max() < 4.5 * math.sqrt(N / M)
    # Whatever is masked: the clean slots are not ordered by how nearly they were.
    both_clean = ~many.slot_masked[:, 0] & ~many.slot_masked[:, 1]
    ahead = (many.slot_rank[:, 0] < many.slot_rank[:, 1])[both_clean]
    assert abs(ahead.mean() - 0.5) < 4 * 0.5 / math.sqrt(ahead.size)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_context_in_text_order(share):
    """A share of the examples keeps its slots in order; sizes, masks and all other orders do not change."""
    examples = np.arange(2048, dtype="i4").reshape(1024, 2)
    lengths = np.full((1024, 2), 60, "i4")
    config = DiffusionConfig(slot_sizes=(4,), text_order_share=share)
    found, before = (
        draw(jax.random.key(5), examples, lengths, 30, c) for c in (config, DiffusionConfig((4,)))
    )
    for name in ("slot_size", "mask_probability", "slot_masked"):
        np.testing.assert_array_equal(getattr(found, name), getattr(before, name))
    ours, theirs = (np.asarray(x.slot_rank).reshape(2048, 15) for x in (found, before))
    in_order = (np.diff(ours, axis=1) > 0).all(1)
    np.testing.assert_array_equal(ours[~in_order], theirs[~in_order])
    assert in_order.mean() == (1 if share == 1 else pytest.approx(share, abs=0.05))
    if share < 1:  # the examples of a row have draws of their own
        assert abs(np.corrcoef(in_order[::2], in_order[1::2])[0, 1]) < 0.1


def test_paper_masks_the_floor_of_t_times_the_number_of_slots():
    config = dataclasses.replace(PAPER, eps=0.0, slot_sizes=(4, 8))
    lengths = np.resize(np.arange(33), N)
    drawn = jax.device_get(draw(jax.random.key(0), jnp.arange(N), lengths, max_slots=M, config=config))
    num_slots = -(-lengths // drawn.slot_size)
    real = np.arange(M) < num_slots[:, None]
    t = drawn.mask_probability  # with eps 0
    np.testing.assert_array_equal(
        (drawn.slot_masked & real).sum(1), np.floor(t * num_slots.astype(np.float32))
    )
    # Every slot as often as any other.
    rates = (drawn.slot_masked & real)[num_slots == M].mean(0)
    assert np.abs(rates - rates.mean()).max() < 4 * 0.5 / math.sqrt((num_slots == M).sum())


# Rearranging.


def plain_rearrangement(tokens, prompt_len, total_len, slot_size, masked, rank):
    """Section 3.2 of the paper in plain Python: (fed, positions, label or None, "ar" or "diffusion")."""
    prompt, places = tokens[:prompt_len], list(range(prompt_len, total_len))
    slots = [places[i : i + slot_size] for i in range(0, len(places), slot_size)]
    rows = [(token, i, None, None) for i, token in enumerate(prompt)]
    clean = sorted((m for m in range(len(slots)) if not masked[m]), key=lambda m: rank[m])
    for m in clean:
        for place in slots[m]:
            last = place == slots[m][-1]
            rows.append((tokens[place], place, None if last else tokens[place + 1], None if last else "ar"))
    for m in range(len(slots)):
        if masked[m]:
            rows += [(MASK, place, tokens[place], "diffusion") for place in slots[m]]
    return rows + [(tokens[i], i, None, None) for i in range(total_len, len(tokens))]


def random_draw(rows: int, slots: int, seed: int) -> Draw:
    random = np.random.default_rng(seed)
    p = random.random(rows, np.float32)
    return Draw(
        slot_size=random.choice([1, 3, 4, 8], rows).astype(np.int32),
        mask_probability=p,
        slot_masked=random.random((rows, slots)) < random.choice([0, 0.5, 0.9, 1], rows)[:, None],
        slot_rank=np.stack([random.permutation(slots) for _ in range(rows)]).astype(np.int32),
    )


@pytest.fixture(scope="module")
def laid_out():
    """Many random rows, ragged ones among them, with their draws and what plain Python makes of them."""
    random = np.random.default_rng(0)
    width, count = 48, 600
    total = random.integers(0, width + 1, count)
    lengths = [(p, n - p) for n in total for p in [random.integers(0, n + 1)]]
    rows = batch(lengths, width)
    drawn = random_draw(count, width, seed=1)
    plain = [
        plain_rearrangement(
            *(x.tolist() for x in (*row, drawn.slot_size[i], drawn.slot_masked[i], drawn.slot_rank[i]))
        )
        for i, row in enumerate(zip(*rows, strict=True))
    ]
    return rows, drawn, plain


@pytest.mark.parametrize("config", [RELEASE, PAPER], ids=["release", "paper"])
def test_rearrangement_is_the_one_of_plain_python(laid_out, config):
    (tokens, prompt_len, total_len), drawn, plain = laid_out
    ours = jax.device_get(rearrange(tokens, prompt_len, total_len, drawn, mask_id=MASK, config=config))
    seen = {"ragged": 0, "ar": 0, "diffusion": 0}
    for i, rows in enumerate(plain):
        fed, positions, labels, kinds = zip(*rows, strict=True)
        assert ours.tokens[i].tolist() == list(fed)
        assert ours.positions[i].tolist() == list(positions)
        assert (ours.ar_weights[i] > 0).tolist() == [kind == "ar" for kind in kinds]
        assert (ours.diffusion_weights[i] > 0).tolist() == [kind == "diffusion" for kind in kinds]
        assert [t for t, kind in zip(ours.targets[i].tolist(), kinds, strict=True) if kind] == [
            label for label in labels if label is not None
        ]
        length = total_len[i] - prompt_len[i]
        assert ours.has_response[i] == (length > 0)
        seen["ragged"] += length % drawn.slot_size[i] > 0
        for kind in ("ar", "diffusion"):
            seen[kind] += kinds.count(kind)

        num_labelled, num_masked = kinds.count("ar"), kinds.count("diffusion")
        if config.normalisation == "release":
            ar_weight, ar_count = 1, num_labelled
            diffusion_weight = 1 / (drawn.mask_probability[i] * max(length, 1))
        else:
            ar_weight, ar_count = 1 / max(num_labelled, 1), length > 0
            diffusion_weight = 1 / max(num_masked, 1)
        assert ours.ar_count[i] == ar_count
        np.testing.assert_allclose(ours.ar_weights[i].sum(), ar_weight * num_labelled, rtol=1e-5)
        weights = ours.diffusion_weights[i]
        np.testing.assert_allclose(weights[weights > 0], diffusion_weight, rtol=1e-5)
    assert min(seen.values()) > 100, seen


def test_rearrangement_keeps_its_invariants(laid_out):
    """Those that hold whatever the transcription above says."""
    (tokens, prompt_len, total_len), drawn, _ = laid_out
    ours = jax.device_get(rearrange(tokens, prompt_len, total_len, drawn, mask_id=MASK, config=RELEASE))
    for i in range(len(tokens)):
        fed, positions = ours.tokens[i], ours.positions[i]
        masked = ours.diffusion_weights[i] > 0
        assert sorted(positions) == list(range(len(positions)))
        np.testing.assert_array_equal(fed, np.where(masked, MASK, tokens[i][positions]))
        prompt, response = slice(prompt_len[i]), slice(prompt_len[i], total_len[i])
        np.testing.assert_array_equal(positions[prompt], np.arange(prompt_len[i]))
        np.testing.assert_array_equal(positions[total_len[i] :], np.arange(total_len[i], len(positions)))
        labelled = (ours.ar_weights[i] > 0) | masked
        assert not labelled[prompt].any() and not labelled[total_len[i] :].any()
        # Clean, then masked in text order.
        assert (np.diff(masked[response].astype(int)) >= 0).all()
        assert (np.diff(positions[masked]) > 0).all()
        slot = (positions - prompt_len[i]) // drawn.slot_size[i]
        clean = slot[response][~masked[response]]
        borders = np.flatnonzero(np.diff(clean)) + 1
        runs = np.split(clean, borders)
        assert len({run[0] for run in runs if run.size}) == len([run for run in runs if run.size])
        # A label is the token after, in the same slot; its own of a mask.
        for at in np.flatnonzero(ours.ar_weights[i] > 0):
            assert positions[at + 1] == positions[at] + 1 and slot[at + 1] == slot[at]
            assert ours.targets[i, at] == tokens[i][positions[at] + 1]
        np.testing.assert_array_equal(ours.targets[i][masked], tokens[i][positions[masked]])


# The loss.


def by_hand(logits, ours: Noised, plain, drawn, lengths, normalisation):
    """(ar, diffusion) in float64, sum by sum as in the module's equations."""
    logits = np.asarray(logits, np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ar, per_row_ar, diffusion_sums = [], [], []
    for i, rows in enumerate(plain):
        ce = {
            kind: [-log_probabilities[i, j, label] for j, (_, _, label, k) in enumerate(rows) if k == kind]
            for kind in ("ar", "diffusion")
        }
        length = lengths[i]
        if not length:
            continue
        ar += ce["ar"]
        per_row_ar.append(sum(ce["ar"]) / max(len(ce["ar"]), 1))
        by = (
            drawn.mask_probability[i] * length if normalisation == "release" else max(len(ce["diffusion"]), 1)
        )
        diffusion_sums.append(sum(ce["diffusion"]) / by)
    ar_loss = np.mean(ar) if normalisation == "release" else np.mean(per_row_ar)
    return ar_loss, np.mean(diffusion_sums)


@pytest.mark.parametrize("config", [RELEASE, PAPER], ids=["release", "paper"])
def test_losses_are_the_sums_written_out(laid_out, config):
    (tokens, prompt_len, total_len), drawn, plain = laid_out
    some = slice(0, 40)
    assert (total_len[some] == prompt_len[some]).any(), "a row without response should be among them"
    ours = rearrange(tokens, prompt_len, total_len, drawn, mask_id=MASK, config=config)
    ours = jax.tree.map(lambda x: np.asarray(x)[some], ours)
    logits = np.random.default_rng(7).normal(size=(*ours.tokens.shape, VOCAB)).astype(np.float32) * 3
    lengths = (total_len - prompt_len)[some]
    drawn = jax.tree.map(lambda x: x[some], drawn)
    ar, masked = by_hand(logits, ours, plain[some], drawn, lengths, config.normalisation)
    for diffusion_weight in (1.0, 0.25, 0.0):
        (total, parts), _ = loss_and_gradient(logits, ours, diffusion_weight)
        np.testing.assert_allclose(parts["ar_loss"], ar, rtol=2e-6)
        np.testing.assert_allclose(parts["diffusion_loss"], masked, rtol=2e-6)
        np.testing.assert_allclose(total, ar + diffusion_weight * masked, rtol=2e-6)
        assert total == parts["loss"] and total.dtype == jnp.float32


def test_losses_of_a_row_small_enough_to_do_by_hand():
    """Prompt [7], response [1 2 3 4 | 5], the first slot clean, p = 0.5, uniform but for two tokens."""
    tokens = np.asarray([[7, 1, 2, 3, 4, 5, 0]], np.int32)
    drawn = Draw(*(np.asarray(x) for x in ([4], [0.5], [[False, True]], [[1, 0]])))
    ours = rearrange(tokens, np.asarray([1]), np.asarray([6]), drawn, mask_id=MASK, config=RELEASE)
    assert ours.tokens.tolist() == [[7, 1, 2, 3, 4, MASK, 0]]
    logits = np.zeros((1, 7, 10), np.float32)
    logits[0, 2, 3] = math.log(9)  # 2 -> 3 with probability 9 / 18
    logits[0, 5, 5] = math.log(27)  # mask -> 5 with probability 27 / 36
    _, parts = diffusion.loss(logits, ours)
    np.testing.assert_allclose(parts["ar_loss"], (2 * math.log(10) + math.log(2)) / 3, rtol=1e-6)
    np.testing.assert_allclose(parts["diffusion_loss"], math.log(4 / 3) / (0.5 * 5), rtol=1e-6)


EDGES = {
    # name: (lengths, slot size, whether slots are masked, parts that must be 0)
    "no response": ([(5, 0), (0, 0)], 4, False, ("ar_loss", "diffusion_loss")),
    "one row of two without response": ([(5, 0), (2, 9)], 4, True, ("ar_loss",)),
    "nothing masked": ([(5, 7), (0, 12)], 4, False, ("diffusion_loss",)),
    "everything masked": ([(5, 7), (0, 12)], 4, True, ("ar_loss",)),
    "single-token slots": ([(5, 7), (0, 12)], 1, False, ("ar_loss", "diffusion_loss")),
    "single-token response": ([(5, 1)], 4, False, ("ar_loss", "diffusion_loss")),
}


@pytest.mark.parametrize("name", ["release", "paper"])
def test_a_masking_probability_of_zero_weighs_nothing(name):
    """With eps 0 and t = 0 nothing of an example is masked; 1 / (p A) is infinite then."""
    config = DiffusionConfig((4,), eps=0.0, normalisation=name)
    drawn = Draw(*(np.asarray(x) for x in ([4], [0.0], [[False, False]], [[1, 0]])))
    tokens = np.arange(10, dtype=np.int32)[None]
    noised = rearrange(tokens, np.int32([2]), np.int32([10]), drawn, 11, config)
    assert not np.any(noised.diffusion_weights) and np.isfinite(noised.ar_weights).all()


@pytest.mark.parametrize("config", [RELEASE, PAPER], ids=["release", "paper"])
@pytest.mark.parametrize("name", EDGES)
def test_empty_sums_are_zero_with_finite_gradients(name, config):
    lengths, slot_size, masked, zero = EDGES[name]
    rows, slots = len(lengths), 12
    drawn = Draw(
        np.full(rows, slot_size),
        np.full(rows, 0.5),
        np.full((rows, slots), masked),
        np.tile(np.arange(slots), (rows, 1)),
    )
    ours = rearrange(*batch(lengths, 12), drawn, mask_id=MASK, config=config)
    logits = np.random.default_rng(0).normal(size=(rows, 12, VOCAB)).astype(np.float32)
    (total, parts), gradient = loss_and_gradient(logits, ours)
    for part in ("ar_loss", "diffusion_loss"):
        assert (parts[part] == 0) == (part in zero), part
    assert np.isfinite(total) and np.isfinite(gradient).all()
    assert (np.abs(gradient).max() > 0) == (len(zero) < 2)


@pytest.mark.parametrize("config", [RELEASE, PAPER], ids=["release", "paper"])
def test_rows_without_response_do_not_count(config):
    drawn = random_draw(2, 12, seed=3).replace(
        slot_size=np.full(2, 4), slot_masked=np.tile([True, False], (2, 6))
    )
    tokens, prompt_len, total_len = batch([(2, 10), (6, 0)], 12)
    both = rearrange(tokens, prompt_len, total_len, drawn, mask_id=MASK, config=config)
    logits = np.random.default_rng(0).normal(size=(2, 12, VOCAB)).astype(np.float32)
    first = jax.tree.map(lambda x: np.asarray(x)[:1], both)
    (of_both, _), _ = loss_and_gradient(logits, both)
    (of_first, _), _ = loss_and_gradient(logits[:1], first)
    np.testing.assert_allclose(of_both, of_first, rtol=1e-6)


@pytest.mark.parametrize("config", [RELEASE, PAPER], ids=["release", "paper"])
def test_parts_of_a_batch_add_up_to_the_whole(laid_out, config):
    (tokens, prompt_len, total_len), drawn, _ = laid_out
    ours = rearrange(tokens, prompt_len, total_len, drawn, mask_id=MASK, config=config)
    ours = jax.tree.map(lambda x: np.asarray(x)[:12], ours)
    logits = np.random.default_rng(0).normal(size=(*ours.tokens.shape, VOCAB)).astype(np.float32)
    (value, losses), gradient = loss_and_gradient(logits, ours)
    divided_by = diffusion.divisors(ours)
    parts = [
        (logits[rows], jax.tree.map(lambda x, rows=rows: x[rows], ours)) for rows in (slice(3), slice(3, 12))
    ]
    done = [loss_and_gradient(*part, divided_by=divided_by) for part in parts]
    for name in losses:
        np.testing.assert_allclose(sum(of_part[name] for (_, of_part), _ in done), losses[name], rtol=1e-6)
    np.testing.assert_allclose(np.concatenate([g for _, g in done]), gradient, rtol=1e-6, atol=1e-9)
    own = [loss_and_gradient(*part)[0][0] for part in parts]
    assert abs(sum(own) / 2 - value) > 1e-3, "parts of equal divisors would prove nothing"


def test_cross_entropy_is_float32_and_survives_large_logits():
    logits = jnp.asarray([[1e4, 0, -1e4], [3, 3, 3]], jnp.bfloat16)
    ce = diffusion.cross_entropy(logits, jnp.asarray([1, 2]))
    assert ce.dtype == jnp.float32
    np.testing.assert_allclose(ce, [float(logits[0, 0]), math.log(3)], rtol=1e-6)
    # A confident token: the loss is far below one unit in the last place of the logit itself.
    logits = jnp.asarray([[1000.0, 990.0]])
    np.testing.assert_allclose(diffusion.cross_entropy(logits, jnp.asarray([0])), [math.exp(-10)], rtol=5e-3)


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slot_sizes": ()}, "slot_sizes must be one or more positive lengths"),
        ({"slot_sizes": (4, 0)}, "slot_sizes .* got \\(4, 0\\)"),
        ({"eps": -0.1}, "eps must be in \\[0, 1\\), got -0.1"),
        ({"eps": 1.0}, "eps"),
        ({"eps": math.nan}, "eps"),
        ({"block_len": 0}, "block_len must be at least 1, got 0"),
        ({"normalisation": "author"}, "normalisation must be one of .* got 'author'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**settings)


def test_settings():
    config = DiffusionConfig(slot_sizes=[8, 4])
    assert config.slot_sizes == (8, 4) and hash(config)
    assert [config.max_slots(length) for length in (0, 1, 4, 5, 64)] == [0, 1, 1, 2, 16]
