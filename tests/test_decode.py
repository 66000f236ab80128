"""The slot decoder against a transcription of the authors' algorithm, and what must not matter to it.

A tiny random model stands in for a trained one. Random weights are unsure of everything, so the head is
scaled up, and thresholds are spread widely enough for everything that can happen to happen
(test_everything_that_can_happen_happened).
"""

import collections
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transcription

from refusion_jax import decode, hf
from refusion_jax.answers import Replay, read
from refusion_jax.errors import BadInput
from refusion_jax.forward import pass_sizes
from refusion_jax.kv_cache import insert_rows
from refusion_jax.model import ModelConfig, Transformer
from refusion_jax.requests import DecodeConfig, Requests, Shape, bucket
from refusion_jax.rows import Phase, own_entries
from refusion_jax.samples import Samples
from refusion_jax.scores import Heat, score
from refusion_jax.sharding import MeshConfig, layout, make_mesh, unbox

ORACLE = Path(__file__).parent / "data" / "oracle" / "tiny_a"
CONFIG = ModelConfig(
    vocab_size=24,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    rope_theta=1e4,
)
MASK, NEVER = 3, 1000  # no token of the vocabulary has the id NEVER
EOS_IDS = (7, 14, 8, 1, 2, 11, 23, NEVER)  # from rare to frequent in what the model says
# Big enough for every request below; one phase a pass, as the authors decode.
SHAPE = Shape(rows=8, prompt=8, gen=48, block=32, slots=8, iterations=12, trace=True)
AHEAD = dataclasses.replace(SHAPE, ahead=64)
EVERYTHING = {
    "prefix",
    "prefix with EOS",
    "drafts rejected",
    "slots before an EOS are left",
    "iterative",
    "iterative with EOS",
    "one slot infilled",
    "several slots infilled",
    "rows after an EOS leave",
    "rows before an EOS go on",
    "fallback",
    "later blocks",
}
LOST = "slots before an EOS are lost"  # in `release` alone
# In logits: a decision nearer than this to falling otherwise may do so for the order of a sum.
CLOSE_CALL = 5e-5


def random_params():
    abstract = jax.eval_shape(
        Transformer(CONFIG).init, jax.random.key(0), *[jnp.zeros((1, 1), jnp.int32)] * 2
    )
    random = np.random.default_rng(1)

    def draw(path, leaf):
        centre, scale = {"scale": (1, 0.2), "head": (0, 0.5)}.get(path[-1].key, (0, 0.25))
        return jnp.asarray(centre + scale * random.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, unbox(abstract["params"]))


MODEL, PARAMS = Transformer(CONFIG), random_params()


class Case(NamedTuple):
    prompt: list[int]
    config: DecodeConfig


