"""The decoder's input: a batch of requests as arrays, and the shape that they are padded to."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from refusion_jax.decode.config import (
    DRAFT_FROM,
    ENTROPY,
    MEAN,
    SLOT_SCORES,
    DecodeConfig,
    check_whole,
    removed_ids,
)
from refusion_jax.decode.samples import is_eos
from refusion_jax.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes that a batch is padded to. Besides the model, a compilation depends on nothing else.

    Attributes:
      rows: B, the number of rows (requests decoded together).
      prompt: P, the prompt length in tokens.
      gen: the response length in tokens.
      block: T, the block length in tokens; 0 for methods without blocks.
      slots: M, slots per block. `slots` to `recompute` are read by the slot decoder only.
      iterations: I, the plans per row that a trace has room for.
      trace: whether a trace is recorded.
      ahead: the number of tokens up to which a row's pass is filled with speculative tokens (inputs.py);
        0 for none, as in the authors' code.
      scores: the members of SLOT_SCORES that some request asks for, "first" excepted.
      recompute: whether some request sets `recompute`.
      drafts: W, the most drafts that a pass of a request with `verify` "exact" verifies; 0 if there is none.
        `drafts` to `frugal` are for such requests.
      mask_readings: the most places per pass that are read off mask tokens (exact.py); also read by AR.
      masks_ahead: the number of mask tokens that ride along with W drafts.
      draft_from: the members of config.DRAFT_FROM that some request asks for.
      frugal: whether a row drafts and carries fewer tokens where few of its drafts are accepted.
      chunk: the most prompt tokens per pass and row (prefill.py), enough for a pass to be bound by computing.
        Read by the slot decoder and AR.
      caches: the members of baselines.decoders.config.CACHES that some request asks for; read by MDM only.
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
    drafts: int = 0
    mask_readings: int = 0
    masks_ahead: int = 0
    draft_from: tuple[str, ...] = ("masks",)
    frugal: bool = False
    chunk: int = 1024
    caches: tuple[str, ...] = ()

    @classmethod
    def exact(cls, prompts: Sequence[Sequence[int]], configs: Sequence[DecodeConfig]) -> "Shape":
        """The smallest shape that holds these requests as one batch.

        Raises:
          BadInput: there is no prompt, or not one config per prompt.
        """
        check_pairs(prompts, configs)
        asked_scores = {c.slot_score for c in configs}
        exact = [c for c in configs if c.exact]
        # Counted in tokens there: a pass commits at least one.
        plans = [c.gen_length if c.exact else c.response_len // c.slot_size for c in configs]
        return cls(
            rows=len(prompts),
            prompt=max(map(len, prompts)),
            gen=max(c.response_len for c in configs),
            block=max(c.block_len for c in configs),
            slots=max(c.block_len // c.slot_size for c in configs),
            iterations=max(plans),
            drafts=max((c.draft_length for c in exact), default=0),
            mask_readings=max((c.mask_readings for c in exact), default=0),
            draft_from=tuple(where for where in DRAFT_FROM if any(c.draft_from == where for c in configs)),
            scores=tuple(score for score in SLOT_SCORES[MEAN:] if score in asked_scores),
            recompute=any(c.recompute for c in configs),
        )

    def padded(self, rows: int | None = None, trace: bool = False, ahead: int = 0) -> "Shape":
        """This shape with its lengths rounded up to a `bucket`, so that few shapes have to be compiled.

        Prompts of up to 64 tokens share one bucket.

        Args:
          rows: requests decoded together; None keeps `self.rows`.
          trace: whether a trace is recorded.
          ahead: see the attribute; also the number of masks that ride along in exact verification.
        """
        prompt = bucket(max(64, self.prompt))
        names = ("gen", "block", "slots", "iterations", "drafts")
        lengths = {name: bucket(size) if (size := getattr(self, name)) else 0 for name in names}
        return dataclasses.replace(
            self,
            rows=rows or self.rows,
            prompt=prompt,
            **lengths,
            trace=trace,
            ahead=ahead,
            masks_ahead=ahead if self.drafts_by_masks else 0,
        )

    @property
    def drafts_by_masks(self) -> bool:
        """Whether some request with `verify` "exact" drafts from mask tokens."""
        return self.drafts > 0 and "masks" in self.draft_from

    @property
    def looks_up(self) -> bool:
        """Whether some request with `verify` "exact" looks its drafts up in its own context."""
        return self.drafts > 0 and "lookup" in self.draft_from

    @property
    def entropy(self) -> bool:
        """Whether some request scores its slots by entropy."""
        return SLOT_SCORES[ENTROPY] in self.scores

    def check_holds(self, needed: "Shape") -> None:
        """Raises BadInput unless this shape holds requests whose exact shape is `needed`."""
        lengths = ("rows", "prompt", "gen", "block", "slots", "drafts", "mask_readings")
        lengths += ("iterations",) if self.trace else ()
        for field in (*lengths, "recompute"):
            found, required = getattr(self, field), getattr(needed, field)
            if found < required:
                raise BadInput(
                    f"the shape's {field} must be at least {required} for these requests, found {found}"
                )
        for field in ("scores", "draft_from", "caches"):
            found, required = getattr(self, field), getattr(needed, field)
            if not set(required) <= set(found):
                raise BadInput(f"the shape's {field} must hold {required} for these requests, found {found}")


def check_pairs(prompts: Sequence, configs: Sequence) -> None:
    """Raises BadInput unless there is at least one prompt and exactly one config per prompt."""
    if len(prompts) != len(configs) or not prompts:
        raise BadInput(f"as many settings as prompts are needed, found {len(configs)} and {len(prompts)}")


def bucket(length: int) -> int:
    """`length` rounded up to one of 4, 6, 8, 12, 16, 24, 32, 48, ...

    Few different values occur, and from 3 tokens on at most a third of the result is padding.
    """
    power = 4
    while power < length:
        if power * 3 // 2 >= length:
            return power * 3 // 2
        power *= 2
    return power


class Replay(struct.PyTreeNode):
    """A recorded decode, whose decisions a row repeats whatever its logits are (replay.py).

    Attributes:
      planned: bool [I, M], the slots chosen by each plan.
      accepted: int32 [I, T]; entry m * slot_size + r is the number of leading tokens of slot m that are
        accepted by the joint verification (r = 0) or after the r-th refill.
      length: int32, the number of plans after which decoding ends.
    """

    planned: jax.Array
    accepted: jax.Array
    length: jax.Array


class ExactReplay(struct.PyTreeNode):
    """A recorded exact decode, whose passes a row repeats whatever its logits are (replay.py).

    Attributes:
      drafted: int32 [I + 1], the drafts that each pass verifies.
      accepted: int32 [I], the drafts that each pass accepts.
      length: int32, the number of passes after which decoding ends.
    """

    drafted: jax.Array
    accepted: jax.Array
    length: jax.Array


class ExactRequests(struct.PyTreeNode):
    """The part of a batch of requests that only exact verification reads. Fields are arrays [B].

    Attributes:
      gen_length: int32, the most response tokens; 0 for requests with `verify` "threshold".
      draft_length: int32, the most drafts per pass.
      from_mask: bool, first_token "mask" instead of "next".
      border_every: int32, multiples of it are read off a mask token; 0 for border "ar".
      lookup: bool, draft_from "lookup" instead of "masks"; None where the shape has "masks" alone.
      replay: the recorded decode that each row repeats, or None.
    """

    gen_length: jax.Array
    draft_length: jax.Array
    from_mask: jax.Array
    border_every: jax.Array
    lookup: jax.Array | None
    replay: ExactReplay | None

    @classmethod
    def batch(cls, configs: Sequence[DecodeConfig], shape: Shape) -> "ExactRequests":
        """The fields of these requests as NumPy arrays, padded to `shape.rows`."""
        rows = shape.rows
        looks_up = padded_column([c.draft_from == "lookup" for c in configs], rows, bool)
        lengths = [c.gen_length if c.exact else 0 for c in configs]
        return cls(
            gen_length=padded_column(lengths, rows, jnp.int32),
            draft_length=padded_column([c.draft_length for c in configs], rows, jnp.int32),
            from_mask=padded_column([c.first_token == "mask" for c in configs], rows, bool),
            border_every=padded_column([c.border_every for c in configs], rows, jnp.int32),
            lookup=looks_up if shape.looks_up else None,
            replay=None,
        )


class Requests(struct.PyTreeNode):
    """A batch of requests. Fields are arrays [B], named as in DecodeConfig; padding rows have no blocks.

    Attributes:
      prompt_len: int32, prompt tokens.
      release: bool, semantics "release" instead of "fixed".
      slot_score: int32, one of FIRST, MEAN and ENTROPY. `slot_score` and `recompute` (bool) are None where
        the shape allows their defaults only; nothing is compiled for them then.
      replay: the recorded decode that each row repeats, or None.
      exact: what requests with `verify` "exact" ask for besides; None where the shape has none of them.
      removed: int32 arrays, token ids that are never chosen (`removed_ids`).
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
    exact: ExactRequests | None
    removed: tuple[jax.Array, ...]

    def is_eos(self, tokens: jax.Array, eos_ids: jax.Array) -> jax.Array:
        """bool: which of the tokens [B, ...] end a response. `release` knows only the first of `eos_ids`."""
        ends = is_eos(tokens, eos_ids)
        if eos_ids.ndim == 0 or eos_ids.shape[0] == 1:
            return ends
        release = self.release.reshape(self.release.shape + (1,) * (tokens.ndim - self.release.ndim))
        return jnp.where(release, tokens == eos_ids[0], ends)

    @classmethod
    def batch(
        cls, prompts: Sequence[Sequence[int]], configs: Sequence[DecodeConfig], shape: Shape
    ) -> "Requests":
        """The requests of these prompts as NumPy arrays, padded to `shape.rows`."""

        def column(field: str, dtype, padding=0) -> jax.Array:
            return padded_column([getattr(c, field) for c in configs], shape.rows, dtype, padding)

        scores = [SLOT_SCORES.index(c.slot_score) for c in configs]
        return cls(
            prompt_len=padded_column([len(p) for p in prompts], shape.rows, jnp.int32),
            slot_size=column("slot_size", jnp.int32, padding=1),
            block_len=column("block_len", jnp.int32),
            num_blocks=padded_column(
                [0 if c.exact else c.num_blocks for c in configs], shape.rows, jnp.int32
            ),
            slot_threshold=column("slot_threshold", jnp.float32),
            token_threshold=column("token_threshold", jnp.float32),
            temperature=column("temperature", jnp.float32),
            release=padded_column([c.semantics == "release" for c in configs], shape.rows, bool),
            seed=column("seed", jnp.uint32),
            slot_score=padded_column(scores, shape.rows, jnp.int32) if shape.scores else None,
            recompute=column("recompute", bool) if shape.recompute else None,
            replay=None,
            exact=ExactRequests.batch(configs, shape) if shape.drafts else None,
            removed=removed_columns(configs, shape.rows),
        )


