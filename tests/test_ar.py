"""AR decoding equals a plain loop of whole forward passes, whatever the batch and the devices."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from whole_params import load_params

from refusion_jax.baselines.decoders import ar
from refusion_jax.baselines.decoders.config import ARConfig
from refusion_jax.checkpoints import hugging_face as hf
from refusion_jax.decode.batch import Shape
from refusion_jax.decode.samples import Samples
from refusion_jax.errors import BadInput
from refusion_jax.model.transformer import Transformer
from refusion_jax.serving import engine as serving
from refusion_jax.serving.requests import Request

FOLDER = Path(__file__).parent / "data" / "oracle" / "tiny_a"
MODEL, PARAMS = Transformer(hf.read_config(FOLDER)), load_params(FOLDER, hf.read_config(FOLDER))
VOCAB = MODEL.config.vocab_size
MASK, EOS, NEVER = 3, 2, 1000
SHAPE = Shape(rows=6, prompt=12, gen=24)


class Case(NamedTuple):
    prompt: list[int]
    config: ARConfig


def cases(first_token: str, eos_id: int) -> list[Case]:
    random = np.random.default_rng(0)
    made = []
    for length in (1, 3, 5, 8, 11, 12):
        prompt = [1, *random.integers(4, VOCAB, length - 1).tolist()]
        gen_length = int(random.integers(8, 25))
        made.append(Case(prompt, ARConfig(MASK, eos_id, gen_length, first_token=first_token)))
    return made


CASES = {(first, eos): cases(first, eos) for first in ("next", "mask") for eos in (EOS, NEVER)}


def sample(cases: Sequence[Case], shape: Shape = SHAPE) -> list[Samples]:
    """`ar.DECODER.sample` of a batch, as one Samples per row."""
    together = ar.DECODER.sample(
        MODEL, PARAMS, [c.prompt for c in cases], [c.config for c in cases], shape=shape
    )
    together = jax.device_get(together)
    return [jax.tree.map(lambda x, row=row: x[row], together) for row in range(len(cases))]


def raw_ids(samples: Samples) -> list[int]:
    return samples.raw_ids[: samples.num_raw].tolist()


@jax.jit
def causal_logits(tokens):
    """Logits [T, V] of one whole sequence, without a cache."""
    return MODEL.apply({"params": PARAMS}, tokens[None], jnp.arange(tokens.shape[0])[None])[0][0]


def plain_loop(case: Case) -> list[int]:
    """Greedy decoding with one forward pass over the whole sequence per token."""
    tokens, config = list(case.prompt), case.config

    def next_logits(tokens: list[int]) -> np.ndarray:
        padded = np.zeros(SHAPE.prompt + SHAPE.gen + 1, np.int32)
        padded[: len(tokens)] = tokens
        logits = np.array(causal_logits(padded))[len(tokens) - 1]
        logits[config.mask_id] = -np.inf  # no answer holds mask tokens
        return logits

    while len(tokens) < len(case.prompt) + config.gen_length:
        first = len(tokens) == len(case.prompt)
        # A mask token predicts the token in its own place, any other token the next one.
        from_mask = first and config.first_token == "mask"
        tokens.append(int(np.argmax(next_logits([*tokens, MASK] if from_mask else tokens))))
        if tokens[-1] == config.eos_id:
            break
    return tokens[len(case.prompt) :]


@pytest.fixture(scope="module")
def compilations():
    """The number of compilations of `Decoder.resume` after all of CASES were decoded, first in this file."""
    before = ar.DECODER.resume._cache_size()
    for batch in CASES.values():
        sample(batch)
    return ar.DECODER.resume._cache_size() - before


@pytest.mark.parametrize("first_token", ["next", "mask"])
@pytest.mark.parametrize("eos_id", [EOS, NEVER])
def test_greedy_decoding_is_a_loop_of_whole_passes(compilations, first_token, eos_id):
    batch = CASES[first_token, eos_id]
    answers = [plain_loop(case) for case in batch]
    for case, ours, want in zip(batch, sample(batch), answers, strict=True):
        assert raw_ids(ours) == want, case
        assert ours.num_ids == len(want) - (want[-1] == eos_id)
        assert ours.num_forwards == ours.num_iterations == len(want)
        assert (ours.raw_ids[len(want) :] == 0).all() and ours.trace is None
    stopped = [answer[-1] == eos_id for answer in answers]
    assert any(stopped) == (eos_id == EOS), "the answers should end at an EOS and at the full length"
    assert not all(stopped)


def test_the_first_token_is_read_where_it_is_asked_for(compilations):
    """The two ways give different answers, so the tests above tell them apart; one batch may mix them."""
    read = {first: sample(CASES[first, NEVER]) for first in ("next", "mask")}
    starts = [[s.raw_ids[0] for s in read[first]] for first in ("next", "mask")]
    assert starts[0] != starts[1]
    mixed = [CASES["mask" if i % 2 else "next", NEVER][i] for i in range(SHAPE.rows)]
    for i, ours in enumerate(sample(mixed)):
        assert raw_ids(ours) == raw_ids(read["mask" if i % 2 else "next"][i])


def test_nothing_follows_an_eos(compilations):
    """Whichever token is the EOS, the answer ends at its first occurrence and nowhere else."""
    free = [raw_ids(s) for s in sample(CASES["mask", NEVER])]
    for eos_id in sorted({ids[len(ids) // 2] for ids in free}):
        batch = [
            c._replace(config=dataclasses.replace(c.config, eos_id=eos_id)) for c in CASES["mask", NEVER]
        ]
        for ours, ids in zip(sample(batch), free, strict=True):
            end = ids.index(eos_id) + 1 if eos_id in ids else len(ids)
            assert raw_ids(ours) == ids[:end]
            assert ours.num_forwards == end


def hot(case: Case, temperature: float, seed: int) -> Case:
    return case._replace(config=dataclasses.replace(case.config, temperature=temperature, seed=seed))


def test_neighbours_batch_size_and_padding_do_not_matter(compilations):
    for first in ("next", "mask"):
        batch = CASES[first, EOS]
        batch = [hot(case, 0.7 * (i % 2), i) for i, case in enumerate(batch)]
        together = sample(batch)
        for again, ours in zip(sample(batch[::-1])[::-1], together, strict=True):
            jax.tree.map(np.testing.assert_array_equal, again, ours)
        for i, case in enumerate(batch):
            (padded,) = sample([case])
            jax.tree.map(np.testing.assert_array_equal, padded, together[i])
    for i, case in enumerate(batch):
        (alone,) = sample([case], shape=dataclasses.replace(SHAPE, rows=1))
        jax.tree.map(np.testing.assert_array_equal, alone, together[i])


def test_temperature_follows_the_seed(compilations):
    case = CASES["mask", NEVER][3]
    batch = [hot(case, 1.5, seed) for seed in range(SHAPE.rows)]
    answers = [raw_ids(s) for s in sample(batch)]
    assert answers == [raw_ids(s) for s in sample(batch)]
    assert len(set(map(tuple, answers))) == SHAPE.rows
    (cold,), (nearly,) = sample([case]), sample([hot(case, 1e-9, 3)])
    assert raw_ids(nearly) == raw_ids(cold)


def test_temperature_draws_from_the_tempered_softmax(compilations):
    prompt, temperature, count = [1, 20, 30, 7], 3.0, 1200
    config = ARConfig(MASK, NEVER, gen_length=1, temperature=temperature)
    drawn = []
    for start in range(0, count, SHAPE.rows):
        seeds = range(start, start + SHAPE.rows)
        drawn += [
            s.raw_ids[0] for s in sample([Case(prompt, dataclasses.replace(config, seed=i)) for i in seeds])
        ]
    weights = np.exp(np.asarray(causal_logits(np.asarray(prompt, np.int32)))[-1] / temperature)
    weights[MASK] = 0
    expected = weights / weights.sum()
    surplus = np.bincount(drawn, minlength=VOCAB) - count * expected
    assert (np.abs(surplus) < 4 * np.sqrt(count * expected) + 1).all()
    assert 0.05 < expected.max() < 0.95, "neither certain nor uniform"


def test_one_compilation_serves_every_request(compilations):
    assert compilations == 1
    before = ar.DECODER.resume._cache_size()
    batch = [Case([5] * i, ARConfig(7, 9, 3 * i, 0.5 * i, i, "mask")) for i in range(1, SHAPE.rows + 1)]
    sample(batch)
    sample(batch[:2])
    assert ar.DECODER.resume._cache_size() == before


def test_an_empty_prompt(compilations):
    """It has no last token to read the first one from, but a mask token can be fed."""
    with pytest.raises(BadInput, match="first_token must be 'mask' for an empty prompt, found 'next'"):
        ar.DECODER.sample(MODEL, PARAMS, [[]], ARConfig(MASK, EOS))
    case = Case([], ARConfig(MASK, EOS, 10, first_token="mask"))
    (ours,) = sample([case])
    assert raw_ids(ours) == plain_loop(case)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gen_length": 0}, "gen_length must be a whole number from 1 .* found 0"),
        ({"gen_length": -3}, "gen_length"),
        ({"gen_length": 2.5}, "gen_length"),
        ({"temperature": -1.0}, "temperature must be 0 or above, found -1.0"),
        ({"temperature": float("inf")}, "temperature must be a finite number, found inf"),
        ({"seed": -1}, "seed"),
        ({"eos_id": None}, "eos_id"),
        ({"first_token": "last"}, "first_token must be one of next, mask, found 'last'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(BadInput, match=message):
        ARConfig(**{"mask_id": MASK, "eos_id": EOS} | settings)


@pytest.mark.parametrize(
    ("prompt", "mask_id", "message"),
    [
        ([VOCAB], MASK, "an id of a prompt must be a whole number from 0 to 63, found 64"),
        ([1, -1], MASK, "found -1"),
        ([1], VOCAB, "mask_id must be below the vocabulary size 64, found 64"),
    ],
)
def test_impossible_prompts(prompt, mask_id, message):
    with pytest.raises(BadInput, match=message):
        ar.DECODER.sample(MODEL, PARAMS, [prompt], ARConfig(mask_id, EOS))


def test_a_batch_has_one_mask_and_one_eos():
    with pytest.raises(BadInput, match="must share mask_id and eos_id"):
        ar.DECODER.sample(MODEL, PARAMS, [[1], [1]], [ARConfig(MASK, EOS), ARConfig(MASK, NEVER)])


def test_the_longest_requests_are_begun_first():
    """So fewer rows are idle at the end. `serve` yields results in the order of the requests."""
    lengths = [8, 24, 16]
    requests = [Request(i, [1, 2], ARConfig(MASK, NEVER, length)) for i, length in enumerate(lengths)]
    shape = serving.fitting_shape(requests, batch_size=1)
    finished = [(number, int(s.num_raw)) for number, s in serving.decoded(MODEL, PARAMS, requests, shape)]
    assert finished == [(1, 24), (2, 16), (0, 8)]
