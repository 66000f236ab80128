"""What is asked of the decoder: a batch of requests as arrays, and the padded shape."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from refusion_jax.decode.config import ENTROPY, MEAN, SLOT_SCORES, DecodeConfig, check_whole
from refusion_jax.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes a batch is padded to, all that a compilation depends on beside the model.

    Attributes:
      rows: B.
      prompt: P, tokens of a prompt.
      gen: tokens of a response.
      block: T, tokens of a block, for methods that have blocks.
      slots: M, slots of a block. This and what follows, up to `caches`, is for slots alone.
      iterations: entries a trace has room for.
      trace: whether one is kept.
      ahead: tokens up to which a pass of a row is filled with predictions ahead of need (inputs.py); 0 for
        none, as the authors decode.
      scores: of SLOT_SCORES those that requests ask for beside "first".
      recompute: whether a request asks for that.
      caches: of mdm.CACHES those that requests ask for, for that method alone.
    """

    rows: int
    prompt: int
    gen: int
    block: int = 0
    slots: int = 0
    iterations: int = 0
    trace: bool = False
    ahead: int = 0
    scores: tuple[str, ...] = ()
    recompute: bool = False
    caches: tuple[str, ...] = ()

    @classmethod
    def exact(cls, prompts: Sequence[Sequence[int]], configs: Sequence[DecodeConfig]) -> "Shape":
        """The smallest shape that holds these requests as one batch."""
        check_pairs(prompts, configs)
        asked = {c.slot_score for c in configs}
        return cls(
            rows=len(prompts),
            prompt=max(map(len, prompts)),
            gen=max(c.response_len for c in configs),
            block=max(c.block_len for c in configs),
            slots=max(c.block_len // c.slot_size for c in configs),
            iterations=max(c.response_len // c.slot_size for c in configs),
            scores=tuple(score for score in SLOT_SCORES[MEAN:] if score in asked),
            recompute=any(c.recompute for c in configs),
        )

    def padded(self, rows: int | None = None, trace: bool = False, ahead: int = 0) -> "Shape":
        """This shape with its lengths in buckets, so that few different ones occur; prompts of up to 64
        tokens share one. `rows`: how many are decoded together, when not all."""
        prompt = bucket(max(64, self.prompt))
        rest = {name: bucket(getattr(self, name)) for name in ("gen", "block", "slots", "iterations")}
        return dataclasses.replace(
            self, rows=rows or self.rows, prompt=prompt, **rest, trace=trace, ahead=ahead
        )

    @property
    def entropy(self) -> bool:
        """Whether a request's slots are scored by it."""
        return SLOT_SCORES[ENTROPY] in self.scores

    def check_holds(self, needed: "Shape") -> None:
        """Raises BadInput unless requests that need the sizes `needed` fit."""
        lengths = ("rows", "prompt", "gen", "block", "slots") + (("iterations",) if self.trace else ())
        for field in (*lengths, "recompute"):
            mine, theirs = getattr(self, field), getattr(needed, field)
            if mine < theirs:
                raise BadInput(
                    f"the shape's {field} must be at least {theirs} for these requests, found {mine}"
                )
        for field in ("scores", "caches"):
            mine, theirs = getattr(self, field), getattr(needed, field)
            if not set(theirs) <= set(mine):
                raise BadInput(f"the shape's {field} must hold {theirs} for these requests, found {mine}")


def check_pairs(prompts: Sequence, configs: Sequence) -> None:
    """Raises BadInput unless there are prompts, and settings for each."""
    if len(prompts) != len(configs) or not prompts:
        raise BadInput(f"as many settings as prompts are needed, found {len(configs)} and {len(prompts)}")


def bucket(length: int) -> int:
    """The next of 4, 6, 8, 12, 16, 24, 32, 48, … : a third is wasted at most, few shapes occur."""
    power = 4
    while power < length:
        if power * 3 // 2 >= length:
            return power * 3 // 2
        power *= 2
    return power


class Replay(struct.PyTreeNode):
    """A recorded course to follow whatever the logits say.

    Attributes:
      planned: bool [I, M], the slots chosen by each plan.
      accepted: int32 [I, T]; entry m * slot_size + r is how many tokens of slot m are accepted when verified
        (r = 0) or after the r-th refill.
      length: int32, plans after which decoding ends.
    """

    planned: jax.Array
    accepted: jax.Array
    length: jax.Array


class Requests(struct.PyTreeNode):
    """A batch of requests as arrays [B]; a row of padding has no blocks. Fields as in DecodeConfig.

    `slot_score`, int32, one of FIRST, MEAN and ENTROPY, and `recompute` are None where no request of the
    shape asks for anything but their defaults: then nothing is compiled for them. `replay` is a recorded
      course
    that each row follows whatever the logits say, or None.
    """

    prompt_len: jax.Array
    slot_size: jax.Array
    block_len: jax.Array
    num_blocks: jax.Array
    slot_threshold: jax.Array
    token_threshold: jax.Array
    temperature: jax.Array
    release: jax.Array
    seed: jax.Array
    slot_score: jax.Array | None
    recompute: jax.Array | None
    replay: Replay | None

    @classmethod
    def batch(
        cls, prompts: Sequence[Sequence[int]], configs: Sequence[DecodeConfig], shape: Shape
    ) -> "Requests":
        """The requests of these prompts, as NumPy arrays padded to `shape.rows`."""

        def of(field: str, dtype, padding=0) -> jax.Array:
            return padded_column([getattr(c, field) for c in configs], shape.rows, dtype, padding)

        scores = [SLOT_SCORES.index(c.slot_score) for c in configs]
        return cls(
            prompt_len=padded_column([len(p) for p in prompts], shape.rows, jnp.int32),
            slot_size=of("slot_size", jnp.int32, padding=1),
            block_len=of("block_len", jnp.int32),
            num_blocks=of("num_blocks", jnp.int32),
            slot_threshold=of("slot_threshold", jnp.float32),
            token_threshold=of("token_threshold", jnp.float32),
            temperature=of("temperature", jnp.float32),
            release=padded_column([c.semantics == "release" for c in configs], shape.rows, bool),
            seed=of("seed", jnp.uint32),
            slot_score=padded_column(scores, shape.rows, jnp.int32) if shape.scores else None,
            recompute=of("recompute", bool) if shape.recompute else None,
            replay=None,
        )


class Prepared(NamedTuple):
    """A batch ready to decode: what `begin` takes beside the model and its parameters. Its arrays are those
    of NumPy: on the device each would take a call of its own to make.

    Attributes:
      prompts: int32 [B, P], padded on the right.
      requests: of the method, [B].
      mask_id, eos_id: int32 scalars.
      shape: the padded sizes.
    """

    prompts: np.ndarray
    requests: Any
    mask_id: np.int32
    eos_id: np.int32
    shape: Shape

    @property
    def inputs(self) -> tuple[np.ndarray, Any, np.int32, np.int32]:
        """What `Decoder.begin` and `Decoder.decode` take beside the model and its parameters."""
        return self[:4]

    @classmethod
    def of(cls, prompts: np.ndarray, requests: Any, configs: Sequence, shape: Shape) -> "Prepared":
        """With the special tokens that the settings share."""
        return cls(prompts, requests, np.int32(configs[0].mask_id), np.int32(configs[0].eos_id), shape)


def pad_prompts(
    prompts: Sequence[Sequence[int]], configs: Sequence, shape: Shape, vocab_size: int
) -> np.ndarray:
    """Prompts int32 [B, P], padded on the right.

    Raises:
      BadInput: a prompt holds something that is no token of the vocabulary, or the special tokens are
        outside it or differ between requests.
    """
    special = {(c.mask_id, c.eos_id) for c in configs}
    if len(special) != 1:
        raise BadInput(f"the requests of a batch must share mask_id and eos_id, found {sorted(special)}")
    if configs[0].mask_id >= vocab_size:
        raise BadInput(f"mask_id must be below the vocabulary size {vocab_size}, found {configs[0].mask_id}")
    padded = np.zeros((shape.rows, shape.prompt), np.int32)
    for row, prompt in enumerate(prompts):
        check_prompt(prompt, vocab_size)
        padded[row, : len(prompt)] = prompt
    return padded


def check_prompt(prompt: Sequence[int], vocab_size: int) -> None:
    """Raises BadInput unless every entry of the prompt is the id of a token."""
    for token in prompt:
        check_whole("an id of a prompt", token, 0, vocab_size - 1)


def padded_column(values: Sequence, rows: int, dtype, padding=0) -> np.ndarray:
    """values as an array [rows], padded at the end."""
    return np.asarray([*values, *[padding] * (rows - len(values))], dtype)
