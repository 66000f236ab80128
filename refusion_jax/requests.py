"""What is asked of the decoder: settings of a request, a batch of them as arrays, the padded shape."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from refusion_jax.errors import BadInput

SEMANTICS = ("fixed", "release")
SLOT_SCORES = ("first", "mean", "entropy")
FIRST, MEAN, ENTROPY = range(3)
# Beyond these a setting is a slip of the hand, and would take more memory than there is: a block is fed at
# once, and every request of a file is padded to the largest.
MOST_TOKENS = 1 << 16  # of a response
MOST_BLOCK_TOKENS = 1 << 12


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How one prompt is decoded.

    Attributes:
      mask_id, eos_id: of the tokenizer.
      gen_length: most response tokens, EOS included.
      slot_size: W, tokens a slot.
      num_blocks: blocks that are decoded left to right; within a block slots are decoded in any order.
      slot_threshold: a slot is chosen when its score is above it.
      slot_score: "first" for the probability of the draft of the slot's first token; "mean" for the mean of
        those of all its tokens; "entropy" for exp(-H), H the mean entropy in nats of what the model says of
        its tokens.
      token_threshold: a drafted token is accepted when its probability after the tokens before it is
        above it. Both may be any finite number: below 0 always passes, 1 and above never does.
      temperature: of the planning drafts (Gumbel-max); 0 is greedy.
      seed: of the drafts where temperature is above 0.
      recompute: slots that were infilled go through the model once more, each token seeing all before it as
        when drafts are verified, and that pass's keys and values are kept, not those that each slot was
        infilled with on its own. Takes a pass wherever several slots were infilled together.
      semantics: "fixed", or "release" for the authors' code to the letter. `fixed` differs from it in
        four places: an EOS found while infilling drops slots by their place in the text; gen_length
        must be a multiple of num_blocks * slot_size; probabilities are float32 whatever the model's
        dtype; of equally confident slots the earliest is chosen. (The last holds in `release` too, as
        the authors' choice among exact ties is arbitrary.)

    Raises:
      BadInput: a setting that cannot be decoded.
    """

    mask_id: int
    eos_id: int
    gen_length: int = 128
    slot_size: int = 8
    num_blocks: int = 1
    slot_threshold: float = 0.9
    token_threshold: float = 0.4
    temperature: float = 0.0
    seed: int = 0
    semantics: str = "fixed"
    slot_score: str = "first"
    recompute: bool = False

    def __post_init__(self):
        check_common(self)
        for name in ("slot_size", "num_blocks"):
            check_whole(name, getattr(self, name), 1, MOST_TOKENS)
        for name in ("slot_threshold", "token_threshold"):
            check_finite(name, getattr(self, name))
        if self.semantics not in SEMANTICS:
            raise BadInput(f"semantics must be one of {', '.join(SEMANTICS)}, found {self.semantics!r}")
        if self.slot_score not in SLOT_SCORES:
            found = shown(self.slot_score)
            raise BadInput(f"slot_score must be one of {', '.join(SLOT_SCORES)}, found {found}")
        if not isinstance(self.recompute, bool):
            raise BadInput(f"recompute must be true or false, found {shown(self.recompute)}")
        if self.block_len > MOST_BLOCK_TOKENS:
            raise BadInput(
                f"gen_length / num_blocks must be at most {MOST_BLOCK_TOKENS} tokens, found {self.block_len}"
            )

    @property
    def block_len(self) -> int:
        """Tokens a block; raises BadInput where gen_length does not divide into blocks and slots."""
        whole = self.num_blocks * self.slot_size
        lengths = f"gen_length {self.gen_length}, num_blocks {self.num_blocks}, slot_size {self.slot_size}"
        if self.semantics == "fixed":
            if self.gen_length % whole:
                raise BadInput(
                    f"gen_length must be a multiple of num_blocks x slot_size = {whole}, found {lengths}"
                )
            return self.gen_length // self.num_blocks
        # The authors round up to whole slots, then down to whole blocks, and lose what is left over.
        rounded = -(-self.gen_length // self.slot_size) * self.slot_size
        block_len = rounded // self.num_blocks
        if block_len == 0 or block_len % self.slot_size:
            raise BadInput(
                f"gen_length rounded up to slots and cut into blocks gives blocks of {block_len} tokens, "
                f"which must be a positive multiple of slot_size, found {lengths}"
            )
        return block_len

    @property
    def response_len(self) -> int:
        """Tokens that are generated at most."""
        return self.block_len * self.num_blocks


def check_common(config) -> None:
    """What every decoding method asks of mask_id, eos_id, gen_length, temperature and seed."""
    for name in ("mask_id", "eos_id"):
        check_whole(name, getattr(config, name), 0, 2**31 - 1)
    check_whole("gen_length", config.gen_length, 1, MOST_TOKENS)
    check_finite("temperature", config.temperature)
    if config.temperature < 0:
        raise BadInput(f"temperature must be 0 or above, found {config.temperature!r}")
    check_whole("seed", config.seed, 0, 2**32 - 1)


def check_whole(name: str, value, least: int, most: int) -> None:
    """Raises BadInput unless value is a whole number from least to most."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
        raise BadInput(f"{name} must be a whole number from {least} to {most}, found {shown(value)}")


def check_finite(name: str, value) -> None:
    """Raises BadInput unless value is a finite number."""
    try:
        finite = not isinstance(value, bool) and math.isfinite(value)
    except (TypeError, OverflowError):  # no number, or a whole number beyond any float
        finite = False
    if not finite:
        raise BadInput(f"{name} must be a finite number, found {shown(value)}")


def shown(value) -> str:
    """A value as an error line shows it: a long one by its beginning."""
    text = (
        repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of very many digits"
    )
    return text if len(text) <= 80 else f"{text[:77]}..."


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
      ahead: tokens up to which a pass of a row is filled with predictions ahead of need (feed.py); 0 for
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

    @classmethod
    def fitting(
        cls,
        prompts: Sequence[Sequence[int]],
        configs: Sequence[DecodeConfig],
        rows: int | None = None,
        trace: bool = False,
        ahead: int = 0,
    ) -> "Shape":
        """A padded shape that holds all these requests, in batches of `rows` (default: one batch)."""
        return cls.exact(prompts, configs).padded(rows, trace, ahead)

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


class Requests(struct.PyTreeNode):
    """A batch of requests as arrays [B]; a row of padding has no blocks. Fields as in DecodeConfig.

    `slot_score`, int32, one of FIRST, MEAN and ENTROPY, and `recompute` are None where no request of the
    shape asks for anything but their defaults: then nothing is compiled for them.
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

    @classmethod
    def batch(
        cls, prompts: Sequence[Sequence[int]], configs: Sequence[DecodeConfig], shape: Shape, vocab_size: int
    ) -> tuple[jax.Array, "Requests"]:
        """Prompts int32 [B, P], padded on the right, and their requests.

        Raises:
          BadInput: a prompt holds something that is no token of the vocabulary, or the special tokens
            are outside it or differ between requests.
        """
        padded = pad_prompts(prompts, configs, shape, vocab_size)

        def of(field: str, dtype, padding=0) -> jax.Array:
            return column([getattr(c, field) for c in configs], shape.rows, dtype, padding)

        scores = [SLOT_SCORES.index(c.slot_score) for c in configs]
        requests = cls(
            prompt_len=column([len(p) for p in prompts], shape.rows, jnp.int32),
            slot_size=of("slot_size", jnp.int32, padding=1),
            block_len=of("block_len", jnp.int32),
            num_blocks=of("num_blocks", jnp.int32),
            slot_threshold=of("slot_threshold", jnp.float32),
            token_threshold=of("token_threshold", jnp.float32),
            temperature=of("temperature", jnp.float32),
            release=column([c.semantics == "release" for c in configs], shape.rows, bool),
            seed=of("seed", jnp.uint32),
            slot_score=column(scores, shape.rows, jnp.int32) if shape.scores else None,
            recompute=of("recompute", bool) if shape.recompute else None,
        )
        return padded, requests


class Prepared(NamedTuple):
    """A batch ready to decode: what `begin` takes beside the model and its parameters.

    Attributes:
      prompts: int32 [B, P], padded on the right.
      requests: of the method, [B].
      mask_id, eos_id: int32 scalars.
      shape: the padded sizes.
    """

    prompts: jax.Array
    requests: Any
    mask_id: jax.Array
    eos_id: jax.Array
    shape: Shape


def pad_prompts(prompts: Sequence[Sequence[int]], configs: Sequence, shape: Shape, vocab_size: int):
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
    return jnp.asarray(padded)


def check_prompt(prompt: Sequence[int], vocab_size: int) -> None:
    """Raises BadInput unless every entry of the prompt is the id of a token."""
    for token in prompt:
        check_whole("an id of a prompt", token, 0, vocab_size - 1)


def column(values: Sequence, rows: int, dtype, padding=0) -> jax.Array:
    """values as an array [rows], padded at the end."""
    return jnp.asarray([*values, *[padding] * (rows - len(values))], dtype)
