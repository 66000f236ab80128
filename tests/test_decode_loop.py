"""The loop of the slot decoder: its state between passes, and speculative tokens."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import (
    AHEAD,
    CASES,
    CLOSE_CALL,
    CONFIG,
    MASK,
    MODEL,
    NEVER,
    PARAMS,
    SHAPE,
    Case,
    arguments,
    assert_same,
    final_state,
    hot,
    raw_ids,
    rows_of,
    run,
    sample,
)

from refusion_jax.decode import loop as decode
from refusion_jax.decode.batch import Replay
from refusion_jax.decode.decoder import NO_LIMIT
from refusion_jax.decode.forward import pass_sizes
from refusion_jax.decode.kv_cache import insert_rows
from refusion_jax.decode.row_state import Phase, own_entries

apply = jax.jit(lambda *args: MODEL.apply({"params": PARAMS}, *args))
feeds = jax.jit(decode.batch_inputs, static_argnames="shape")
one_pass = functools.partial(decode.DECODER.resume, until=0, limit=1, shape=SHAPE)


def python_loop(cases: Sequence[Case], between=lambda state: state) -> list[decode.DecodeState]:
    """`Decoder.decode` as a Python loop; returns the state before each pass and the final one."""
    *inputs, mask_id, eos_id = arguments(cases)
    states = [between(decode.DECODER.begin(MODEL, PARAMS, *inputs, mask_id, eos_id, shape=SHAPE))]
    while not states[-1].done.all():
        before = jax.tree.map(jnp.copy, states[-1])
        states.append(between(one_pass(MODEL, PARAMS, before, mask_id, eos_id)))
    return states


@pytest.fixture(scope="module")
def states(eventful) -> list[decode.DecodeState]:
    return python_loop(eventful)


def assert_same_state(ours: decode.DecodeState, theirs: decode.DecodeState, atol: float) -> None:
    """Asserts equality of the committed entries; other entries of the buffers have no meaning."""
    filled = np.asarray(theirs.cache.filled)
    np.testing.assert_array_equal(ours.cache.filled, filled)
    np.testing.assert_array_equal(ours.tokens[filled], theirs.tokens[filled])
    for a, b in zip(jax.tree.leaves(ours.cache.layers), jax.tree.leaves(theirs.cache.layers), strict=True):
        np.testing.assert_allclose(a[:, filled], b[:, filled], rtol=0, atol=atol)
    for a, b in zip(
        jax.tree.leaves((ours.row, ours.trace)), jax.tree.leaves((theirs.row, theirs.trace)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def test_while_loop_is_a_python_loop_over_step(eventful, states):
    state = final_state(eventful)
    assert len(states) == state.row.forwards.max() > 10
    assert_same_state(jax.device_get(states[-1]), state, atol=1e-5)


def test_what_was_not_committed_leaves_no_trace_in_the_cache(eventful, states):
    """Overwrites cache entries without an accepted token with huge values between passes; nothing changes."""

    def poison(state: decode.DecodeState) -> decode.DecodeState:
        filled = state.cache.filled
        own, _ = jax.vmap(functools.partial(own_entries, length=filled.shape[1]))(state.row, state.requests)
        there = (filled | own)[..., None, None]
        layers = jax.tree.map(lambda x: jnp.where(there, x, 1e15), state.cache.layers)
        tokens = jnp.where(filled, state.tokens, 5)
        return state.replace(cache=state.cache.replace(layers=layers), tokens=tokens)

    poisoned = python_loop(eventful, between=poison)
    assert len(poisoned) == len(states)
    for ours, theirs in jax.device_get(list(zip(poisoned, states, strict=True))):
        assert_same_state(ours, theirs, atol=0)


def test_committed_entries_never_change(states):
    for before, after in itertools.pairwise(jax.device_get(states)):
        filled = before.cache.filled
        assert after.cache.filled[filled].all()
        np.testing.assert_array_equal(after.tokens[filled], before.tokens[filled])
        for a, b in zip(
            jax.tree.leaves(after.cache.layers), jax.tree.leaves(before.cache.layers), strict=True
        ):
            np.testing.assert_array_equal(a[:, filled], b[:, filled])


def test_slots_infilled_together_are_slots_infilled_one_by_one(eventful, states):
    """Logits, keys and values of one pass with all slots of a row equal those of one pass per slot."""
    compared = 0
    for state in jax.device_get(states):
        several = (state.row.phase == Phase.INFILL) & (state.row.open.sum(1) > 1)
        if not several.any() or compared > 12:
            continue
        fed = jax.device_get(feeds(state, jnp.int32(MASK), shape=SHAPE)).slots
        together = apply(fed.tokens, fed.positions, state.cache.layers, fed.mask)
        for row in np.flatnonzero(several):
            prompt, config = eventful[row]
            cache, row_state = (
                state.cache.rows(slice(row, row + 1)),
                jax.tree.map(lambda x, row=row: x[row], state.row),
            )
            start = len(prompt) + int(row_state.block) * config.block_len
            for m in np.flatnonzero(row_state.open):
                first = start + m * config.slot_size
                at = np.flatnonzero(
                    fed.active[row]
                    & (fed.positions[row] >= first)
                    & (fed.positions[row] < first + config.slot_size)
                )
                if not at.size:
                    continue
                # Padded to one width, so that all slot sizes share one compilation.
                padded = np.resize(at, 16)
                mine = np.arange(cache.filled.shape[1]) - first
                sees = cache.filled[0] | ((mine >= 0) & (mine < row_state.cached[m]))
                among = np.tril(np.ones((16, 16), bool)) & (np.arange(16) < at.size)
                mask = np.concatenate([np.broadcast_to(sees, (16, sees.size)), among], axis=1)[None]
                alone = apply(
                    fed.tokens[row][padded][None], fed.positions[row][padded][None], cache.layers, mask
                )
                count = at.size
                np.testing.assert_allclose(alone[0][0, :count], together[0][row][at], rtol=0, atol=5e-5)
                for a, b in zip(alone[1], together[1], strict=True):
                    np.testing.assert_allclose(a[:, 0, :count], b[:, row][:, at], rtol=0, atol=5e-5)
                compared += 1
    assert compared > 3


def test_a_cache_by_layer_holds_what_one_array_does(eventful):
    """The cache layout for TPUs: one array per layer."""
    ours, theirs = final_state(eventful, MODEL.clone(cache_by_layer=True)).cache, final_state(eventful).cache
    assert len(ours.layers[0]) == CONFIG.num_layers and ours.layers[0][0].shape == theirs.layers[0].shape[1:]
    row, whole = ours.rows(3), theirs.rows(3)
    for by_layer, together in zip(row.layers, whole.layers, strict=True):
        for a, b in zip(by_layer, together, strict=True):
            np.testing.assert_allclose(a[whole.filled], b[whole.filled], rtol=0, atol=1e-6)


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_row_may_be_taken_in_while_others_are_under_way(eventful, by_layer):
    """Two rows of a running batch are replaced by requests that made their first pass in another batch."""
    batch, model = eventful[:4], MODEL.clone(cache_by_layer=by_layer)
    *inputs, mask_id, eos_id = arguments(batch)
    state = decode.DECODER.begin(model, PARAMS, *inputs, mask_id, eos_id, shape=SHAPE)
    assert isinstance(state.cache.layers[0], tuple) is by_layer
    state = decode.DECODER.resume(model, PARAMS, state, mask_id, eos_id, 0, 3, shape=SHAPE)
    two = dataclasses.replace(SHAPE, rows=2)
    late = decode.DECODER.prepare(
        MODEL, [c.prompt for c in eventful[4:6]], [c.config for c in eventful[4:6]], two
    )
    begun = decode.DECODER.begin(model, PARAMS, *late[:4], shape=two)
    state = insert_rows(state, begun, np.asarray([6, 1], np.int32))
    state = decode.DECODER.resume(model, PARAMS, state, mask_id, eos_id, 0, NO_LIMIT, shape=SHAPE)
    samples = decode.DECODER.finish(state, eos_id, SHAPE)
    rows = [jax.tree.map(lambda x, row=row: x[row], jax.device_get(samples)) for row in range(8)]
    undisturbed = sample(eventful)
    for row, case in {0: 0, 1: 5, 2: 2, 3: 3, 6: 4}.items():
        assert_same(rows[row], undisturbed[case])


# Speculative tokens.


@pytest.mark.long
def test_predictions_ahead_of_need_save_passes_and_change_nothing_else():
    """Every case again with speculative tokens: the same answers, traces and cached values."""
    made = saved = 0
    for semantics in CASES:
        whole = run(semantics)
        for first in range(0, len(whole.cases), SHAPE.rows):
            part = slice(first, first + SHAPE.rows)
            again = final_state(whole.cases[part], shape=AHEAD)
            for i, (ours, before, plain) in enumerate(
                zip(whole.ours[part], whole.states[part], whole.plain[part], strict=True)
            ):
                if plain.margin < CLOSE_CALL:
                    continue
                after = rows_of(again, i)
                filled = before.cache.filled
                np.testing.assert_array_equal(after.cache.filled, filled)
                np.testing.assert_array_equal(after.tokens[filled], before.tokens[filled])
                for a, b in zip(
                    jax.tree.leaves(after.cache.layers), jax.tree.leaves(before.cache.layers), strict=True
                ):
                    np.testing.assert_allclose(a[:, filled], b[:, filled], rtol=0, atol=5e-5)
                for field in ("block", "planned", "iterative", "rounds", "committed"):
                    np.testing.assert_array_equal(
                        getattr(after.trace, field), getattr(before.trace, field), field
                    )
                assert after.row.forwards <= ours.num_forwards
                made += int(ours.num_forwards)
                saved += int(ours.num_forwards - after.row.forwards)
    assert 0.25 < saved / made < 0.4, "what rides along is used"


def test_temperature_ahead_of_need(eventful):
    batch = [hot(case, 1.0, seed) for seed, case in enumerate(eventful)]
    saved = 0
    for ours, ahead in zip(sample(batch), sample(batch, shape=AHEAD), strict=True):
        assert raw_ids(ours) == raw_ids(ahead)
        assert ahead.num_forwards <= ours.num_forwards
        saved += ours.num_forwards - ahead.num_forwards
    assert saved > len(batch)


def test_a_trace_is_replayed_whatever_the_logits_say(eventful):
    """A model with other weights repeats a recorded course: the same plans and passes."""
    never = [c._replace(config=dataclasses.replace(c.config, eos_id=NEVER)) for c in eventful]
    recorded = final_state(never, shape=AHEAD)
    other = jax.tree.map(lambda x: x[..., ::-1], PARAMS)
    replay = Replay(recorded.trace.planned, recorded.trace.accepted, recorded.row.iterations)
    prompts, requests, *special = arguments(never)
    led_inputs = prompts, requests.replace(replay=replay), *special
    led = jax.device_get(decode.DECODER.decode(MODEL, other, *led_inputs, shape=AHEAD))
    unled = jax.device_get(decode.DECODER.decode(MODEL, other, *arguments(never), shape=AHEAD))
    for field in ("block", "planned", "iterative", "rounds", "accepted", "committed", "forwards"):
        np.testing.assert_array_equal(getattr(led.trace, field), getattr(recorded.trace, field), field)
    assert (led.tokens != recorded.tokens).any() and (unled.trace.committed != led.trace.committed).any()


def test_a_pass_has_a_few_sizes():
    assert pass_sizes(24, 32) == [24] and pass_sizes(64, 32) == [32, 64] and pass_sizes(96, 32) == [48, 96]
    assert pass_sizes(256, 32) == [32, 64, 128, 256] and pass_sizes(256, 64) == [64, 128, 256]
