"""The slot decoder equals a transcription of the authors' algorithm, whatever the batch and the devices."""

import collections
import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transcription
from decoding import (
    CASES,
    CLOSE_CALL,
    EOS_IDS,
    LOST,
    MODEL,
    PARAMS,
    SHAPE,
    WHOLE,
    Case,
    Run,
    Whole,
    arguments,
    as_mask,
    assert_same,
    committed_places,
    final_state,
    raw_ids,
    rows_of,
    run,
    sample,
    steps,
)
from whole_params import load_params

from refusion_jax.checkpoints import hugging_face as hf
from refusion_jax.decode import loop as decode
from refusion_jax.decode.config import DecodeConfig
from refusion_jax.decode.row_state import Phase
from refusion_jax.model.transformer import Transformer
from refusion_jax.sharding import MeshConfig, layout, make_mesh

ORACLE = Path(__file__).parent / "data" / "oracle" / "tiny_a"
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


@pytest.fixture(scope="module")
def compilations():
    """The number of compilations of `Decoder.resume` after all of CASES were decoded."""
    before = decode.DECODER.resume._cache_size()
    for semantics in CASES:
        run(semantics)
    return decode.DECODER.resume._cache_size() - before


@pytest.fixture(params=["release", "fixed"])
def each(request, compilations) -> Run:
    return run(request.param)


# Against the transcription.


def test_the_transcription_reproduces_the_recordings():
    """Checks some recordings; test_parity.py compares the package with all."""
    model, params = Transformer(hf.read_config(ORACLE)), load_params(ORACLE, hf.read_config(ORACLE))
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


def test_everything_that_can_happen_happened(each):
    """The tests below cover a branch only if some case takes it."""
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
    """The transcription's mask decides: isolated slots after infilling, joint ones after verification."""
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


def test_fixed_semantics_leaves_no_holes():
    fixed = run("fixed")
    for case, ours in zip(fixed.cases, fixed.ours, strict=True):
        places, start = committed_places(case, ours), len(case.prompt)
        until_eos = min(int(ours.num_ids) + 1, int(ours.num_raw))
        assert places[:until_eos] == list(range(start, start + until_eos)), case
        if ours.num_ids == ours.num_raw:
            assert ours.num_raw == case.config.gen_length, case


def test_release_semantics_has_the_holes_that_fixed_fills(monkeypatch):
    """The same requests under both semantics differ exactly where slots before an EOS are lost.

    This model chooses mask tokens now and then, which `fixed` removes; here it does not.
    """
    monkeypatch.setattr("refusion_jax.decode.batch.removed_ids", lambda config: (-1, -1))
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
    """The cases above differ in prompt, lengths, slot size, thresholds, EOS id and semantics; so do these."""
    before = decode.DECODER.resume._cache_size(), decode.DECODER.begin._cache_size()
    assert compilations <= 1 <= before[0]  # 0 if an earlier test compiled it
    hot = [
        Case([1] * i, DecodeConfig(5, 6, 24, 3, 2, 0.5, 0.1, temperature=0.3 * i, seed=i)) for i in range(9)
    ]
    for batch in (hot[:8], hot[8:], hot[3:5]):
        sample(batch)
    assert (decode.DECODER.resume._cache_size(), decode.DECODER.begin._cache_size()) == before
    state = jax.eval_shape(
        functools.partial(decode.DECODER.init, MODEL, shape=SHAPE), *arguments(hot[:8])[:2]
    )
    assert state.tokens.shape == (8, 56) and state.cache.layers[1].shape == (2, 8, 56, 2, 8)


# Invariance to batch and devices.


def test_neighbours_do_not_matter(compilations):
    """All requests with one EOS id, of both semantics and all settings, shuffled into other batches."""
    every = [pair for s in CASES for pair in zip(CASES[s], run(s).ours, strict=True)]
    for eos_id in EOS_IDS:
        group = [(case, ours) for case, ours in every if case.config.eos_id == eos_id]
        np.random.default_rng(0).shuffle(group)
        for start in range(0, len(group), SHAPE.rows):
            shuffled = group[start : start + SHAPE.rows]
            for again, (_, ours) in zip(sample([case for case, _ in shuffled]), shuffled, strict=True):
                assert_same(again, ours)


def test_batch_size_does_not_matter(compilations):
    """A request decoded in a batch of one row, and with seven padding rows."""
    alone = dataclasses.replace(SHAPE, rows=1)
    for s in CASES:
        for case, ours in list(zip(CASES[s], run(s).ours, strict=True))[::9]:
            (again,) = sample([case], shape=alone)
            assert_same(again, ours)
        (padded,) = sample([case])
        assert_same(padded, ours)


def test_devices_do_not_matter(compilations):
    """Parameters sharded over four devices, with heads and widths split."""
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