def cases(semantics: str, count: int) -> list[Case]:
    """Prompts and settings at random; SHAPE.rows in a row share an EOS id, so that they can be batched."""
    random = np.random.default_rng(7)
    lengths = [(32, 4, 1), (32, 8, 1), (32, 8, 2), (48, 4, 3), (24, 2, 3), (16, 16, 1), (8, 1, 1), (48, 8, 3)]
    if semantics == "release":
        lengths += [(10, 4, 1), (36, 4, 8)]  # rounded up to 12; cut into 8 blocks of 4, four tokens lost
    made = []
    for i in range(count):
        gen_length, slot_size, num_blocks = lengths[random.integers(len(lengths))]
        prompt = random.integers(0, CONFIG.vocab_size, random.integers(0, 9)).tolist()
        slot_threshold = random.choice([-1, 0.25, 0.3, 0.4, 0.6, 1])
        config = DecodeConfig(
            mask_id=MASK,
            eos_id=EOS_IDS[i // SHAPE.rows % len(EOS_IDS)],
            gen_length=gen_length,
            slot_size=slot_size,
            num_blocks=num_blocks,
            # After no prompt all masks are alike, and which is the most confident is float noise.
            slot_threshold=float(slot_threshold) if prompt else -1.0,
            token_threshold=float(random.choice([-1, 0.003, 0.01, 0.03, 0.1, 0.5, 1])),
            semantics=semantics,
        )
        made.append(Case(prompt, config))
    return made


CASES = {semantics: cases(semantics, 64) for semantics in ("release", "fixed")}


def batches(cases: Sequence[Case]) -> Iterator[Sequence[Case]]:
    return (cases[i : i + SHAPE.rows] for i in range(0, len(cases), SHAPE.rows))


def sample(cases: Sequence[Case], model=MODEL, params=PARAMS, shape=SHAPE) -> list[Samples]:
    """`decode.sample` of a batch, taken apart into rows."""
    together = decode.sample(model, params, [c.prompt for c in cases], [c.config for c in cases], shape=shape)
    together = jax.device_get(together)
    return [jax.tree.map(lambda x, row=row: x[row], together) for row in range(len(cases))]


def arguments(cases: Sequence[Case]):
    """What `decode.decode`, `first_step` and `step` take of a batch."""
    prompts, requests = Requests.batch(
        [c.prompt for c in cases], [c.config for c in cases], SHAPE, CONFIG.vocab_size
    )
    return prompts, requests, jnp.int32(MASK), jnp.int32(cases[0].config.eos_id)


def final_state(cases: Sequence[Case], model=MODEL, params=PARAMS, shape=SHAPE) -> decode.DecodeState:
    """The state a batch ends in; as compiled for `sample`."""
    return jax.device_get(decode.decode(model, params, *arguments(cases), shape=shape))


def steps(case: Case, samples: Samples) -> list[transcription.Step]:
    """The trace of a row as the transcription writes it."""
    made, config = [], case.config
    for i in range(int(samples.num_iterations)):
        entry = jax.tree.map(lambda x, i=i: x[i], samples.trace)
        start = len(case.prompt) + int(entry.block) * config.block_len
        made.append(
            transcription.Step(
                block=int(entry.block),
                planned=(start + config.slot_size * np.flatnonzero(entry.planned)).tolist(),
                branch="iterative" if entry.iterative else "prefix",
                rounds=int(entry.rounds),
                committed=(start + np.flatnonzero(entry.committed)).tolist(),
                forwards=int(entry.forwards),
            )
        )
    return made


def raw_ids(samples: Samples) -> list[int]:
    return samples.raw_ids[: samples.num_raw].tolist()


def rows_of(state: decode.DecodeState, index) -> decode.DecodeState:
    """The state of some rows of the batch."""
    rest = jax.tree.map(lambda x: x[index], state.replace(cache=None))
    return rest.replace(cache=state.cache.rows(index))


class Whole:
    """A model as the transcription calls it: without a cache, padded to one length."""

    def __init__(self, model, params, length: int):
        self._apply = jax.jit(
            lambda tokens, positions, mask: model.apply({"params": params}, tokens, positions, mask=mask)
        )
        self._length = length

    def __call__(self, tokens, positions, mask):
        return self.with_kv(tokens, positions, mask)[0]

    def with_kv(self, tokens, positions, mask):
        n, length = len(tokens), self._length
        padded = np.eye(length, dtype=bool)
        padded[:n, :n] = mask
        tokens, positions = (np.pad(np.asarray(x, np.int32), (0, length - n)) for x in (tokens, positions))
        logits, kv = jax.device_get(self._apply(tokens[None], positions[None], padded[None]))
        return logits[0, :n], jax.tree.map(lambda x: x[:, 0, :n], kv)


WHOLE = Whole(MODEL, PARAMS, SHAPE.prompt + SHAPE.gen)


def transcribed(case: Case, forward=WHOLE) -> transcription.Decoded:
    settings = dataclasses.asdict(case.config)
    del settings["temperature"], settings["seed"]
    return transcription.decode(forward, case.prompt, **settings)


class Run(NamedTuple):
    """All cases of one semantics, decoded by the package and by the transcription."""

    cases: list[Case]
    ours: list[Samples]
    states: list[decode.DecodeState]
    plain: list[transcription.Decoded]


@functools.cache
def run(semantics: str) -> Run:
    ours, states = [], []
    for batch in batches(CASES[semantics]):
        ours += sample(batch)
        state = final_state(batch)
        states += [rows_of(state, row) for row in range(len(batch))]
    return Run(CASES[semantics], ours, states, [transcribed(case) for case in CASES[semantics]])


@pytest.fixture(scope="module")
def compilations():
    """How often `decode.resume` was compiled until all of CASES were decoded."""
    before = decode._resume._cache_size()
    for semantics in CASES:
        run(semantics)
    return decode._resume._cache_size() - before


@pytest.fixture(params=["release", "fixed"])
def each(request, compilations) -> Run:
    return run(request.param)


# Against the transcription.


def test_the_transcription_reproduces_the_recordings():
    """Some of them; test_parity.py compares the package with all."""
    model, params = Transformer(hf.read_config(ORACLE)), hf.load_params(ORACLE, hf.read_config(ORACLE))
    forward = Whole(model, params, 96)
    compared = collections.Counter()
    for record in json.loads((ORACLE / "decode.json").read_text())["cases"]:
        asked = record["params"]
        if len(record["prompt"]) + asked["gen_length"] > 96 or record["n_forward"] > 12:
            continue
        settings = {
            name: asked[name] for name in ("gen_length", "slot_size", "slot_threshold", "token_threshold")
        }
        ids = {"mask_id": 3, "eos_id": 2}
        plain = transcription.decode(
            forward,
            record["prompt"],
            **settings,
            **ids,
            num_blocks=asked["serial_num_blocks"],
            semantics="release",
        )
        assert record["prompt"] + plain.in_text_order(len(record["prompt"]))[0] == record["x"]
        assert plain.forwards == record["n_forward"]
        kv = forward.with_kv(plain.tokens, plain.positions, as_mask(plain.sees))[1]
        keys, values = (x[-1].sum((-1, -2)) for x in kv)
        at = len(record["prompt"])
        for ours, theirs in zip(plain.steps, record["steps"], strict=True):
            names = ("block", "chosen", "branch", "loops", "pos")
            assert list(ours[:5]) == [theirs[name] for name in names]
            part = slice(at, at + len(ours.committed))
            np.testing.assert_allclose(keys[part], theirs["k_sum"], rtol=0, atol=2e-4)
            np.testing.assert_allclose(values[part], theirs["v_sum"], rtol=0, atol=2e-4)
            at = part.stop
        compared.update(plain.seen)
    assert min(compared[name] for name in EVERYTHING) > 0, compared


def as_mask(sees: Sequence[Sequence[int]]) -> np.ndarray:
    mask = np.zeros((len(sees), len(sees)), bool)
    for i, seen in enumerate(sees):
        mask[i, seen] = True
    return mask


def test_everything_that_can_happen_happened(each):
    """The tests below prove something of a branch only if it was taken."""
    seen = collections.Counter(name for plain in each.plain for name in plain.seen)
    assert min(seen[name] for name in EVERYTHING) > 1, seen
    if each is run("release"):
        assert seen[LOST] > 1, seen
    close = sum(plain.margin < CLOSE_CALL for plain in each.plain)
    assert close < len(each.plain) / 20, close
    assert sum(int(samples.num_ids) == int(samples.num_raw) for samples in each.ours) > 5, (
        "no EOS, full length"
    )


def test_sample_is_the_transcription(each):
    for case, ours, plain in zip(each.cases, each.ours, each.plain, strict=True):
        if plain.margin < CLOSE_CALL:
            continue
        tokens, _ = plain.in_text_order(len(case.prompt))
        assert raw_ids(ours) == tokens, case
        first_eos = tokens.index(case.config.eos_id) if case.config.eos_id in tokens else len(tokens)
        assert ours.num_ids == first_eos, case
        assert ours.num_forwards == plain.forwards, case
        assert ours.num_iterations == len(plain.steps), case
        assert steps(case, ours) == plain.steps, case
        assert (ours.raw_ids[ours.num_raw :] == 0).all()


def test_cached_keys_and_values_are_those_of_the_pass_that_committed_them(each):
    """Isolated after infilling, joint after verifying: what the transcription lets a token see."""
    for case, state, plain in zip(each.cases, each.states, each.plain, strict=True):
        if plain.margin < CLOSE_CALL:
            continue
        assert np.flatnonzero(state.cache.filled).tolist() == sorted(plain.positions), case
        assert state.tokens[plain.positions].tolist() == plain.tokens, case
        if not plain.tokens:
            continue
        _, kv = WHOLE.with_kv(plain.tokens, plain.positions, as_mask(plain.sees))
        for ours, theirs in zip(jax.tree.leaves(state.cache.layers), jax.tree.leaves(kv), strict=True):
            np.testing.assert_allclose(ours[:, plain.positions], theirs, rtol=0, atol=5e-5, err_msg=str(case))


def committed_places(case: Case, samples: Samples) -> list[int]:
    return sorted(place for step in steps(case, samples) for place in step.committed)


def test_fixed_semantics_leaves_no_holes():
    fixed = run("fixed")
    for case, ours in zip(fixed.cases, fixed.ours, strict=True):
        places, start = committed_places(case, ours), len(case.prompt)
        until_eos = min(int(ours.num_ids) + 1, int(ours.num_raw))
        assert places[:until_eos] == list(range(start, start + until_eos)), case
        if ours.num_ids == ours.num_raw:
            assert ours.num_raw == case.config.gen_length, case


def test_release_semantics_has_the_holes_that_fixed_fills():
    """The same requests under both: they part exactly where slots before an EOS are lost."""
    release = run("release")
    differing = 0
    for first in range(0, len(release.cases), SHAPE.rows):
        numbers, batch = [], []
        for i in range(first, first + SHAPE.rows):
            prompt, config = release.cases[i]
            if config.gen_length % (config.num_blocks * config.slot_size) == 0:
                numbers.append(i)
                batch.append(Case(prompt, dataclasses.replace(config, semantics="fixed")))
        for i, case, fixed in zip(numbers, batch, sample(batch), strict=True):
            lost = LOST in release.plain[i].seen
            assert (raw_ids(fixed) == raw_ids(release.ours[i])) == (not lost), case
            if lost:
                differing += 1
                places = committed_places(case, release.ours[i])
                assert places != list(range(len(case.prompt), len(case.prompt) + len(places))), case
                assert fixed.num_raw > release.ours[i].num_raw, case
    assert differing > 1


# One compilation.


def test_one_compilation_serves_every_request(compilations):
    """Prompts, lengths, slot sizes, thresholds, EOS ids and semantics differed; so do these."""
    before = decode._resume._cache_size(), decode._begin._cache_size()
    assert compilations <= 1 <= before[0]  # 0 where a test before this one has compiled
    hot = [
        Case([1] * i, DecodeConfig(5, 6, 24, 3, 2, 0.5, 0.1, temperature=0.3 * i, seed=i)) for i in range(9)
    ]
    for batch in (hot[:8], hot[8:], hot[3:5]):
        sample(batch)
    assert (decode._resume._cache_size(), decode._begin._cache_size()) == before
    state = jax.eval_shape(functools.partial(decode.init, MODEL, shape=SHAPE), *arguments(hot[:8])[:2])
    assert state.tokens.shape == (8, 56) and state.cache.layers[1].shape == (2, 8, 56, 2, 8)


# What must not matter.


def assert_same(ours: Samples, theirs: Samples) -> None:
    """Bit-equal but for the confidences in the trace."""
    for field in ("raw_ids", "num_raw", "num_ids", "num_forwards", "num_iterations"):
        np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field), field)
    for field in ("block", "planned", "iterative", "rounds", "committed", "forwards"):
        np.testing.assert_array_equal(getattr(ours.trace, field), getattr(theirs.trace, field), field)
    np.testing.assert_allclose(ours.trace.confidence, theirs.trace.confidence, rtol=0, atol=1e-5)