class Prepared(NamedTuple):
    """A batch ready to decode: the arguments of `Decoder.begin` besides the model and its parameters.

    Its arrays are NumPy arrays, because each device array would take a separate call to create.

    Attributes:
      prompts: int32 [B, P], padded on the right.
      requests: the method's requests, a tree of arrays [B, ...].
      mask_id: int32 scalar.
      eos_ids: int32 [E], each of which ends a response.
      shape: the padded sizes.
    """

    prompts: np.ndarray
    requests: Any
    mask_id: np.int32
    eos_ids: np.ndarray
    shape: Shape

    @property
    def inputs(self) -> tuple[np.ndarray, Any, np.int32, np.ndarray]:
        """The positional arguments of `Decoder.begin` and `Decoder.decode` after the model and parameters."""
        return self[:4]

    @classmethod
    def of(cls, prompts: np.ndarray, requests: Any, configs: Sequence, shape: Shape) -> "Prepared":
        """A prepared batch with the mask and EOS ids that all configs share."""
        mask_id, eos_ids = np.int32(configs[0].mask_id), np.asarray(configs[0].eos_ids, np.int32)
        return cls(prompts, requests, mask_id, eos_ids, shape)


def pad_prompts(
    prompts: Sequence[Sequence[int]], configs: Sequence, shape: Shape, vocab_size: int
) -> np.ndarray:
    """The prompts as int32 [B, P], padded on the right.

    Raises:
      BadInput: a prompt entry is not a token id below `vocab_size`, `mask_id` is not below `vocab_size`, or
        mask_id or eos_id differ between requests.
    """
    special = {(c.mask_id, c.eos_ids) for c in configs}
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
    """Raises BadInput unless every entry of the prompt is a token id from 0 to `vocab_size` - 1."""
    for token in prompt:
        check_whole("an id of a prompt", token, 0, vocab_size - 1)


def removed_columns(configs: Sequence, rows: int) -> tuple[np.ndarray, ...]:
    """The ids of `removed_ids` of these configs, a padded column [rows] for each."""
    ids = zip(*(removed_ids(config) for config in configs), strict=True)
    return tuple(padded_column(column, rows, np.int32, padding=-1) for column in ids)


def padded_column(values: Sequence, rows: int, dtype, padding=0) -> np.ndarray:
    """`values` as a NumPy array [rows], filled up with `padding` at the end."""
    return np.asarray([*values, *[padding] * (rows - len(values))], dtype)
