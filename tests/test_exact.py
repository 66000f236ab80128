"""Exact verification against its plain transcription and against AR decoding."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import CLOSE_CALL, CONFIG, MASK, MODEL, NEVER, PARAMS, Whole
from exact_transcription import Pass, decode

from refusion_jax.baselines.decoders import ar
from refusion_jax.baselines.decoders.config import ARConfig
from refusion_jax.decode import DecodeConfig, loop
from refusion_jax.decode.batch import Shape
from refusion_jax.decode.exact_inputs import most_fed
from refusion_jax.decode.inputs import filled_up
from refusion_jax.decode.replay import exact_replay
from refusion_jax.errors import BadInput
from refusion_jax.files import SMALL as SMALL_FOLDER
from refusion_jax.model.transformer import ModelConfig, Transformer
from refusion_jax.serving.opened import asked_settings
from refusion_jax.sharding import unbox

SIZES = (2, 3)  # slots; borders of both are at multiples of 6
SHAPE = Shape(rows=8, prompt=8, gen=32, iterations=32, trace=True, drafts=8, mask_readings=2, masks_ahead=200)
WHOLE = Whole(MODEL, PARAMS, 64)


def exact(eos_id=NEVER, **settings) -> DecodeConfig:
    return DecodeConfig(MASK, eos_id, verify="exact", slot_sizes=SIZES, **settings)


def random_cases(seed: int, count: int = 8) -> list[tuple[list[int], DecodeConfig]]:
    """Random prompts and settings; answers end at an EOS or at their length."""
    random = np.random.default_rng(seed)
    cases = []
    for i in range(count):
        first = ("next", "mask")[i % 2]
        least = 1 if first == "next" else 0
        config = exact(
            (14, 7),
            gen_length=int(random.integers(1, 33)),
            draft_length=int(random.integers(1, 9)),
            first_token=first,
            border=("ar", "draft")[i // 2 % 2],
            temperature=float(random.choice([0, 0, 0.7, 1.5])),
            seed=int(random.integers(1000)),
        )
        cases.append((random.integers(0, CONFIG.vocab_size, random.integers(least, 9)).tolist(), config))
    return cases


def sample(cases, shape=SHAPE, params=PARAMS):
    prompts, configs = zip(*cases, strict=True)
    samples = jax.device_get(loop.sample(MODEL, params, prompts, configs, shape=shape))
    return [jax.tree.map(lambda x, row=row: x[row], samples) for row in range(len(cases))]


def ar_config(config: DecodeConfig) -> ARConfig:
    names = ("mask_id", "eos_id", "gen_length", "temperature", "seed", "first_token", "border", "slot_sizes")
    return ARConfig(**{name: getattr(config, name) for name in names})


AR_SHAPE = Shape(rows=8, prompt=8, gen=32, mask_readings=1)


def by_ar(cases):
    prompts, configs = zip(*cases, strict=True)
    batch = ar.DECODER.prepare(MODEL, prompts, [ar_config(config) for config in configs], AR_SHAPE)
    state = ar.DECODER.decode(MODEL, PARAMS, *batch.inputs, shape=AR_SHAPE)
    return jax.device_get((state, ar.DECODER.finish(state, batch.eos_ids, AR_SHAPE)))


def ids(samples) -> list[int]:
    return samples.raw_ids[: samples.num_raw].tolist()


def passes(samples) -> list[Pass]:
    made = []
    for i in range(int(samples.num_forwards)):
        entry = jax.tree.map(lambda x, i=i: x[i].item(), samples.trace.exact)
        has_bonus = entry.committed > entry.accepted
        bonus = int(samples.raw_ids[entry.start + entry.committed - 1]) if has_bonus else None
        made.append(Pass(entry.start, entry.drafted, entry.accepted, bonus, entry.ahead))
    return made


@pytest.mark.parametrize("masks_ahead", [200, 13, 1])
def test_it_is_the_transcription(masks_ahead):
    """Ids and every number of every pass: with room for all outcomes, for some, for none beside drafts."""
    shape = dataclasses.replace(SHAPE, masks_ahead=masks_ahead)
    seen, close = collections.Counter(), 0
    for seed in range(3):
        cases = random_cases(seed)
        for (prompt, config), ours in zip(cases, sample(cases, shape), strict=True):
            names = ("mask_id", "eos_ids", "gen_length", "draft_length", "first_token", "border_every")
            settings = {name: getattr(config, name) for name in (*names, "temperature", "seed")}
            want = decode(WHOLE, prompt, size=most_fed(shape), **settings)
            if want.margin < CLOSE_CALL:
                close += 1
                continue
            assert ids(ours) == want.tokens, config
            assert passes(ours) == want.passes, config
            assert ours.num_forwards == len(want.passes)
            assert ours.num_iterations == sum(made.drafted > 0 for made in want.passes)
            ends = want.tokens[-1] in config.eos_ids
            assert ours.num_ids == len(want.tokens) - ends
            seen |= {"eos": int(ends), "length": int(not ends), "hot": int(config.temperature > 0)}
            for made in want.passes:
                seen["all accepted"] += made.accepted == made.drafted > 0
                seen["some accepted"] += 0 < made.accepted < made.drafted
                seen["none accepted"] += made.drafted > made.accepted == 0
                seen["no masks"] += not made.ahead and made is not want.passes[-1]
    assert close < 12
    kinds = ["eos", "length", "hot", "all accepted", "none accepted"]
    assert all(seen[kind] for kind in kinds + ["no masks"] * (masks_ahead == 1)), seen


def test_it_is_ar_decoding():
    """Ids, passes, and the cached keys and values."""
    saved = 0
    for seed in range(10, 14):
        cases = random_cases(seed)
        prompts, configs = zip(*cases, strict=True)
        batch = loop.DECODER.prepare(MODEL, prompts, configs, SHAPE)
        state = jax.device_get(loop.DECODER.decode(MODEL, PARAMS, *batch.inputs, shape=SHAPE))
        ours = jax.device_get(loop.DECODER.finish(state, batch.eos_ids, SHAPE))
        want_state, want = by_ar(cases)
        for row in range(len(cases)):
            assert ours.num_raw[row] == want.num_raw[row] and ours.num_ids[row] == want.num_ids[row]
            np.testing.assert_array_equal(ours.raw_ids[row], want.raw_ids[row])
            assert ours.num_forwards[row] <= want.num_forwards[row]
            np.testing.assert_array_equal(state.cache.filled[row], want_state.cache.filled[row])
            filled = state.cache.filled[row]
            for got, expected in zip(state.cache.layers, want_state.cache.layers, strict=True):
                np.testing.assert_allclose(got[:, row, filled], expected[:, row, filled], atol=5e-5)
        saved += int(want.num_forwards.sum() - ours.num_forwards.sum())
    assert saved > 50


def test_neighbours_batch_size_and_budget_do_not_matter():
    """In one batch with requests by thresholds, alone, and with another number of masks: the same ids."""
    cases = random_cases(20)
    eos = {"eos_id": (14, 7), "mask_id": MASK}
    slots = [
        DecodeConfig(
            **eos, gen_length=24, slot_size=4, num_blocks=2, slot_threshold=0.3, token_threshold=0.02
        ),
        DecodeConfig(**eos, gen_length=16, slot_size=8, num_blocks=1, slot_threshold=-1, token_threshold=0.5),
        DecodeConfig(
            **eos, gen_length=32, slot_size=2, num_blocks=4, semantics="release", token_threshold=0.01
        ),
    ]
    slot_cases = [([5, 6, 7 + i], config) for i, config in enumerate(slots)]
    mixed = [cases[0], slot_cases[0], cases[1], cases[2], slot_cases[1], slot_cases[2], cases[3], cases[4]]
    slot_shape = dataclasses.replace(SHAPE, block=16, slots=4, drafts=0, mask_readings=0, masks_ahead=0)
    together = sample(mixed, dataclasses.replace(SHAPE, block=16, slots=4, ahead=64, masks_ahead=30))
    alone = {id(case): own for case, own in zip(cases, sample(cases), strict=True)}
    alone |= {id(case): own for case, own in zip(slot_cases, sample(slot_cases, slot_shape), strict=True)}
    for case, ours in zip(mixed, together, strict=True):
        want = alone[id(case)]
        assert ids(ours) == ids(want) and ours.num_iterations >= 0
        if not case[1].exact:
            assert ours.num_iterations == want.num_iterations
            np.testing.assert_array_equal(ours.trace.planned, want.trace.planned)
    one = dataclasses.replace(SHAPE, rows=1)
    for case in cases[:3]:
        (ours,) = sample([case], one)
        assert ids(ours) == ids(alone[id(case)]) and passes(ours) == passes(alone[id(case)])


@pytest.mark.long
def test_a_row_that_accepts_little_drafts_little():
    """Frugal rows make other passes and give the same ids."""
    cases = random_cases(30)
    plain, frugal = sample(cases), sample(cases, dataclasses.replace(SHAPE, frugal=True))
    assert list(map(ids, plain)) == list(map(ids, frugal))
    drafted = [sum(made.drafted for case in kind for made in passes(case)) for kind in (plain, frugal)]
    assert 0 < drafted[1] < drafted[0]


@pytest.mark.long
def test_a_replay_makes_the_passes_that_were_recorded():
    """With other weights, whose drafts the model would not accept."""
    cases = [(prompt, dataclasses.replace(config, eos_id=NEVER)) for prompt, config in random_cases(40)]
    recorded = sample(cases)
    courses = [[made._asdict() | {"branch": "exact"} for made in passes(samples)] for samples in recorded]
    config = exact(gen_length=32, draft_length=8)
    batch = loop.DECODER.prepare(MODEL, [[1, 2]] * 8, config, SHAPE)
    replay = exact_replay(courses, config, SHAPE)
    requests = batch.requests.replace(exact=batch.requests.exact.replace(replay=replay))
    other = jax.tree.map(lambda x: x[::-1] if x.ndim > 1 else x, PARAMS)
    arguments = (batch.prompts, requests, batch.mask_id, batch.eos_ids)
    state = loop.DECODER.decode(MODEL, other, *arguments, shape=SHAPE)
    samples = jax.device_get(loop.DECODER.finish(state, batch.eos_ids, SHAPE))
    for row, want in enumerate(recorded):
        ours = jax.tree.map(lambda x, row=row: x[row], samples)
        assert [made[:3] for made in passes(ours)] == [made[:3] for made in passes(want)]
        assert ours.num_raw == want.num_raw


def test_drafts_and_masks_by_rows_and_device():
    """Two outcomes under the ridge of one row: the draft length is kept. Otherwise rows are frugal."""
    shape = Shape(rows=1, prompt=64, gen=128, drafts=64)
    alone = filled_up(shape, device_kind="NVIDIA H100 80GB HBM3")
    assert not alone.frugal and most_fed(alone) == 256 == alone.ahead
    many = filled_up(dataclasses.replace(shape, rows=32), device_kind="NVIDIA H100 80GB HBM3")
    assert many.frugal and many.ahead == 0 and many.masks_ahead == 65
    assert filled_up(shape).frugal  # a CPU
    asked = filled_up(shape, 2048)
    assert asked.masks_ahead == asked.ahead == 2048 and not asked.frugal


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"verify": "maybe"}, "verify must be one of threshold, exact, found 'maybe'"),
        (
            {"verify": "exact", "semantics": "release"},
            "semantics 'release' needs verify 'threshold', found 'exact'",
        ),
        (
            {"verify": "exact", "draft_length": 0},
            "draft_length must be a whole number from 1 to 1024, found 0",
        ),
        ({"border": "mask"}, "border must be one of ar, draft, found 'mask'"),
        ({"first_token": "last"}, "first_token must be one of next, mask, found 'last'"),
        ({"eos_id": ()}, "eos_id must be a token id or several, found none"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(BadInput, match=message):
        DecodeConfig(**{"mask_id": MASK, "eos_id": 2} | settings)


def test_an_empty_prompt_needs_a_mask():
    with pytest.raises(BadInput, match="first_token must be 'mask' for an empty prompt, found 'next'"):
        exact(gen_length=4).check_prompt([])
    exact(gen_length=4, first_token="mask").check_prompt([])
    DecodeConfig(MASK, 2).check_prompt([])


def test_methods_without_exact_verification():
    for setting, methods in (
        ("verify", "refusion"),
        ("first_token", "refusion or ar"),
        ("border", "refusion or ar"),
    ):
        with pytest.raises(
            BadInput, match=f"--{setting} is for --method={methods} alone, found --method=mdm"
        ):
            asked_settings(str(SMALL_FOLDER), "mdm", {setting: "exact"})


# The distribution of sampled answers.

SMALL = ModelConfig(6, 1, 8, 2, 1, 4, 16, rope_theta=1e4)
SMALL_MASK = 5
ROWS = 5000


def small_model():
    model = Transformer(SMALL)
    params = unbox(model.init(jax.random.key(3), *[jnp.zeros((1, 1), jnp.int32)] * 2)["params"])
    return model, jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)


def enumerated(model, params, prompt, temperature: float) -> dict[tuple[int, ...], float]:
    """The probability of every answer of three tokens, or fewer that end with EOS (0)."""
    answers = {(): 1.0}
    for _ in range(3):
        longer = {}
        for answer, probability in answers.items():
            if answer[-1:] == (0,):
                longer[answer] = probability
                continue
            tokens = jnp.asarray([[*prompt, *answer]])
            logits, _ = model.apply({"params": params}, tokens, jnp.arange(tokens.shape[1])[None])
            allowed = logits[0, -1].at[SMALL_MASK].set(-jnp.inf)
            conditional = np.asarray(jax.nn.softmax(allowed / temperature), np.float64)
            for token, factor in enumerate(conditional):
                longer[(*answer, token)] = probability * factor
        answers = longer
    return answers


def p_value(counts: collections.Counter, expected: dict[tuple[int, ...], float]) -> float:
    """Of Pearson's chi-squared test; cells with an expected count under 5 are merged."""
    total = sum(counts.values())
    rare = [answer for answer, p in expected.items() if p * total < 5]
    cells = [(counts[a], p * total) for a, p in expected.items() if a not in rare]
    if rare:
        cells.append((sum(counts[a] for a in rare), sum(expected[a] for a in rare) * total))
    observed, wanted = np.asarray(cells).T
    keep = wanted > 0
    statistic = np.sum((observed[keep] - wanted[keep]) ** 2 / wanted[keep])
    freedom = keep.sum() - 1
    return float(jax.scipy.special.gammaincc(freedom / 2, statistic / 2))