def test_neighbours_do_not_matter(compilations):
    """All requests of one EOS id, both semantics, all settings, shuffled into other batches."""
    every = [pair for s in CASES for pair in zip(CASES[s], run(s).ours, strict=True)]
    for eos_id in EOS_IDS:
        group = [(case, ours) for case, ours in every if case.config.eos_id == eos_id]
        np.random.default_rng(0).shuffle(group)
        for start in range(0, len(group), SHAPE.rows):
            shuffled = group[start : start + SHAPE.rows]
            for again, (_, ours) in zip(sample([case for case, _ in shuffled]), shuffled, strict=True):
                assert_same(again, ours)


def test_batch_size_does_not_matter(compilations):
    """Alone, in a batch of one row, and with seven rows of padding."""
    alone = dataclasses.replace(SHAPE, rows=1)
    for s in CASES:
        for case, ours in list(zip(CASES[s], run(s).ours, strict=True))[::9]:
            (again,) = sample([case], shape=alone)
            assert_same(again, ours)
        (padded,) = sample([case])
        assert_same(padded, ours)


def test_devices_do_not_matter(compilations):
    """Parameters spread over four devices, heads and widths split."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    nothing = jnp.zeros((1, 1), jnp.int32)
    boxed = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), nothing, nothing)["params"])
    spread = jax.device_put(PARAMS, layout(boxed, mesh).shardings)
    assert not spread["layers_0"]["mlp"]["up"].is_fully_replicated
    fixed = run("fixed")
    for start in (0, 24):
        rows = slice(start, start + SHAPE.rows)
        for again, ours in zip(sample(fixed.cases[rows], params=spread), fixed.ours[rows], strict=True):
            assert_same(again, ours)


def test_rows_of_padding_do_nothing(compilations):
    state = final_state(CASES["fixed"][:3])
    assert (state.row.phase == Phase.DONE).all()
    padding = rows_of(state, slice(3, None))
    assert (
        not padding.cache.filled.any() and not padding.row.forwards.any() and not padding.row.iterations.any()
    )
    assert all(
        (leaf == 0).all() for leaf in jax.tree.leaves((padding.cache.layers, padding.tokens, padding.trace))
    )


# The loop.


def test_a_cache_by_layer_holds_what_one_array_does(eventful):
    """As TPUs have it: arrays of layers one by one."""
    ours, theirs = final_state(eventful, MODEL.clone(cache_by_layer=True)).cache, final_state(eventful).cache
    assert len(ours.layers[0]) == CONFIG.num_layers and ours.layers[0][0].shape == theirs.layers[0].shape[1:]
    row, whole = ours.rows(3), theirs.rows(3)
    for by_layer, together in zip(row.layers, whole.layers, strict=True):
        for a, b in zip(by_layer, together, strict=True):
            np.testing.assert_allclose(a[whole.filled], b[whole.filled], rtol=0, atol=1e-6)


apply = jax.jit(lambda *args: MODEL.apply({"params": PARAMS}, *args))
feeds = jax.jit(decode.fed_by, static_argnames="ahead")
one_pass = functools.partial(decode.resume, passes=1, shape=SHAPE)


def python_loop(cases: Sequence[Case], between=lambda state: state) -> list[decode.DecodeState]:
    """`decode.decode` as a Python loop: the states before each step and at the end."""
    *inputs, mask_id, eos_id = arguments(cases)
    states = [between(decode.begin(MODEL, PARAMS, *inputs, mask_id, eos_id, shape=SHAPE))]
    while not states[-1].done.all():
        before = jax.tree.map(jnp.copy, states[-1])
        states.append(between(one_pass(MODEL, PARAMS, before, mask_id, eos_id)))
    return states


@pytest.fixture(scope="module")
def eventful(compilations) -> Sequence[Case]:
    """The batch in which most happens."""
    fixed = run("fixed")

    def happened(first: int) -> int:
        return len({name for plain in fixed.plain[first : first + SHAPE.rows] for name in plain.seen})

    first = max(range(0, len(fixed.cases), SHAPE.rows), key=happened)
    assert happened(first) >= 8
    return fixed.cases[first : first + SHAPE.rows]


@pytest.fixture(scope="module")
def states(eventful) -> list[decode.DecodeState]:
    return python_loop(eventful)


def assert_same_state(ours: decode.DecodeState, theirs: decode.DecodeState, atol: float) -> None:
    """Equal where something is committed; what else lies in the buffers has no meaning."""
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
    """Entries without an accepted token are overwritten with huge values between all steps."""

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
    """Logits, keys and values of one pass with all slots of a row, against a pass for each."""
    compared = 0
    for state in jax.device_get(states):
        several = (state.row.phase == Phase.INFILL) & (state.row.open.sum(1) > 1)
        if not several.any() or compared > 12:
            continue
        fed = jax.device_get(feeds(state, jnp.int32(MASK), ahead=0))
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
                # Padded to one width, so that all slot sizes share a compilation.
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


# Ahead of need.


def test_predictions_ahead_of_need_save_passes_and_change_nothing_else(compilations):
    """Every case again, with what comes next riding along: the same answers, traces and cached values."""
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
    for ours, ahead in zip(sample(batch), sample(batch, shape=AHEAD), strict=True):
        assert raw_ids(ours) == raw_ids(ahead)
        assert ahead.num_forwards < ours.num_forwards


def test_a_trace_is_replayed_whatever_the_logits_say(eventful):
    """A model with other weights is led along the recorded course: the same plans and passes."""
    never = [c._replace(config=dataclasses.replace(c.config, eos_id=NEVER)) for c in eventful]
    recorded = final_state(never, shape=AHEAD)
    other = jax.tree.map(lambda x: x[..., ::-1], PARAMS)
    replay = Replay(recorded.trace.planned, recorded.trace.accepted, recorded.row.iterations)
    led = jax.device_get(decode.decode(MODEL, other, *arguments(never), replay, shape=AHEAD))
    unled = jax.device_get(decode.decode(MODEL, other, *arguments(never), shape=AHEAD))
    for field in ("block", "planned", "iterative", "rounds", "accepted", "committed", "forwards"):
        np.testing.assert_array_equal(getattr(led.trace, field), getattr(recorded.trace, field), field)
    assert (led.tokens != recorded.tokens).any() and (unled.trace.committed != led.trace.committed).any()


def test_a_pass_has_a_few_sizes():
    assert pass_sizes(24, 32) == [24] and pass_sizes(64, 32) == [32, 64] and pass_sizes(96, 32) == [48, 96]
    assert pass_sizes(256, 32) == [32, 64, 128, 256] and pass_sizes(256, 64) == [64, 128, 256]


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_row_may_be_taken_in_while_others_are_under_way(eventful, by_layer):
    """Two rows of a running batch are replaced by requests that have made their first pass elsewhere."""
    batch, model = eventful[:4], MODEL.clone(cache_by_layer=by_layer)
    *inputs, mask_id, eos_id = arguments(batch)
    state = decode.begin(model, PARAMS, *inputs, mask_id, eos_id, shape=SHAPE)
    assert isinstance(state.cache.layers[0], tuple) is by_layer
    state = decode.resume(model, PARAMS, state, mask_id, eos_id, passes=3, shape=SHAPE)
    two = dataclasses.replace(SHAPE, rows=2)
    late = decode.prepare(MODEL, [c.prompt for c in eventful[4:6]], [c.config for c in eventful[4:6]], two)
    begun = decode.begin(model, PARAMS, *late[:4], shape=two)
    state = insert_rows(state, begun, np.asarray([6, 1], np.int32))
    samples = decode.finish(decode.resume(model, PARAMS, state, mask_id, eos_id, shape=SHAPE), eos_id, SHAPE)
    rows = [jax.tree.map(lambda x, row=row: x[row], jax.device_get(samples)) for row in range(8)]
    undisturbed = sample(eventful)
    for row, case in {0: 0, 1: 5, 2: 2, 3: 3, 6: 4}.items():
        assert_same(rows[row], undisturbed[case])


# Temperature.


def hot(case: Case, temperature: float, seed: int = 0) -> Case:
    return case._replace(config=dataclasses.replace(case.config, temperature=temperature, seed=seed))


def test_a_seed_decides_and_the_batch_does_not(eventful):
    batch = [hot(case, 1.0, seed) for seed, case in enumerate(eventful)]
    ours = sample(batch)
    for again, first in zip(sample(batch), ours, strict=True):
        assert_same(again, first)
    for again, first in zip(sample(batch[::-1])[::-1], ours, strict=True):
        assert_same(again, first)
    (alone,) = sample(batch[2:3])
    assert_same(alone, ours[2])
    # Cold neighbours stay cold.
    mixed = [case if i % 2 else batch[i] for i, case in enumerate(eventful)]
    for i, (got, cold) in enumerate(zip(sample(mixed), sample(eventful), strict=True)):
        assert_same(got, cold if i % 2 else ours[i])


def test_seeds_differ(compilations):
    case = Case([5, 9, 2], DecodeConfig(MASK, NEVER, gen_length=32))
    assert len({tuple(raw_ids(s)) for s in sample([hot(case, 3.0, seed) for seed in range(8)])}) == 8


def test_no_temperature_is_the_limit_of_a_small_one(eventful):
    for tiny, cold in zip(sample([hot(case, 1e-9) for case in eventful]), sample(eventful), strict=True):
        assert_same(tiny, cold)


def test_drafts_are_samples_of_the_tempered_softmax_with_confidence_of_the_plain_one():
    """One token after one prompt, many seeds."""
    case, temperature, count = Case([5, 9, 2], DecodeConfig(MASK, NEVER, 1, 1)), 2.0, 640
    _, (logits,) = np.split(
        WHOLE(np.asarray([5, 9, 2, MASK]), np.arange(4), np.tril(np.ones((4, 4), bool))), [3]
    )
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
    """Of rows [B] in their plan: the first slot's draft and confidence, and what passes where."""

    draft: np.ndarray
    confidence: np.ndarray
    confident: np.ndarray
    next_passes: np.ndarray


