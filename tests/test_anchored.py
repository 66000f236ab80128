"""Anchored training: examples in order among noised ones, against plain Python."""

import dataclasses
import hashlib

import jax
import numpy as np
import pytest
from noising import BATCHES, CONFIGS, KEY, PACKED, VOCAB, noise, plain_rows

from refusion_jax.baselines.objectives import ar
from refusion_jax.diffusion import slot_diffusion as diffusion
from refusion_jax.diffusion.slot_diffusion import DiffusionConfig


@pytest.fixture(scope="module", params=[(b, c) for b in BATCHES for c in CONFIGS], ids="-".join)
def noised(request):
    """(batch, configuration, noised batch, plain rows)."""
    batch, config = BATCHES[request.param[0]], CONFIGS[request.param[1]]
    drawn, ours = jax.device_get(noise(batch, config))
    return batch, config, ours, plain_rows(batch, drawn)


def test_rearrangement_is_the_one_of_plain_python(noised):
    batch, config, ours, plain = noised
    release = config.normalisation == "release"
    kinds_seen = set()
    for row, examples in enumerate(plain):
        at = 0
        for example, length, p, in_order in examples:
            kinds = [kind for *_, kind in example]
            labelled, masked = kinds.count("ar"), kinds.count("diffusion")
            kinds_seen.add((bool(in_order), labelled > 0, masked > 0))
            ar_weight = 1 if release else 1 / max(labelled, 1)
            diffusion_weight = 1 / (p * length) if release and length else 1 / max(masked, 1)
            for token, position, label, kind in example:
                assert (ours.tokens[row, at], ours.positions[row, at]) == (token, position)
                assert ours.ar_weights[row, at] == pytest.approx(ar_weight * (kind == "ar"), rel=1e-6)
                expected = diffusion_weight * (kind == "diffusion")
                assert ours.diffusion_weights[row, at] == pytest.approx(expected, rel=1e-6)
                assert not kind or ours.targets[row, at] == label
                at += 1
        rest = slice(at, None)
        np.testing.assert_array_equal(ours.tokens[row, rest], batch["tokens"][row, rest])
        assert not (ours.ar_weights + ours.diffusion_weights)[row, rest].any()
        labels = sum(kind == "ar" for example, *_ in examples for *_, kind in example)
        assert ours.ar_count[row] == (labels if release else sum(length > 0 for _, length, *_ in examples))
        assert ours.has_response[row] == sum(length > 0 and not order for _, length, _, order in examples)
    # Of both sorts there are examples with labels; none in order is masked.
    assert {(True, True, False), (False, True, True)} <= kinds_seen
    assert not any(in_order and masked for in_order, _, masked in kinds_seen)


def test_losses_are_the_sums_written_out(noised):
    _, config, ours, plain = noised
    logits = np.random.default_rng(1).normal(size=(*ours.tokens.shape, VOCAB)).astype(np.float32) * 3
    _, parts = diffusion.loss(logits, ours, 0.3)
    log_probabilities = logits.astype(float) - np.log(np.exp(logits.astype(float)).sum(-1, keepdims=True))
    ar_sums, ar_counts, diffusion_sums = [], [], []
    for row, examples in enumerate(plain):
        at = 0
        for example, length, p, in_order in examples:
            ce = {"ar": [], "diffusion": []}
            for _, _, label, kind in example:
                if kind:
                    ce[kind].append(-log_probabilities[row, at, label])
                at += 1
            if not length:
                continue
            ar_sums.append(sum(ce["ar"]))
            ar_counts.append(len(ce["ar"]))
            if not in_order:
                by = p * length if config.normalisation == "release" else max(len(ce["diffusion"]), 1)
                diffusion_sums.append(sum(ce["diffusion"]) / by)
    if config.normalisation == "release":
        ar_loss = sum(ar_sums) / sum(ar_counts)
    else:
        ar_loss = np.mean([s / max(n, 1) for s, n in zip(ar_sums, ar_counts, strict=True)])
    assert float(parts["ar_loss"]) == pytest.approx(ar_loss, rel=3e-6)
    assert float(parts["diffusion_loss"]) == pytest.approx(np.mean(diffusion_sums), rel=3e-6)
    assert float(parts["loss"]) == pytest.approx(ar_loss + 0.3 * np.mean(diffusion_sums), rel=3e-6)


