"""MDM and BD3 equal transcriptions in plain Python, whatever the batch and the devices.

A tiny random model stands in for a trained one.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import block_transcription
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import CONFIG, random_params

from refusion_jax.baselines.decoders import bd3, mdm
from refusion_jax.baselines.decoders.blocks import surest
from refusion_jax.baselines.decoders.config import CACHES, BD3Config, MDMConfig
from refusion_jax.decode.batch import Shape
from refusion_jax.decode.samples import Samples
from refusion_jax.errors import BadInput
from refusion_jax.model.transformer import Transformer
from refusion_jax.serving import engine as serving
from refusion_jax.serving.requests import Request
from refusion_jax.weights import fused

MODEL, PARAMS = Transformer(CONFIG), random_params()
V = CONFIG.vocab_size
MASK, NEVER = 3, 1000
LENGTH = 40  # of the longest text in this file
SHAPE = Shape(rows=5, prompt=8, gen=32, block=16, caches=CACHES)
# In log probabilities. A decision with a smaller margin may change with the order of a floating-point sum.
CLOSE_CALL = 3e-5


class Case(NamedTuple):
    prompt: list[int]
    config: MDMConfig | BD3Config

    @property
    def method(self):
        return serving.DECODERS[type(self.config)]


@functools.cache
def compiled_forward(num_kept: int):
    """The model over LENGTH tokens after `num_kept` cached keys and values, jitted."""

    @jax.jit
    def forward(tokens, positions, mask, keys, values):
        layers = (keys, values) if num_kept else None
        logits, fresh = MODEL.apply({"params": PARAMS}, tokens[None], positions[None], layers, mask[None])
        return logits[0], fresh

    return forward


def forward(tokens: list[int], positions: list[int], sees: np.ndarray, kept: dict[int, Any]):
    """The model as a `block_transcription.Forward`."""
    n = len(tokens)
    pad = (0, LENGTH - n)
    room = LENGTH if kept else 0
    shape = (CONFIG.num_layers, 1, room, CONFIG.num_kv_heads, CONFIG.head_dim)
    keys, values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    mask = np.zeros((LENGTH, room + LENGTH), bool)
    mask[:n, room : room + n] = sees
    for position, (key, value) in kept.items():
        keys[:, 0, position], values[:, 0, position] = key, value
        mask[:n, position] = True
    logits, fresh = compiled_forward(room)(np.pad(tokens, pad), np.pad(positions, pad), mask, keys, values)
    fresh = jax.device_get(fresh)
    return np.asarray(logits)[:n], {p: tuple(x[:, 0, i] for x in fresh) for i, p in enumerate(positions)}


@functools.cache
def transcribed(prompt: tuple[int, ...], config: MDMConfig | BD3Config) -> block_transcription.Decoded:
    settings = dataclasses.asdict(config)
    del settings["temperature"], settings["seed"]
    name = "mdm" if isinstance(config, MDMConfig) else "bd3"
    return getattr(block_transcription, name)(forward, prompt, **settings)


def cases(method: str, cache: str, eos_id: int) -> list[Case]:
    """One case per setting, with prompts of different lengths and no close decision."""
    random = np.random.default_rng([CACHES.index(cache) if cache else 9, eos_id])
    settings = [(1, 1.0), (3, 1.0), (1, 0.25), (2, 0.4), (1, -1.0), (16, 0.5), (1, 0.1)]
    lengths = [(24, 3), (16, 1), (32, 4), (32, 2), (12, 3), (24, 6), (16, 2)]
    made = []
    for (per_step, threshold), (gen_length, num_blocks) in zip(settings, lengths, strict=True):
        fields = {"gen_length": gen_length, "tokens_per_step": per_step, "token_threshold": threshold}
        if method == "mdm":
            config = MDMConfig(MASK, eos_id, num_blocks=num_blocks, cache=cache, **fields)
        else:
            config = BD3Config(MASK, eos_id, block_len=gen_length // num_blocks, **fields)
        for _ in range(20):
            prompt = random.integers(0, V, random.integers(1, 9)).tolist()
            if transcribed(tuple(prompt), config).margin > CLOSE_CALL:
                break
        made.append(Case(prompt, config))
    return made


EOS_IDS = (7, 14, NEVER)
KINDS = [("mdm", cache) for cache in CACHES] + [("bd3", None)]


@functools.cache
def all_cases(method: str, cache: str | None) -> tuple[Case, ...]:
    return tuple(case for eos_id in EOS_IDS for case in cases(method, cache, eos_id))


def run(batch: Sequence[Case], shape: Shape = SHAPE) -> list[tuple[Samples, np.ndarray]]:
    """The samples of each row, and the pass that committed each response token."""
    method = batch[0].method
    prepared = method.prepare(MODEL, [c.prompt for c in batch], [c.config for c in batch], shape)
    state = method.decode(MODEL, PARAMS, *prepared.inputs, shape=prepared.shape)
    samples, passes = jax.device_get(
        (method.finish(state, prepared.eos_ids, prepared.shape), state.committed_in)
    )
    return [
        (jax.tree.map(lambda x, i=i: x[i], samples), passes[i, len(case.prompt) :][: case.config.gen_length])
        for i, case in enumerate(batch)
    ]


def check(case: Case, samples: Samples, passes: np.ndarray) -> None:
    want = transcribed(tuple(case.prompt), case.config)
    assert samples.num_forwards == samples.num_iterations == len(want.steps), case
    steps = [np.flatnonzero(passes == i + 1).tolist() for i in range(len(want.steps))]
    assert steps == want.steps, case
    answer = want.answer(case.config.eos_id)
    assert samples.raw_ids[: samples.num_raw].tolist() == answer, case
    assert samples.num_ids == len(answer) - (answer[-1] == case.config.eos_id)
    assert (samples.raw_ids[len(answer) :] == 0).all()


@pytest.mark.parametrize(("method", "cache"), KINDS)
def test_everything_that_can_happen_happened(method, cache):
    """Also checks that no decision is close, so that rounding cannot change the comparisons below."""
    found = [transcribed(tuple(case.prompt), case.config) for case in all_cases(method, cache)]
    assert min(decoded.margin for decoded in found) > CLOSE_CALL
    assert set().union(*(decoded.seen for decoded in found)) == {
        "above the threshold",
        "below the threshold",
        "a block takes several passes",
        "later blocks",
        "EOS",
        "blocks are left out",
    }


@pytest.mark.parametrize(("method", "cache"), KINDS)
def test_a_batch_is_the_transcription(method, cache):
    for eos_id in EOS_IDS:
        of_eos = [case for case in all_cases(method, cache) if case.config.eos_id == eos_id]
        for start in range(0, len(of_eos), SHAPE.rows):
            batch = of_eos[start : start + SHAPE.rows]
            for case, found in zip(batch, run(batch), strict=True):
                check(case, *found)


@pytest.mark.parametrize(("method", "cache"), KINDS)
def test_one_row_is_the_transcription(method, cache):
    """Compiled for the cache of the one request only, as in `sample`."""
    own = () if cache is None else (cache,)
    for case in all_cases(method, cache):
        (found,) = run([case], dataclasses.replace(SHAPE, rows=1, caches=own))
        check(case, *found)


@pytest.mark.parametrize("cache", CACHES)
def test_a_batch_compiled_for_one_cache(cache):
    batch = [case for case in all_cases("mdm", cache) if case.config.eos_id == 7][: SHAPE.rows]
    for case, found in zip(batch, run(batch, dataclasses.replace(SHAPE, caches=(cache,))), strict=True):
        check(case, *found)


def test_the_caches_approximate():
    """The caches change some answers, so the comparisons above tell them apart."""
    answers = [
        [transcribed(tuple(case.prompt), dataclasses.replace(case.config, cache=cache)).tokens]
        for case in all_cases("mdm", "none")[:4]
        for cache in CACHES
    ]
    assert len({str(answer) for answer in answers}) > 4


def mixed() -> list[Case]:
    """MDM requests with each kind of cache, some at a temperature, in one batch."""
    picked = [all_cases("mdm", cache)[i] for i, cache in enumerate([*CACHES, "dual", "prefix"])]
    hot = [0.0, 1.5, 0.0, 2.0, 0.0]
    return [
        case._replace(config=dataclasses.replace(case.config, temperature=t, seed=i))
        for i, (case, t) in enumerate(zip(picked, hot, strict=True))
    ]


def bd3_batch() -> list[Case]:
    hot = [0.0, 1.5, 0.0, 2.0, 0.0]
    return [
        case._replace(config=dataclasses.replace(case.config, temperature=t, seed=i))
        for i, (case, t) in enumerate(zip(all_cases("bd3", None), hot, strict=False))
    ]


def same(found, wanted) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("batch", [mixed, bd3_batch])
def test_neighbours_batch_size_and_padding_do_not_matter(batch):
    batch = batch()
    together = run(batch)
    for again, ours in zip(run(batch[::-1])[::-1], together, strict=True):
        same(again, ours)
    wider = dataclasses.replace(SHAPE, rows=1, prompt=12, block=24)
    for case, ours in zip(batch, together, strict=True):
        (among_none,) = run([case])
        same(among_none, ours)
        (alone,) = run([case], wider)
        same(alone, ours)


@pytest.mark.parametrize("batch", [mixed, bd3_batch])
def test_rows_that_take_the_place_of_others(batch):
    """As in serving: some rows are in the middle of a decode when others start."""
    batch, rows = batch(), SHAPE.rows
    shape = dataclasses.replace(SHAPE, rows=3)
    asked = [Request(i, case.prompt, case.config) for i, case in enumerate([*batch, *batch])]
    found = dict(serving.decoded(MODEL, PARAMS, asked, shape))
    for number, samples in found.items():
        same(samples, run([batch[number % rows]])[0][0])
    assert len(found) == 2 * rows


@pytest.mark.parametrize(("method", "batch"), [(mdm.DECODER, mixed), (bd3.DECODER, bd3_batch)])
def test_one_compilation_serves_every_request(method, batch):
    run(batch())
    before = method.resume._cache_size()
    run(batch()[1:3])
    run(batch()[::-1])
    assert method.resume._cache_size() == before


@pytest.mark.parametrize("batch", [mixed, bd3_batch])
@pytest.mark.long
def test_a_model_as_it_decodes_on_a_gpu(batch):
    """Fused projections and the kernel agree with the plain model closely enough for the same tokens."""
    batch = [case for case in batch() if not case.config.temperature][:2]
    model = Transformer(CONFIG, kernel="triton", fused=True)
    params = fused.fuse_projections(PARAMS)
    method = batch[0].method
    shape = dataclasses.replace(SHAPE, rows=2)
    prompts, configs = zip(*batch, strict=True)
    found = method.sample(model, params, prompts, configs, shape=shape)
    for i, (wanted, _) in enumerate(run(batch, shape)):
        assert found.raw_ids[i].tolist() == wanted.raw_ids.tolist()
        assert found.num_forwards[i] == wanted.num_forwards


def test_temperature_follows_the_seed():
    case = all_cases("mdm", "none")[-1]
    hot = [
        case._replace(config=dataclasses.replace(case.config, temperature=2.0, seed=seed))
        for seed in range(SHAPE.rows)
    ]
    answers = [samples.raw_ids.tolist() for samples, _ in run(hot)]
    assert len(set(map(tuple, answers))) == SHAPE.rows
    assert MASK not in np.concatenate(answers)


@pytest.mark.parametrize(
    ("count", "threshold", "chosen"),
    [
        (1, 1.0, [1]),
        (2, 1.0, [1, 3]),
        (3, 1.0, [1, 3, 4]),
        (9, 1.0, [0, 1, 3, 4]),
        (1, 0.5, [1, 3, 4]),
        (1, 0.7, [1]),
        (1, -1.0, [0, 1, 3, 4]),
    ],
)
def test_the_surest_are_committed(count, threshold, chosen):
    """Among equally confident tokens the earliest, and never a token that is not masked."""
    masked = jnp.asarray([True, True, False, True, True])
    confidence = jnp.asarray([0.2, 0.7, 0.99, 0.6, 0.6], jnp.float32)
    found = surest(masked, confidence, jnp.int32(count), jnp.float32(threshold))
    assert np.flatnonzero(found).tolist() == chosen


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (MDMConfig, {"gen_length": 0}, "gen_length must be a whole number from 1 .* found 0"),
        (
            MDMConfig,
            {"gen_length": 10, "num_blocks": 3},
            "gen_length must be a multiple of num_blocks = 3, found 10",
        ),
        (MDMConfig, {"num_blocks": 0}, "num_blocks .* found 0"),
        (MDMConfig, {"gen_length": 8192}, "blocks must be at most 4096 tokens long, found 8192"),
        (MDMConfig, {"tokens_per_step": 0}, "tokens_per_step .* found 0"),
        (MDMConfig, {"token_threshold": float("nan")}, "token_threshold must be a finite number, found nan"),
        (MDMConfig, {"cache": "block"}, "cache must be one of none, prefix, dual, found 'block'"),
        (MDMConfig, {"cache": ["dual"]}, "cache must be one of none, prefix, dual"),
        (BD3Config, {"gen_length": 40}, "gen_length must be a multiple of block_len = 32, found 40"),
        (BD3Config, {"block_len": 0}, "block_len .* found 0"),
        (BD3Config, {"block_len": "32"}, "block_len .* found '32'"),
        (BD3Config, {"temperature": -1}, "temperature must be 0 or above, found -1"),
    ],
)
def test_impossible_settings(config, settings, message):
    with pytest.raises(BadInput, match=message):
        config(**{"mask_id": MASK, "eos_id": 2} | settings)


def test_requests_that_do_not_fit_the_shape():
    with pytest.raises(BadInput, match=r"the shape's caches must hold \('dual',\) .* found \('none',\)"):
        mdm.DECODER.prepare(
            MODEL, [[1]], MDMConfig(MASK, 2, 8, cache="dual"), Shape(1, 8, 8, 8, caches=("none",))
        )
    with pytest.raises(BadInput, match="the shape's block must be at least 8"):
        bd3.DECODER.prepare(MODEL, [[1]], BD3Config(MASK, 2, 8, block_len=8), Shape(1, 8, 8, 4))


@pytest.mark.parametrize("config", [MDMConfig(MASK, NEVER, 8, 8), BD3Config(MASK, NEVER, 8, 8, block_len=8)])
def test_an_empty_prompt(config):
    """Mask tokens that see only mask tokens are equally confident, so the block is committed in one pass."""
    (found,) = run([Case([], config)])
    check(Case([], config), *found)