@functools.partial(jax.jit, static_argnames="dtype")
def judge(state, logits, dtype, target):
    fed = decode.fed_by(state, jnp.int32(MASK), ahead=0)
    cold = Heat(*(jnp.zeros(SHAPE.block, x) for x in (jnp.float32, jnp.uint32, jnp.int32, jnp.int32)))
    scored = jax.vmap(lambda x, y: score(x, y, cold))(logits, jnp.full(logits.shape[:2], target))
    verifying = state.row.replace(phase=jnp.full_like(state.row.phase, Phase.VERIFY))
    # As if the masks fed were drafts to verify: place 0 of JOINT is the first token.
    fed = fed.replace(place=jnp.broadcast_to(jnp.arange(SHAPE.block), fed.place.shape))
    answer = jax.vmap(lambda *args: read(*args, None, dtype))(scored, fed, verifying, state.requests)
    return Judged(answer.draft, answer.confidence, answer.confident, answer.passes)


def scores(logits: np.ndarray, configs: Sequence[DecodeConfig], target=0) -> Judged:
    """What rows make of their logits [V], all alike along the block."""
    prompts, requests, *_ = arguments([Case([1], config) for config in configs])
    state = decode.init(MODEL, prompts, requests, shape=SHAPE)
    logits = np.broadcast_to(logits, (SHAPE.rows, SHAPE.block, logits.shape[-1]))
    return jax.device_get(judge(state, logits, logits.dtype, target))


