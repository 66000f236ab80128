"""The settings `slot_score` and `recompute` against the transcription.

The cases are those of decoding.py, with values of these settings mixed in every batch.
"""

import argparse
import collections
import dataclasses
import functools
import itertools
import types
from collections.abc import Sequence
from typing import NamedTuple

import decoding
import jax
import numpy as np
import pytest
import transcription
from decoding import CASES, CLOSE_CALL, MASK, MODEL, NEVER, PARAMS, WHOLE, Case

from refusion_jax.decode import loop as decode
from refusion_jax.decode.batch import Replay
from refusion_jax.decode.config import SLOT_SCORES, DecodeConfig
from refusion_jax.errors import BadInput
from refusion_jax.serving import engine as serving
from refusion_jax.serving import requests as asking
from refusion_jax.serving.flags import add_setting_flags, given_settings

SHAPE = dataclasses.replace(decoding.SHAPE, scores=("mean", "entropy"), recompute=True)
# A shape without entropies.
ALONE_AHEAD = dataclasses.replace(SHAPE, rows=1, ahead=64, scores=("mean",))
SETTINGS = list(itertools.product(SLOT_SCORES, (True, True, True, False)))


def changed(case: Case, **settings) -> Case:
    return case._replace(config=dataclasses.replace(case.config, **settings))


CHANGED = [
    changed(case, slot_score=score, recompute=recompute)
    for case, (score, recompute) in zip(
        [*CASES["fixed"], *CASES["release"][:32]], itertools.cycle(SETTINGS), strict=False
    )
]

decoder = jax.jit(functools.partial(decode.DECODER.decode, MODEL), static_argnames="shape")


def final_states(cases: Sequence[Case], shape=SHAPE, params=PARAMS, replay=None) -> list[decode.DecodeState]:
    """The final state of each row, decoded as one batch."""
    batch = decode.DECODER.prepare(MODEL, [c.prompt for c in cases], [c.config for c in cases], shape)
    prompts, requests, mask_id, eos_id = batch.inputs
    requests = requests.replace(replay=replay)
    state = jax.device_get(decoder(params, prompts, requests, mask_id, eos_id, shape=shape))
    return [decoding.rows_of(state, row) for row in range(len(cases))]


def steps(case: Case, state: decode.DecodeState) -> list[transcription.Step]:
    made = types.SimpleNamespace(trace=state.trace, num_iterations=state.row.iterations)
    return decoding.steps(case, made)


class Run(NamedTuple):
    case: Case
    plain: transcription.Decoded
    state: decode.DecodeState


@functools.cache
def runs() -> list[Run]:
    """All cases without a close decision, decoded by the transcription and by the package."""
    states = [state for batch in decoding.batches(CHANGED) for state in final_states(batch)]
    plain = [decoding.transcribed(case) for case in CHANGED]
    kept = [run for run in map(Run, CHANGED, plain, states) if run.plain.margin >= CLOSE_CALL]
    assert len(kept) > 0.9 * len(CHANGED)
    return kept


def assert_holds(state: decode.DecodeState, run: Run) -> None:
    """Asserts that committed tokens, keys and values equal those of the transcription."""
    plain = run.plain
    assert np.flatnonzero(state.cache.filled).tolist() == sorted(plain.positions), run.case
    assert state.tokens[plain.positions].tolist() == plain.tokens, run.case
    if not plain.tokens:
        return
    _, kv = WHOLE.with_kv(plain.tokens, plain.positions, decoding.as_mask(plain.sees))
    for ours, theirs in zip(jax.tree.leaves(state.cache.layers), jax.tree.leaves(kv), strict=True):
        np.testing.assert_allclose(ours[:, plain.positions], theirs, rtol=0, atol=5e-5, err_msg=str(run.case))


# Against the transcription.


def test_what_there_is_to_see_occurs():
    seen = collections.Counter(name for run in runs() for name in run.plain.seen)
    assert seen["recomputed"] > 10 and seen["recomputed with EOS"] > 2 and seen[decoding.LOST] > 0, seen
    for score in SLOT_SCORES:
        config = [run.case.config for run in runs() if run.case.config.slot_score == score]
        assert len({c.slot_threshold for c in config if 0 < c.slot_threshold < 1}) > 3, score


def test_plans_passes_and_commits_are_those_of_the_transcription():
    for case, plain, state in runs():
        assert state.row.forwards == plain.forwards, case
        assert steps(case, state) == plain.steps, case


def test_cached_keys_and_values_are_those_of_the_pass_that_is_kept():
    for run in runs():
        assert_holds(run.state, run)


@pytest.mark.long
def test_alone_and_ahead_of_need():
    """Some cases again in a batch of one, with speculative tokens: the same except for the passes."""
    saved, seen = 0, set()
    infilled = {"recomputed", "recomputed with EOS"}
    again = [run for run in runs() if run.case.config.slot_score != "entropy"]
    for run in [*again[::12], *(run for run in again if infilled & run.plain.seen)]:
        (state,) = final_states([run.case], ALONE_AHEAD)
        assert_holds(state, run)
        for field in ("block", "planned", "iterative", "rounds", "committed"):
            np.testing.assert_array_equal(getattr(state.trace, field), getattr(run.state.trace, field))
        np.testing.assert_allclose(state.trace.confidence, run.state.trace.confidence, rtol=0, atol=1e-5)
        if "recomputed" in run.plain.seen:
            saved += int(run.state.row.forwards - state.row.forwards)
        seen |= run.plain.seen
    assert saved > 5 and infilled <= seen


