"""The slot decoder's drafts at a temperature, and its comparison of probabilities with thresholds."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transcription
from decoding import (
    CONFIG,
    MASK,
    MODEL,
    NEVER,
    PARAMS,
    SHAPE,
    WHOLE,
    Case,
    arguments,
    assert_same,
    committed_places,
    final_state,
    hot,
    raw_ids,
    sample,
)

from refusion_jax.baselines.decoders import ar
from refusion_jax.baselines.decoders.config import ARConfig
from refusion_jax.decode import loop as decode
from refusion_jax.decode.batch import Shape
from refusion_jax.decode.config import DecodeConfig
from refusion_jax.decode.outputs import read_outputs
from refusion_jax.decode.row_state import Phase
from refusion_jax.decode.scores import DraftSampling, score

# Temperature.


def test_a_seed_decides_and_the_batch_does_not(eventful):
    batch = [hot(case, 1.0, seed) for seed, case in enumerate(eventful)]
    ours = sample(batch)
    for again, first in zip(sample(batch), ours, strict=True):
        assert_same(again, first)
    for again, first in zip(sample(batch[::-1])[::-1], ours, strict=True):
        assert_same(again, first)
    (alone,) = sample(batch[2:3])
    assert_same(alone, ours[2])
    # Rows at temperature 0 in the same batch stay greedy.
    mixed = [case if i % 2 else batch[i] for i, case in enumerate(eventful)]
    for i, (got, cold) in enumerate(zip(sample(mixed), sample(eventful), strict=True)):
        assert_same(got, cold if i % 2 else ours[i])


def test_seeds_differ():
    case = Case([5, 9, 2], DecodeConfig(MASK, NEVER, gen_length=32))
    assert len({tuple(raw_ids(s)) for s in sample([hot(case, 3.0, seed) for seed in range(8)])}) == 8


def test_no_temperature_is_the_limit_of_a_small_one(eventful):
    for tiny, cold in zip(sample([hot(case, 1e-9) for case in eventful]), sample(eventful), strict=True):
        assert_same(tiny, cold)


def test_drafts_are_samples_of_the_tempered_softmax_with_confidence_of_the_plain_one():
    """Draws one token after one prompt with many seeds."""
    case, temperature, count = Case([5, 9, 2], DecodeConfig(MASK, NEVER, 1, 1)), 2.0, 640
    _, (logits,) = np.split(
        WHOLE(np.asarray([5, 9, 2, MASK]), np.arange(4), np.tril(np.ones((4, 4), bool))), [3]
    )
    logits = np.array(logits)
    logits[..., MASK] = -np.inf  # no answer holds mask tokens
    drawn = [s for i in range(0, count, 8) for s in sample([hot(case, temperature, i + k) for k in range(8)])]
    counts = np.bincount([s.raw_ids[0] for s in drawn], minlength=CONFIG.vocab_size)
    expected = transcription.probabilities(logits / temperature)
    deviation = np.sqrt(count * expected * (1 - expected))
    assert (np.abs(counts - count * expected) < 4 * deviation + 1).all()
    assert np.abs(expected - transcription.probabilities(logits)).max() > 0.1, "temperature 1 would pass, too"
    plain = transcription.probabilities(logits)
    for s in drawn[:50]:
        np.testing.assert_allclose(s.trace.confidence[0, 0], plain[s.raw_ids[0]], rtol=1e-4)


# Probabilities.


class Judged(NamedTuple):
    """Outputs [B, ...] of rows in their plan: drafts, confidences, and the tests against the thresholds."""

    draft: np.ndarray
    confidence: np.ndarray
    confident: np.ndarray
    next_passes: np.ndarray


@functools.partial(jax.jit, static_argnames="dtype")
def judge(state, logits, dtype, target):
    fed = decode.batch_inputs(state, jnp.int32(MASK), SHAPE, first=True).slots
    cold = DraftSampling(
        *(jnp.zeros(SHAPE.block, x) for x in (jnp.float32, jnp.uint32, jnp.int32, jnp.int32))
    )
    scored = jax.vmap(lambda x, y: score(x, y, cold))(logits, jnp.full(logits.shape[:2], target))
    verifying = state.row.replace(phase=jnp.full_like(state.row.phase, Phase.VERIFY))
    # Treats the mask tokens as drafts to verify: index 0 of JOINT is the first token.
    fed = fed.replace(node_index=jnp.broadcast_to(jnp.arange(SHAPE.block), fed.node_index.shape))
    answer = jax.vmap(lambda *args: read_outputs(*args, dtype))(scored, fed, verifying, state.requests)
    return Judged(answer.draft, answer.confidence, answer.confident, answer.passes)


def scores(logits: np.ndarray, configs: Sequence[DecodeConfig], target=0) -> Judged:
    """The outputs of rows with the given logits [V] at every token of the block."""
    prompts, requests, *_ = arguments([Case([1], config) for config in configs])
    state = decode.DECODER.init(MODEL, prompts, requests, shape=SHAPE)
    logits = np.broadcast_to(logits, (SHAPE.rows, SHAPE.block, logits.shape[-1]))
    return jax.device_get(judge(state, logits, logits.dtype, target))


def test_thresholds_are_strict():
    thresholds = [1.0, 2.0, 0.999, 0.0, -1.0]
    configs = [DecodeConfig(MASK, NEVER, slot_threshold=x, token_threshold=x) for x in thresholds]
    logits = np.zeros(CONFIG.vocab_size, np.float32)
    logits[7] = 200  # probability 1, and 0 for all other tokens
    sure = scores(logits, configs, target=7)
    assert sure.confidence[0, 0] == 1 and sure.draft[0, 0] == 7
    assert (
        sure.confident[:5, 0].tolist() == sure.next_passes[:5, 1].tolist() == [False, False, True, True, True]
    )
    assert scores(logits, configs, target=8).next_passes[:5, 1].tolist() == [False, False, False, False, True]


def test_release_rounds_probabilities_and_thresholds_to_the_type_of_the_logits():
    """0.4005 is above 0.4, but both round to the same bfloat16 number."""
    configs = [
        DecodeConfig(MASK, NEVER, slot_threshold=0.4, token_threshold=0.4, semantics=semantics)
        for semantics in ("fixed", "release")
    ]
    logits = np.full(CONFIG.vocab_size, -100, np.float32)
    logits[:4] = [0.6953125, 0, 0, 0]  # e^0.6953125 is 2.0043
    rough = scores(logits.astype(jnp.bfloat16), configs)
    assert abs(rough.confidence[0, 0] - 0.4005) < 1e-4 and rough.confidence[1, 0] == 0.400390625
    assert rough.confident[:2, 0].tolist() == rough.next_passes[:2, 1].tolist() == [True, False]
    exact = scores(logits, configs)
    assert exact.confident[:2, 0].tolist() == exact.next_passes[:2, 1].tolist() == [True, True]


def test_bfloat16_model_decodes(eventful):
    model = MODEL.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    release = [c._replace(config=dataclasses.replace(c.config, semantics="release")) for c in eventful]
    batch = [*eventful[:4], *release[:4]]
    ours = sample(batch, model, params)
    state = final_state(batch, model, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.cache.layers)} == {jnp.dtype(jnp.bfloat16)}
    for i, (case, s) in enumerate(zip(batch, ours, strict=True)):
        assert np.flatnonzero(state.cache.filled[i])[len(case.prompt) :].tolist() == committed_places(case, s)
        assert s.num_raw > 0 and (s.raw_ids < CONFIG.vocab_size).all()
        confidences = s.trace.confidence[s.trace.confidence >= 0]
        in_bfloat16 = (confidences == confidences.astype(jnp.bfloat16).astype(np.float32)).all()
        assert in_bfloat16 == (case.config.semantics == "release")
    shuffled = [6, 0, 3, 5]
    for again, i in zip(sample([batch[i] for i in shuffled], model, params), shuffled, strict=True):
        assert_same(again, ours[i])


@pytest.mark.parametrize("head", ["MASK and PAD first", "PAD ends answers"])
def test_no_answer_holds_mask_or_padding_tokens(head):
    """With equal logits the argmax is the first token: the mask, were it not removed."""
    rigged = jax.tree.map(jnp.zeros_like, PARAMS)
    ends = 1 if head == "PAD ends answers" else 9
    common = {"mask_id": 0, "eos_id": (9, ends), "pad_id": 1}
    expected = [1] if ends == 1 else [2] * 8
    configs = [
        DecodeConfig(**common, gen_length=8, slot_size=4),
        DecodeConfig(**common, gen_length=8, slot_size=4, slot_threshold=-1, token_threshold=-1),
        DecodeConfig(**common, gen_length=8, verify="exact", draft_length=4),
    ]
    for config in configs:
        samples = decode.sample(MODEL, rigged, [[5, 6]], config)
        assert samples.raw_ids[0, : int(samples.num_raw[0])].tolist()[: len(expected)] == expected
    config = ARConfig(**common, gen_length=8)
    samples = ar.DECODER.sample(MODEL, rigged, [[5, 6]], config, shape=Shape(rows=1, prompt=4, gen=8))
    assert samples.raw_ids[0, : int(samples.num_raw[0])].tolist() == expected
    release = DecodeConfig(**common | {"eos_id": 9}, gen_length=8, slot_size=4, semantics="release")
    samples = decode.sample(MODEL, rigged, [[5, 6]], release)
    assert set(samples.raw_ids[0, : int(samples.num_raw[0])].tolist()) == {0}  # as the authors' code
