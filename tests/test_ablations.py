"""Scores of slots, and keys and values of infills computed once more, against the transcription.

The cases are those of test_decode.py, with these settings mixed in every batch.
"""

import argparse
import collections
import dataclasses
import functools
import itertools
import types
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_decode
import transcription
from test_decode import CASES, CLOSE_CALL, MASK, MODEL, NEVER, PARAMS, WHOLE, Case

from refusion_jax import decode, opening, serving
from refusion_jax.errors import BadInput
from refusion_jax.phases import Replay
from refusion_jax.requests import SLOT_SCORES, DecodeConfig, Requests, Shape

SHAPE = dataclasses.replace(test_decode.SHAPE, scores=("mean", "entropy"), recompute=True)
AHEAD = dataclasses.replace(SHAPE, ahead=64)
SETTINGS = list(itertools.product(SLOT_SCORES, (True, True, False)))


def changed(case: Case, **settings) -> Case:
    return case._replace(config=dataclasses.replace(case.config, **settings))


def mixed(cases: Sequence[Case]) -> list[Case]:
    return [
        changed(case, slot_score=score, recompute=recompute)
        for case, (score, recompute) in zip(cases, itertools.cycle(SETTINGS), strict=False)
    ]


MIXED = mixed([*CASES["fixed"], *CASES["release"]])


class Decoded(types.SimpleNamespace):
    """A case, what the transcription makes of it, and the package one phase a pass and ahead of need."""

    case: Case
    plain: transcription.Decoded
    state: decode.DecodeState
    ahead: decode.DecodeState


@functools.cache
def decoded() -> list[Decoded]:
    """All cases but those that the order of a sum decides."""
    found = []
    for batch in test_decode.batches(MIXED):
        states = [test_decode.final_state(batch, shape=shape) for shape in (SHAPE, AHEAD)]
        for row, case in enumerate(batch):
            plain = test_decode.transcribed(case)
            if plain.margin >= CLOSE_CALL:
                state, ahead = (test_decode.rows_of(state, row) for state in states)
                found.append(Decoded(case=case, plain=plain, state=state, ahead=ahead))
    assert len(found) > 0.9 * len(MIXED)
    return found


def samples(state: decode.DecodeState) -> types.SimpleNamespace:
    """As much of Samples as `test_decode.steps` reads."""
    return types.SimpleNamespace(trace=state.trace, num_iterations=state.row.iterations)


# Against the transcription.


def test_what_there_is_to_see_occurs():
    seen = collections.Counter(name for one in decoded() for name in one.plain.seen)
    assert min(seen[name] for name in ("recomputed", "recomputed with EOS", test_decode.LOST)) > 1, seen
    for score in SLOT_SCORES:
        partly = sum(
            len(step.planned) > 1 and step.planned != after.planned
            for one in decoded()
            if one.case.config.slot_score == score and 0 < one.case.config.slot_threshold < 1
            for step, after in itertools.pairwise(one.plain.steps)
        )
        assert partly > 3, score


def test_tokens_passes_and_commits_are_those_of_the_transcription():
    for one in decoded():
        assert one.state.tokens[one.plain.positions].tolist() == one.plain.tokens, one.case
        assert one.state.row.forwards == one.plain.forwards, one.case
        assert test_decode.steps(one.case, samples(one.state)) == one.plain.steps, one.case


def test_cached_keys_and_values_are_those_of_the_pass_that_is_kept():
    for one in decoded():
        assert np.flatnonzero(one.state.cache.filled).tolist() == sorted(one.plain.positions), one.case
        if not one.plain.tokens:
            continue
        sees = test_decode.as_mask(one.plain.sees)
        _, kv = WHOLE.with_kv(one.plain.tokens, one.plain.positions, sees)
        for state in (one.state, one.ahead):
            for ours, theirs in zip(jax.tree.leaves(state.cache.layers), jax.tree.leaves(kv), strict=True):
                np.testing.assert_allclose(
                    ours[:, one.plain.positions], theirs, rtol=0, atol=5e-5, err_msg=str(one.case)
                )