@pytest.mark.parametrize("layout", BATCHES)
def test_all_in_order_is_the_autoregressive_objective(layout):
    batch, config = BATCHES[layout], dataclasses.replace(CONFIGS["release"], ar_share=1.0)
    drawn, ours = noise(batch, config)
    theirs = ar.corrupt(KEY, batch, config, None)
    assert np.asarray(drawn.in_order).all()
    for name in ("tokens", "positions", "segments", "ar_weights", "diffusion_weights", "ar_count"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), name)
    labelled = np.asarray(ours.ar_weights) > 0
    np.testing.assert_array_equal(np.asarray(ours.targets)[labelled], np.asarray(theirs.targets)[labelled])
    assert float(diffusion.divisors(ours)[1]) == 1 and not np.asarray(ours.has_response).any()


def test_the_share_changes_no_other_choice():
    """A larger share contains the examples of a smaller one; the draws of all others stay the same."""
    plain, _ = jax.device_get(noise(PACKED, dataclasses.replace(CONFIGS["release"], ar_share=0.0)))
    assert plain.in_order is None
    before = np.zeros_like(PACKED["prompt_len"], bool)
    for share in (0.2, 0.6):
        drawn, _ = jax.device_get(noise(PACKED, dataclasses.replace(CONFIGS["release"], ar_share=share)))
        assert drawn.in_order.shape == PACKED["prompt_len"].shape
        assert (drawn.in_order >= before).all() and (drawn.in_order.sum() > before.sum())
        before = drawn.in_order
        np.testing.assert_array_equal(drawn.slot_size, plain.slot_size)
        np.testing.assert_array_equal(drawn.mask_probability, plain.mask_probability)
        for row, totals in enumerate(PACKED["total_len"]):
            slot = 0
            for place, total in enumerate(totals):
                length = total - PACKED["prompt_len"][row, place]
                slots = slice(slot, slot := slot + -(-length // drawn.slot_size[row, place]))
                masked, rank = drawn.slot_masked[row, slots], drawn.slot_rank[row, slots]
                if drawn.in_order[row, place]:
                    assert not masked.any() and rank.tolist() == list(range(len(rank)))
                else:
                    np.testing.assert_array_equal(masked, plain.slot_masked[row, slots])
                    np.testing.assert_array_equal(rank, plain.slot_rank[row, slots])


def test_an_example_is_in_order_wherever_it_stands():
    (packed, _), (alone, _) = (jax.device_get(noise(BATCHES[name], CONFIGS["paper"])) for name in BATCHES)
    np.testing.assert_array_equal(packed.in_order[PACKED["total_len"] > 0], alone.in_order)
    assert 0 < alone.in_order.sum() < alone.in_order.size


def test_the_share_is_the_probability_and_independent_of_the_rest():
    count, share = 6000, 0.3
    config = DiffusionConfig(ar_share=share, eps=0.0)
    drawn = jax.device_get(
        jax.jit(diffusion.draw, static_argnums=(3, 4))(KEY, np.arange(count), np.full(count, 4), 1, config)
    )
    deviation = np.sqrt(share * (1 - share) / count)
    assert abs(drawn.in_order.mean() - share) < 4 * deviation
    for other in (drawn.mask_probability < 0.5, drawn.slot_size < 10):
        assert abs(drawn.in_order[other].mean() - share) < 4 * deviation * np.sqrt(count / other.sum())


@pytest.mark.parametrize(
    ("normalisation", "digest"), [("release", "943dec98eb14a8d3"), ("paper", "bb010c412808dbea")]
)
def test_without_a_share_the_noise_is_what_it_was_before_there_was_one(normalisation, digest):
    """Recorded at commit ef9d49c, before `ar_share`."""
    batch = {
        "tokens": np.arange(6 * 64, dtype=np.int32).reshape(6, 64),
        "prompt_len": np.asarray([[3, 0], [5, 2], [0, 7], [1, 1], [9, 0], [4, 4]], np.int32),
        "total_len": np.asarray([[40, 0], [20, 30], [33, 31], [60, 2], [64, 0], [4, 50]], np.int32),
        "example_id": np.arange(100, 112, dtype=np.int32).reshape(6, 2),
    }
    ours = diffusion.corrupt(KEY, batch, DiffusionConfig(normalisation=normalisation), 1000)
    arrays = b"".join(np.asarray(x).tobytes() for x in (ours.tokens, ours.positions, ours.targets))
    assert hashlib.sha256(arrays).hexdigest()[:16] == digest


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_is_from_0_to_1(share):
    with pytest.raises(ValueError, match=r"ar_share must be in \[0, 1\], got"):
        DiffusionConfig(ar_share=share)
