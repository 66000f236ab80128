"""Shared by the tests of the slot decoder: a model, random requests, and their decodes.

A tiny random model stands in for a trained one. Random weights give low probabilities to all tokens, so the
head is scaled up, and thresholds are spread widely enough for every branch to be taken
(test_everything_that_can_happen_happened).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import transcription

from refusion_jax.decode import loop as decode
from refusion_jax.decode.batch import Requests, Shape, pad_prompts
from refusion_jax.decode.config import DecodeConfig
from refusion_jax.decode.samples import Samples
from refusion_jax.model.transformer import ModelConfig, Transformer
from refusion_jax.sharding import unbox

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
EOS_IDS = (7, 14, 8, 1, 2, 11, 23, NEVER)  # from rare to frequent in the model's drafts
# Holds every request below; one phase per pass, as in the authors' code.
SHAPE = Shape(rows=8, prompt=8, gen=48, block=32, slots=8, iterations=12, trace=True)
AHEAD = dataclasses.replace(SHAPE, ahead=64)
LOST = "slots before an EOS are lost"  # in `release` only
# In logits. A decision with a smaller margin may change with the order of a floating-point sum.
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
    """Random prompts and settings; each SHAPE.rows in sequence share an EOS id, so they can be one batch."""
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
            # After an empty prompt all mask tokens get the same logits, so rounding decides the best slot.
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
    """`decode.sample` of a batch, as one Samples per row."""
    together = decode.sample(model, params, [c.prompt for c in cases], [c.config for c in cases], shape=shape)
    together = jax.device_get(together)
    return [jax.tree.map(lambda x, row=row: x[row], together) for row in range(len(cases))]


def arguments(cases: Sequence[Case]):
    """The arguments of `Decoder.decode` and `Decoder.begin` after the model and parameters."""
    prompts, configs = [c.prompt for c in cases], [c.config for c in cases]
    padded = pad_prompts(prompts, configs, SHAPE, CONFIG.vocab_size)
    requests = Requests.batch(prompts, configs, SHAPE)
    return padded, requests, np.int32(MASK), np.asarray(configs[0].eos_ids, np.int32)


def final_state(cases: Sequence[Case], model=MODEL, params=PARAMS, shape=SHAPE) -> decode.DecodeState:
    """The final state of a batch, by the program that is compiled for `sample`."""
    return jax.device_get(decode.DECODER.decode(model, params, *arguments(cases), shape=shape))


def steps(case: Case, samples: Samples) -> list[transcription.Step]:
    """The trace of a row in the format of the transcription."""
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
    """The state of some rows of the batch; an integer index drops the batch axis."""
    rest = jax.tree.map(lambda x: x[index], state.replace(cache=None))
    return rest.replace(cache=state.cache.rows(index))


class Whole:
    """A model in the form that the transcription calls: without a cache, padded to one length."""

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
    of_exact = ("verify", "draft_length", "draft_from", "first_token", "border", "slot_sizes", "pad_id")
    for name in ("temperature", "seed", *of_exact):
        del settings[name]
    return transcription.decode(forward, case.prompt, **settings)


class Run(NamedTuple):
    """All cases of one semantics, decoded by the package (`ours`, `states`) and transcribed (`plain`)."""

    cases: list[Case]
    ours: list[Samples]
    states: list[decode.DecodeState]
    plain: list[transcription.Decoded]


@functools.cache
def transcriptions(semantics: str) -> list[transcription.Decoded]:
    return [transcribed(case) for case in CASES[semantics]]


@functools.cache
def run(semantics: str) -> Run:
    ours, states = [], []
    for batch in batches(CASES[semantics]):
        ours += sample(batch)
        state = final_state(batch)
        states += [rows_of(state, row) for row in range(len(batch))]
    return Run(CASES[semantics], ours, states, transcriptions(semantics))


def eventful_batch() -> Sequence[Case]:
    """The batch whose decodes take the most different branches."""
    plain = transcriptions("fixed")

    def happened(first: int) -> int:
        return len({name for decoded in plain[first : first + SHAPE.rows] for name in decoded.seen})

    first = max(range(0, len(plain), SHAPE.rows), key=happened)
    assert happened(first) >= 8
    return CASES["fixed"][first : first + SHAPE.rows]


def committed_places(case: Case, samples: Samples) -> list[int]:
    return sorted(place for step in steps(case, samples) for place in step.committed)


def assert_same(ours: Samples, theirs: Samples) -> None:
    """Asserts bit equality, except for the confidences in the trace (1e-5)."""
    for field in ("raw_ids", "num_raw", "num_ids", "num_forwards", "num_iterations"):
        np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field), field)
    for field in ("block", "planned", "iterative", "rounds", "committed", "forwards"):
        np.testing.assert_array_equal(getattr(ours.trace, field), getattr(theirs.trace, field), field)
    np.testing.assert_allclose(ours.trace.confidence, theirs.trace.confidence, rtol=0, atol=1e-5)


def hot(case: Case, temperature: float, seed: int = 0) -> Case:
    return case._replace(config=dataclasses.replace(case.config, temperature=temperature, seed=seed))


def as_mask(sees: Sequence[Sequence[int]]) -> np.ndarray:
    mask = np.zeros((len(sees), len(sees)), bool)
    for i, seen in enumerate(sees):
        mask[i, seen] = True
    return mask