@pytest.mark.long
@pytest.mark.parametrize("batches", [4, pytest.param(20, marks=pytest.mark.long)])
def test_sampled_answers_have_the_model_s_probabilities(batches):
    """20 batches are 100,000 answers. A wrong rule, sampling at temperature 1, is found out."""
    model, params = small_model()
    prompt, temperature = [1, 2], 0.8
    settings = {"gen_length": 3, "temperature": temperature}
    shape = Shape(rows=ROWS, prompt=4, gen=4)
    expected = enumerated(model, params, prompt, temperature)
    wrong = enumerated(model, params, prompt, 1.0)
    for seed in range(5):
        counts = collections.Counter()
        for batch in range(batches):
            first = (seed * batches + batch) * ROWS
            configs = [ARConfig(SMALL_MASK, 0, seed=first + i, **settings) for i in range(ROWS)]
            samples = jax.device_get(ar.DECODER.sample(model, params, [prompt] * ROWS, configs, shape=shape))
            rows = zip(samples.raw_ids.tolist(), samples.num_raw.tolist(), strict=True)
            counts.update(tuple(raw[:n]) for raw, n in rows)
        assert p_value(counts, expected) > 1e-4
        assert p_value(counts, wrong) < 1e-6


@pytest.mark.parametrize("count", [64, pytest.param(2000, marks=pytest.mark.long)])
def test_exact_sampling_is_ar_sampling_seed_for_seed(count):
    random = np.random.default_rng(50)
    cases = []
    for i in range(count):
        prompt = random.integers(0, CONFIG.vocab_size, random.integers(1, 9)).tolist()
        cases.append((prompt, exact((14, 7), gen_length=16, draft_length=8, temperature=0.9, seed=i)))
    for start in range(0, count, 8):
        batch = cases[start : start + 8]
        _, want = by_ar(batch)
        for row, ours in enumerate(sample(batch)):
            assert ids(ours) == want.raw_ids[row, : want.num_raw[row]].tolist(), batch[row]