def test_predictions_ahead_of_need_change_passes_alone():
    saved = {True: 0, False: 0}
    for one in decoded():
        filled = one.state.cache.filled
        np.testing.assert_array_equal(one.ahead.cache.filled, filled)
        np.testing.assert_array_equal(one.ahead.tokens[filled], one.state.tokens[filled])
        for field in ("block", "planned", "iterative", "rounds", "accepted", "committed"):
            np.testing.assert_array_equal(getattr(one.ahead.trace, field), getattr(one.state.trace, field))
        saved["recomputed" in one.plain.seen] += int(one.state.row.forwards - one.ahead.row.forwards)
    assert min(saved.values()) > 10, saved


# What must not matter, and what must.


@pytest.mark.parametrize("number", range(3))
def test_alone_with_nothing_compiled_that_is_not_asked_for(number):
    one = [one for one in decoded() if one.case.config.slot_score == SLOT_SCORES[number]][number:]
    (first,) = [o for o in one if o.case.config.recompute == (number != 1) and len(o.plain.steps) > 3][:1]
    shape = dataclasses.replace(AHEAD, rows=1)
    own = Shape.exact([first.case.prompt], [first.case.config])
    shape = dataclasses.replace(shape, scores=own.scores, recompute=own.recompute)
    assert shape.scores == (() if number == 0 else (SLOT_SCORES[number],))
    (alone,) = test_decode.sample([first.case], shape=shape)
    np.testing.assert_array_equal(alone.num_forwards, first.ahead.row.forwards)
    np.testing.assert_allclose(alone.trace.confidence, first.ahead.trace.confidence, rtol=0, atol=1e-5)
    assert test_decode.raw_ids(alone) == first.plain.in_text_order(len(first.case.prompt))[0]


def test_default_requests_carry_nothing_of_it():
    _, requests = Requests.batch([[1]], [DecodeConfig(MASK, NEVER)], test_decode.SHAPE, 24)
    assert requests.slot_score is None and requests.recompute is None
    state = jax.eval_shape(
        functools.partial(decode.init, MODEL, shape=test_decode.SHAPE), jnp.zeros((8, 8), jnp.int32), requests
    )
    assert state.row.settled is None


def test_scores_choose_differently():
    """The scores of the first plan of the same request, and the slots above one threshold."""
    case = Case([5, 9, 2], DecodeConfig(MASK, NEVER, 32, 4, slot_threshold=0.3))
    ours = test_decode.sample([changed(case, slot_score=score) for score in SLOT_SCORES], shape=SHAPE)
    masks = np.arange(35)
    logits = WHOLE(np.asarray([5, 9, 2] + [MASK] * 32), masks, np.tril(np.ones((35, 35), bool)))[3:]
    for score, one in zip(SLOT_SCORES, ours, strict=True):
        wanted = [transcription.SCORES[score](logits[i : i + 4]) for i in range(0, 32, 4)]
        np.testing.assert_allclose(one.trace.confidence[0], wanted, rtol=1e-4)
        assert one.trace.confidence[0].min() > 0 and one.trace.confidence[0].max() <= 1
    assert len({tuple(one.trace.planned[0]) for one in ours}) == 3