def test_thresholds_are_strict():
    thresholds = [1.0, 2.0, 0.999, 0.0, -1.0]
    configs = [DecodeConfig(MASK, NEVER, slot_threshold=x, token_threshold=x) for x in thresholds]
    logits = np.zeros(CONFIG.vocab_size, np.float32)
    logits[7] = 200  # a probability of 1, and of 0 for all others
    sure = scores(logits, configs, target=7)
    assert sure.confidence[0, 0] == 1 and sure.draft[0, 0] == 7
    assert (
        sure.confident[:5, 0].tolist() == sure.next_passes[:5, 1].tolist() == [False, False, True, True, True]
    )
    assert scores(logits, configs, target=8).next_passes[:5, 1].tolist() == [False, False, False, False, True]


def test_release_rounds_probabilities_and_thresholds_to_the_type_of_the_logits():
    """p = 0.4005 is above 0.4, but rounded to bfloat16 they are the same number."""
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


# Shapes.


def test_a_shape_fits_all_requests():
    prompts = [[1] * 5, [1] * 17]
    configs = [DecodeConfig(MASK, 2, 48, 4, 2), DecodeConfig(MASK, 2, 32, 16, 2)]
    shape = Shape.fitting(prompts, configs)
    assert shape.prompt >= 17
    assert shape == Shape(2, shape.prompt, gen=48, block=24, slots=6, iterations=12)
    assert Shape.fitting(prompts, configs, rows=8, trace=True) == dataclasses.replace(
        shape, rows=8, trace=True
    )
    sizes = [bucket(length) for length in range(200)]
    assert sizes == sorted(sizes) and all(size >= length for length, size in enumerate(sizes))
    assert sorted(set(sizes)) == [4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]


