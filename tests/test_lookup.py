"""Drafts looked up in a row's own context, against a plain transcription and AR decoding."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import CLOSE_CALL, MASK, MODEL, NEVER, PARAMS
from exact_transcription import decode, looked_up
from test_exact import SHAPE, WHOLE, by_ar, exact, ids, passes, random_cases, sample

from refusion_jax.decode import DecodeConfig, loop
from refusion_jax.decode.batch import Shape
from refusion_jax.decode.exact_inputs import most_fed
from refusion_jax.decode.inputs import filled_up
from refusion_jax.decode.lookup import following
from refusion_jax.decode.replay import exact_replay
from refusion_jax.errors import BadInput

LOOKUP = dataclasses.replace(SHAPE, masks_ahead=0, draft_from=("lookup",))
BOTH = dataclasses.replace(SHAPE, draft_from=("masks", "lookup"))


def lookup_cases(seed: int):
    return [
        (prompt, dataclasses.replace(config, draft_from="lookup")) for prompt, config in random_cases(seed)
    ]


def test_what_followed_the_latest_longest_match():
    find = jax.jit(following, static_argnums=2)
    random, seen = np.random.default_rng(0), collections.Counter()
    for _ in range(300):
        length, kinds = int(random.integers(0, 17)), int(random.integers(1, 6))
        context = random.integers(0, kinds, length).tolist()
        buffer = np.concatenate([context, random.integers(0, kinds, 16 - length)]).astype(np.int32)
        draft, count = jax.device_get(find(jnp.asarray(buffer), jnp.int32(length), 5))
        want = looked_up(context)[:5]
        assert draft[:count].tolist() == want, context
        seen[len(want)] += 1
    assert all(seen[count] > 5 for count in range(6)), seen
    longer = jnp.asarray([1, 2, 3, 4, 9, 2, 3, 5, 9, 3, 6, 1, 2, 3], jnp.int32)
    draft, count = find(longer, jnp.int32(14), 5)  # three tokens match at 0 though two match later
    assert draft[:count].tolist() == [4, 9, 2, 3, 5]


def test_it_is_the_transcription_and_ar_decoding():
    """Ids and every number of every pass; ids and number of passes against AR."""
    seen, close = collections.Counter(), 0
    for seed in range(60, 63):
        cases = lookup_cases(seed)
        _, by_one = by_ar(cases)
        for row, ((prompt, config), ours) in enumerate(zip(cases, sample(cases, LOOKUP), strict=True)):
            assert ids(ours) == by_one.raw_ids[row, : by_one.num_raw[row]].tolist(), config
            assert ours.num_forwards <= by_one.num_forwards[row]
            names = ("mask_id", "eos_ids", "gen_length", "draft_length", "first_token", "border_every")
            names += ("temperature", "seed", "draft_from")
            settings = {name: getattr(config, name) for name in names}
            want = decode(WHOLE, prompt, size=most_fed(LOOKUP), **settings)
            if want.margin < CLOSE_CALL:
                close += 1
                continue
            assert ids(ours) == want.tokens and passes(ours) == want.passes, config
            assert ours.num_iterations == sum(made.drafted > 0 for made in want.passes)
            assert not any(made.ahead for made in want.passes)
            for made in want.passes:
                kind = "all" if made.accepted == made.drafted else "some" if made.accepted else "none"
                seen[kind if made.drafted else "nothing found"] += 1
            seen["hot"] += config.temperature > 0
    assert close < 6 and all(seen[kind] for kind in ("all", "some", "none", "nothing found", "hot")), seen


@pytest.mark.long
def test_beside_rows_that_draft_from_masks():
    """In one batch, of which every second row looks up: the passes of each row alone."""
    by_masks, by_lookup = random_cases(64), lookup_cases(65)
    mixed = [pair[i % 2] for i, pair in enumerate(zip(by_masks, by_lookup, strict=True))]
    of_masks, of_lookup = sample(by_masks), sample(by_lookup, LOOKUP)
    for i, ours in enumerate(sample(mixed, BOTH)):
        want = (of_masks, of_lookup)[i % 2][i]
        assert ids(ours) == ids(want) and passes(ours) == passes(want)


def test_a_replay_makes_the_passes_that_were_recorded():
    recorded = sample([(p, dataclasses.replace(c, eos_id=NEVER)) for p, c in lookup_cases(66)], LOOKUP)
    courses = [[made._asdict() | {"branch": "exact"} for made in passes(samples)] for samples in recorded]
    config = exact(gen_length=32, draft_length=8, draft_from="lookup")
    batch = loop.DECODER.prepare(MODEL, [[1, 2]] * 8, config, LOOKUP)
    replay = exact_replay(courses, config, LOOKUP)
    requests = batch.requests.replace(exact=batch.requests.exact.replace(replay=replay))
    state = loop.DECODER.decode(
        MODEL, PARAMS, batch.prompts, requests, batch.mask_id, batch.eos_ids, shape=LOOKUP
    )
    samples = jax.device_get(loop.DECODER.finish(state, batch.eos_ids, LOOKUP))
    assert any(made.drafted for made in passes(recorded[0]))
    for row, want in enumerate(recorded):
        ours = jax.tree.map(lambda x, row=row: x[row], samples)
        assert [made[:3] for made in passes(ours)] == [made[:3] for made in passes(want)]


def test_shapes():
    """No mask tokens are made room for, and nothing is compiled where no request looks up."""
    configs = [exact(gen_length=8, draft_length=8, draft_from=where) for where in ("lookup", "masks")]
    alone, both = (Shape.exact([[1]] * len(c), c).padded() for c in (configs[:1], configs))
    assert alone.looks_up and not alone.drafts_by_masks and both.looks_up and both.drafts_by_masks
    assert filled_up(alone).masks_ahead == filled_up(alone, 64).masks_ahead == 0 < filled_up(both).masks_ahead
    by_masks = Shape.exact([[1]], configs[1:]).padded()
    assert not by_masks.looks_up
    batch = loop.DECODER.prepare(MODEL, [[1]], configs[1], by_masks)
    assert batch.requests.exact.lookup is None
    with pytest.raises(BadInput, match="draft_from must hold"):
        by_masks.check_holds(alone)
    one = filled_up(dataclasses.replace(alone, drafts=64), device_kind="NVIDIA H100 80GB HBM3")
    many = filled_up(dataclasses.replace(one, rows=32), device_kind="NVIDIA H100 80GB HBM3")
    assert not one.frugal and many.frugal


def test_mistakes():
    with pytest.raises(BadInput, match="draft_from must be one of masks, lookup, found 'prompt'"):
        exact(draft_from="prompt")
    with pytest.raises(BadInput, match="draft_from 'lookup' needs verify 'exact', found 'threshold'"):
        DecodeConfig(MASK, 2, draft_from="lookup")