def test_recomputing_changes_keys_and_values_and_no_token_of_the_infill():
    compared = 0
    for batch in test_decode.batches(CASES["fixed"][:24]):
        without, again = (
            test_decode.final_state([changed(case, recompute=asked) for case in batch], shape=SHAPE)
            for asked in (False, True)
        )
        for row, case in enumerate(batch):
            before, after = (test_decode.rows_of(state, row) for state in (without, again))
            first = test_decode.steps(case, samples(before))[:1]
            if not first or first[0].branch == "prefix" or len(first[0].planned) == 1:
                continue
            (step,), at = first, first[0].committed
            (recomputed,) = test_decode.steps(case, samples(after))[:1]
            more = len({(place - len(case.prompt)) // case.config.slot_size for place in at}) > 1
            assert recomputed == step._replace(forwards=step.forwards + more), case
            np.testing.assert_array_equal(after.tokens[at], before.tokens[at])
            np.testing.assert_array_equal(after.trace.accepted[0], before.trace.accepted[0])
            keys = (state.cache.layers[0][-1, at] for state in (before, after))
            assert np.allclose(*keys, rtol=0, atol=1e-3) != more, case
            compared += more
    assert compared > 3


def test_a_recomputing_course_is_replayed():
    batch = [changed(case, eos_id=NEVER, recompute=True) for case in CASES["fixed"][:8]]
    recorded = test_decode.final_state(batch, shape=AHEAD)
    assert (recorded.trace.iterative & (recorded.trace.planned.sum(-1) > 1)).any()
    replay = Replay(recorded.trace.planned, recorded.trace.accepted, recorded.row.iterations)
    other = jax.tree.map(lambda x: x[..., ::-1], PARAMS)
    led = jax.device_get(
        decode.decode(MODEL, other, *test_decode.arguments(batch, AHEAD), replay, shape=AHEAD)
    )
    for field in ("planned", "iterative", "rounds", "accepted", "committed", "forwards"):
        np.testing.assert_array_equal(getattr(led.trace, field), getattr(recorded.trace, field), field)


# What is asked for.

TOKENIZER = types.SimpleNamespace(need_mask=lambda: MASK, mask_id=MASK, eos_id=2)


def parse(method: str = "refusion", **settings) -> serving.Request:
    raw = {"id": 1, "prompt_ids": [1], "gen_length": 8, **settings}
    return serving.parse(raw, serving.Defaults(method, {}), TOKENIZER, 24)


def test_requests_and_flags():
    config = parse(slot_score="entropy", recompute=True).config
    assert (config.slot_score, config.recompute) == ("entropy", True)
    parse(method="ar", slot_score="entropy", recompute=True)  # passed over
    parser = argparse.ArgumentParser()
    opening.add_setting_flags(parser)
    given = opening.given_settings(parser.parse_args(["--slot_score=mean", "--recompute"]))
    assert given == {"slot_score": "mean", "recompute": True}
    assert opening.given_settings(parser.parse_args([])) == {}
    text = " ".join(parser.format_help().split())
    assert "--slot_score {first,mean,entropy}" in text and "together once more" in text


def test_one_shape_for_all_requests():
    requests = [parse(), parse(slot_score="entropy"), parse(recompute=True), parse(slot_score="mean")]
    shape = serving.fitting_shape(requests, 2)
    assert (shape.scores, shape.recompute) == (("mean", "entropy"), True)
    assert serving.fitting_shape(requests[:1], 2) == dataclasses.replace(shape, scores=(), recompute=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slot_score": "last"}, "slot_score must be one of first, mean, entropy, found 'last'"),
        ({"slot_score": ["mean"]}, r"slot_score .* found \['mean'\]"),
        ({"slot_score": None}, "slot_score .* found None"),
        ({"recompute": 1}, "recompute must be true or false, found 1"),
        ({"recompute": "yes"}, "recompute must be true or false, found 'yes'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(BadInput, match=message):
        parse(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slot_score": "mean"}, r"the shape's scores must hold \('mean',\) for these requests, found \(\)"),
        ({"recompute": True}, "the shape's recompute must be at least True for these requests, found False"),
    ],
)
def test_a_shape_that_does_not_hold_them_is_refused(settings, message):
    config = DecodeConfig(MASK, NEVER, 8, **settings)
    with pytest.raises(BadInput, match=message):
        decode.sample(MODEL, PARAMS, [[1]], config, shape=test_decode.SHAPE)