# Mistakes.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gen_length": 20, "slot_size": 8}, "gen_length must be a multiple .* = 8, found gen_length 20"),
        ({"gen_length": 24, "slot_size": 8, "num_blocks": 2}, "multiple of num_blocks x slot_size = 16"),
        ({"gen_length": 0}, "gen_length must be a whole number from 1 .* found 0"),
        ({"gen_length": -8}, "gen_length .* found -8"),
        ({"gen_length": 8.0}, "gen_length .* found 8.0"),
        ({"gen_length": True}, "gen_length .* found True"),
        ({"gen_length": 1 << 40}, "gen_length .* found"),
        ({"slot_size": 0}, "slot_size .* found 0"),
        ({"num_blocks": 0}, "num_blocks .* found 0"),
        ({"slot_threshold": float("nan")}, "slot_threshold must be a finite number, found nan"),
        ({"token_threshold": float("inf")}, "token_threshold must be a finite number, found inf"),
        ({"token_threshold": "0.4"}, "token_threshold .* found '0.4'"),
        ({"temperature": -0.1}, "temperature must be 0 or above, found -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"seed": -1}, "seed .* found -1"),
        ({"seed": 1 << 32}, "seed"),
        ({"eos_id": None}, "eos_id .* found None"),
        ({"mask_id": -1}, "mask_id .* found -1"),
        ({"semantics": "paper"}, "semantics must be one of fixed, release, found 'paper'"),
        ({"semantics": "release", "gen_length": 20, "slot_size": 4, "num_blocks": 2}, "blocks of 10 tokens"),
        ({"semantics": "release", "gen_length": 4, "slot_size": 4, "num_blocks": 8}, "blocks of 0 tokens"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(BadInput, match=message):
        DecodeConfig(**{"mask_id": MASK, "eos_id": 2} | settings)


def test_lengths_that_release_makes_fit():
    def config(*lengths: int) -> DecodeConfig:
        return DecodeConfig(MASK, 2, *lengths, semantics="release")

    assert (config(10, 4, 1).block_len, config(10, 4, 1).response_len) == (12, 12)
    assert (config(36, 4, 8).block_len, config(36, 4, 8).response_len) == (4, 32)


@pytest.mark.parametrize(
    ("prompts", "change", "message"),
    [
        ([[1, CONFIG.vocab_size]], {}, "an id of a prompt must be a whole number from 0 to 23, found 24"),
        ([[-1]], {}, "found -1"),
        ([[1.5]], {}, "found 1.5"),
        ([["a"]], {}, "found 'a'"),
        ([], {}, "prompts"),
        ([[1]], {"mask_id": CONFIG.vocab_size}, "mask_id must be below the vocabulary size 24, found 24"),
    ],
)
def test_impossible_prompts(prompts, change, message):
    config = DecodeConfig(**{"mask_id": MASK, "eos_id": 2} | change)
    with pytest.raises(BadInput, match=message):
        decode.sample(MODEL, PARAMS, prompts, config)


def test_a_batch_has_one_mask_and_one_eos():
    configs = [DecodeConfig(MASK, 2), DecodeConfig(MASK, 4)]
    with pytest.raises(BadInput, match="must share mask_id and eos_id"):
        decode.sample(MODEL, PARAMS, [[1], [1]], configs)
    with pytest.raises(BadInput, match="as many settings as prompts"):
        decode.sample(MODEL, PARAMS, [[1]], configs)


def test_a_scanned_model_is_refused():
    with pytest.raises(ValueError, match="unstack_layers"):
        decode.sample(MODEL.clone(scan_layers=True), PARAMS, [[1]], DecodeConfig(MASK, 2))


@pytest.mark.parametrize(
    "case",
    [
        Case([1], DecodeConfig(MASK, NEVER, gen_length=96, slot_size=8, num_blocks=3)),
        Case([1], DecodeConfig(MASK, NEVER, gen_length=48, slot_size=8, num_blocks=1)),
        Case([1], DecodeConfig(MASK, NEVER, gen_length=32, slot_size=2, num_blocks=1)),
        Case([1], DecodeConfig(MASK, NEVER, gen_length=48, slot_size=2, num_blocks=3)),
        Case([1] * 9, DecodeConfig(MASK, NEVER, gen_length=8)),
    ],
    ids=["response", "block", "slots", "iterations", "prompt"],
)
def test_a_shape_that_does_not_hold_a_request_is_refused(compilations, case):
    with pytest.raises(BadInput):
        sample([case])


def test_as_many_settings_as_prompts_are_needed_with_a_shape_too(compilations):
    with pytest.raises(BadInput, match="as many settings as prompts"):
        decode.sample(MODEL, PARAMS, [[1], [2]], [DecodeConfig(MASK, NEVER, 8)], shape=SHAPE)