# Effects of the settings.


def scores_of(case: Case, logits: np.ndarray) -> list[float]:
    """The scores of the slots of a first plan with `logits` at its mask tokens."""
    size = case.config.slot_size
    score = transcription.SCORES[case.config.slot_score]
    return [score(logits[i : i + size]) for i in range(0, len(logits), size)]


def test_scores_choose_differently():
    """In the first plan of one request the settings give different scores and choose different slots."""
    case = Case([5, 9, 2], DecodeConfig(MASK, NEVER, 32, 4, slot_threshold=0.3))
    fed = np.asarray([*case.prompt, *[MASK] * 32])
    logits = np.array(WHOLE(fed, np.arange(35), np.tril(np.ones((35, 35), bool)))[3:])
    logits[:, MASK] = -np.inf  # no answer holds mask tokens
    cases = [changed(case, slot_score=score) for score in SLOT_SCORES]
    states = final_states(cases)
    for one, state in zip(cases, states, strict=True):
        confidence = state.trace.confidence[0]
        np.testing.assert_allclose(confidence, scores_of(one, logits), rtol=1e-4)
        assert confidence.min() > 0 and confidence.max() <= 1
    assert len({tuple(state.trace.planned[0]) for state in states}) == 3


def test_recomputing_changes_keys_and_values_and_no_token_of_the_infill():
    compared = 0
    for batch in decoding.batches(CASES["fixed"][:32]):
        without, again = (
            final_states([changed(case, recompute=asked) for case in batch]) for asked in (False, True)
        )
        for case, before, after in zip(batch, without, again, strict=True):
            step, recomputed = (next(iter(steps(case, state)), None) for state in (before, after))
            if step is None or step.branch == "prefix":
                continue
            at = step.committed
            more = len({(place - len(case.prompt)) // case.config.slot_size for place in at}) > 1
            assert recomputed == step._replace(forwards=step.forwards + more), case
            np.testing.assert_array_equal(after.tokens[at], before.tokens[at])
            np.testing.assert_array_equal(after.trace.accepted[0], before.trace.accepted[0])
            keys = (state.cache.layers[0][-1, at] for state in (before, after))
            assert np.allclose(*keys, rtol=0, atol=1e-4) != more, case
            compared += more
    assert compared > 3


@pytest.mark.long
def test_a_recomputing_course_is_replayed():
    batch = [changed(case, eos_id=NEVER, recompute=True) for case in CASES["fixed"][:8]]
    recorded = jax.tree.map(lambda *x: np.stack(x), *[s.replace(cache=None) for s in final_states(batch)])
    assert (recorded.trace.iterative & (recorded.trace.planned.sum(-1) > 1)).any()
    replay = Replay(recorded.trace.planned, recorded.trace.accepted, recorded.row.iterations)
    led = final_states(batch, params=jax.tree.map(lambda x: x[..., ::-1], PARAMS), replay=replay)
    for row, state in enumerate(led):
        for field in ("planned", "iterative", "rounds", "accepted", "committed", "forwards"):
            wanted = getattr(recorded.trace, field)[row]
            np.testing.assert_array_equal(getattr(state.trace, field), wanted, field)


def test_default_requests_carry_nothing_of_it():
    shape = decoding.SHAPE
    batch = decode.DECODER.prepare(MODEL, [[1]], [DecodeConfig(MASK, NEVER, 8)], shape)
    assert batch.requests.slot_score is None and batch.requests.recompute is None
    init = functools.partial(decode.DECODER.init, MODEL, shape=shape)
    assert jax.eval_shape(init, batch.prompts, batch.requests).row.settled is None


# Checks of the settings.

TOKENIZER = types.SimpleNamespace(need_mask=lambda: MASK, mask_id=MASK, eos_ids=(2,), pad_id=2)


def parse(method: str = "refusion", **settings) -> asking.Request:
    raw = {"id": 1, "prompt_ids": [1], "gen_length": 8, **settings}
    return asking.parse(raw, asking.Defaults(method, {}), TOKENIZER, 24)


def test_requests_and_flags():
    config = parse(slot_score="entropy", recompute=True).config
    assert (config.slot_score, config.recompute) == ("entropy", True)
    parse(method="ar", slot_score="entropy", recompute=True)  # ignored
    parser = argparse.ArgumentParser()
    add_setting_flags(parser)
    given = given_settings(parser.parse_args(["--slot_score=mean", "--recompute"]))
    assert given == {"slot_score": "mean", "recompute": True}
    assert given_settings(parser.parse_args([])) == {}
    text = " ".join(parser.format_help().split())
    assert "--slot_score {first,mean,entropy}" in text and "infilled in parallel" in text


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
        decode.sample(MODEL, PARAMS, [[1]], config, shape=decoding.SHAPE)
