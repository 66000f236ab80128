"""Settings of the slot decoder, and checks of settings that all decoding methods share. Imports no JAX."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from refusion_jax.errors import BadInput
from refusion_jax.model.reading import BORDERS, FIRST_TOKENS, SLOT_SIZES, VERIFY

SEMANTICS = ("fixed", "release")
DRAFT_FROM = ("masks", "lookup")
SLOT_SCORES = ("first", "mean", "entropy")
FIRST, MEAN, ENTROPY = range(3)
# Larger values are taken for typing errors. They would not fit in memory: one pass feeds a whole block, and
# all requests of a file are padded to the largest.
MOST_TOKENS = 1 << 16  # per response
MOST_BLOCK_TOKENS = 1 << 12  # per block
MOST_DRAFTS = 1 << 10  # per pass


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Settings of the slot decoder for one prompt (arXiv 2512.13586, section 3.3).

    Attributes:
      mask_id: token id of the mask token.
      eos_id: token id of EOS, or several ids, each of which ends a response. `release` semantics know only
        the first.
      gen_length: the most response tokens, EOS included.
      slot_size: W, tokens per slot.
      num_blocks: blocks per response. Blocks are decoded left to right, the slots of a block in any order.
      slot_threshold: a plan chooses the slots whose score is above it (strictly). Any finite number: below 0
        chooses every slot, 1 or above none.
      slot_score: the score of a slot. "first": the probability of the draft of the slot's first token.
        "mean": the mean probability of the drafts of all its tokens. "entropy": exp(-H), with H the mean
        entropy, in nats, of the model's distributions at its tokens.
      token_threshold: a drafted token is accepted if its probability given the tokens before it is above
        this (strictly). Any finite number: below 0 accepts every token, 1 or above none.
      temperature: of the drafts of a plan (Gumbel-max); 0 is greedy.
      seed: of those drafts, where temperature is above 0.
      recompute: feed infilled slots once more before they are committed, each token seeing all tokens before
        it as in a joint verification, and cache the keys and values of that pass instead of those that each
        slot computed on its own. Costs one pass wherever several slots were infilled together.
      semantics: "release" reproduces the authors' code exactly. "fixed" differs in four ways. (1) An EOS
        found while infilling removes slots by their position in the text. (2) gen_length must be a multiple
        of num_blocks * slot_size. (3) Probabilities are float32 whatever the model's dtype. (4) Among
        equally confident slots the earliest is chosen; (4) holds in `release` too, because the authors'
        choice among exact ties is arbitrary.
      verify: how drafts are accepted. "threshold": by the paper's rule, above. "exact": a draft is accepted
        if the model, read left to right, chooses the same token; the answer is that of AR decoding of the
        same weights (exact.py). slot_size, num_blocks, slot_score, recompute and both thresholds do not apply
        then, and gen_length may be any length.
      draft_length: W, the most drafts that a pass verifies; for "exact".
      draft_from: where drafts come from, for "exact". "masks": from mask tokens. "lookup": from the prompt
        and the answer so far, without mask tokens (lookup.py), so any left-to-right model will do.
      first_token: the logits from which the first response token is read; for "exact", as in ARConfig.
      border: "draft" reads a response token whose place is a border of slots of every size off a mask token
        in its place, because training never predicted it from the token before; "ar" reads it as any other.
        For "exact", as in ARConfig.
      slot_sizes: the slot sizes that the model was trained with; read with border "draft".
      pad_id: token id of the padding token; None for none. See `removed_ids`.

    Raises:
      BadInput: a setting is out of range, or the lengths do not divide; the message names the setting.
    """

    mask_id: int
    eos_id: int | tuple[int, ...]
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
    verify: str = "threshold"
    draft_length: int = 64
    draft_from: str = "masks"
    first_token: str = "next"
    border: str = "ar"
    slot_sizes: tuple[int, ...] = SLOT_SIZES
    pad_id: int | None = None

    def __post_init__(self):
        check_common(self)
        for name in ("slot_size", "num_blocks"):
            check_whole(name, getattr(self, name), 1, MOST_TOKENS)
        for name in ("slot_threshold", "token_threshold"):
            check_finite(name, getattr(self, name))
        check_whole("draft_length", self.draft_length, 1, MOST_DRAFTS)
        check_choice("semantics", self.semantics, SEMANTICS)
        check_choice("slot_score", self.slot_score, SLOT_SCORES)
        check_choice("verify", self.verify, VERIFY)
        check_choice("draft_from", self.draft_from, DRAFT_FROM)
        check_readings(self)
        if self.exact and self.semantics == "release":
            raise BadInput("semantics 'release' needs verify 'threshold', found 'exact'")
        if self.draft_from == "lookup" and not self.exact:
            raise BadInput("draft_from 'lookup' needs verify 'exact', found 'threshold'")
        if not isinstance(self.recompute, bool):
            raise BadInput(f"recompute must be true or false, found {quoted(self.recompute)}")
        if self.block_len > MOST_BLOCK_TOKENS:
            raise BadInput(
                f"gen_length / num_blocks must be at most {MOST_BLOCK_TOKENS} tokens, found {self.block_len}"
            )

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The token ids that end a response."""
        return as_ids(self.eos_id)

    @property
    def exact(self) -> bool:
        """Whether drafts are verified exactly."""
        return self.verify == "exact"

    @property
    def border_every(self) -> int:
        """Multiples of this are read off a mask token; 0 for none."""
        return border_every(self)

    @property
    def mask_readings(self) -> int:
        """The most places of one pass that are read off mask tokens."""
        borders = self.draft_length // self.border_every + 1 if self.border_every else 0
        return max(borders, int(self.first_token == "mask"))

    @property
    def block_len(self) -> int:
        """Tokens per block; 0 for exact verification, which has no blocks.

        Raises BadInput if gen_length does not divide into blocks and slots.
        """
        if self.exact:
            return 0
        whole = self.num_blocks * self.slot_size
        lengths = f"gen_length {self.gen_length}, num_blocks {self.num_blocks}, slot_size {self.slot_size}"
        if self.semantics == "fixed":
            if self.gen_length % whole:
                raise BadInput(
                    f"gen_length must be a multiple of num_blocks x slot_size = {whole}, found {lengths}"
                )
            return self.gen_length // self.num_blocks
        # The authors round gen_length up to whole slots, then down to whole blocks, and drop the remainder.
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
        """The most tokens that are generated: `num_blocks` whole blocks, or gen_length."""
        return self.gen_length if self.exact else self.block_len * self.num_blocks

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raises BadInput if exact verification cannot continue the prompt; thresholds can continue any."""
        if self.exact:
            check_first_token(self, prompt)


def check_common(config) -> None:
    """Raises BadInput unless the settings that all methods have are in range: mask_id, eos_id, gen_length,
    temperature and seed."""
    for name, token in ("mask_id", config.mask_id), *(("eos_id", token) for token in config.eos_ids):
        check_whole(name, token, 0, 2**31 - 1)
    check_whole("gen_length", config.gen_length, 1, MOST_TOKENS)
    check_finite("temperature", config.temperature)
    if config.temperature < 0:
        raise BadInput(f"temperature must be 0 or above, found {config.temperature!r}")
    check_whole("seed", config.seed, 0, 2**32 - 1)


def removed_ids(config) -> tuple[int, int]:
    """The ids of the mask token and the padding token where no answer may hold them, else -1.

    An id that ends answers stays, and "release" removes nothing, as the authors' code.
    """
    if getattr(config, "semantics", "fixed") == "release":
        return -1, -1
    ids = config.mask_id, -1 if config.pad_id is None else config.pad_id
    return tuple(-1 if token in config.eos_ids else token for token in ids)


def check_readings(config) -> None:
    """Raises BadInput unless first_token, border and slot_sizes are in range."""
    check_choice("first_token", config.first_token, FIRST_TOKENS)
    check_choice("border", config.border, BORDERS)
    for size in config.slot_sizes:
        check_whole("slot_sizes", size, 1, MOST_TOKENS)


def check_first_token(config, prompt: Sequence[int]) -> None:
    """Raises BadInput if the prompt is empty and `first_token` is "next", which needs a prompt token."""
    if config.first_token == "next" and not len(prompt):
        raise BadInput("first_token must be 'mask' for an empty prompt, found 'next'")


def border_every(config) -> int:
    """The period of the response places that border "draft" reads off mask tokens; 0 for border "ar".

    These are the borders of slots of every size: multiples of the least common multiple of `slot_sizes`.
    """
    return math.lcm(*config.slot_sizes) if config.border == "draft" else 0


def check_choice(name: str, value, choices: Sequence[str]) -> None:
    """Raises BadInput unless `value` is one of `choices`."""
    if value not in choices:
        raise BadInput(f"{name} must be one of {', '.join(choices)}, found {quoted(value)}")


def as_ids(eos_id: int | Sequence[int]) -> tuple[int, ...]:
    """One id or several as a tuple. Raises BadInput if there is none."""
    ids = tuple(eos_id) if isinstance(eos_id, Sequence) else (eos_id,)
    if not ids:
        raise BadInput("eos_id must be a token id or several, found none")
    return ids


def check_whole(name: str, value, least: int, most: int) -> None:
    """Raises BadInput unless `value` is an integer from `least` to `most`, both included."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
        raise BadInput(f"{name} must be a whole number from {least} to {most}, found {quoted(value)}")


def check_finite(name: str, value) -> None:
    """Raises BadInput unless `value` is a finite number."""
    try:
        finite = not isinstance(value, bool) and math.isfinite(value)
    except (TypeError, OverflowError):  # not a number, or an integer beyond the range of float
        finite = False
    if not finite:
        raise BadInput(f"{name} must be a finite number, found {quoted(value)}")


def quoted(value) -> str:
    """`repr(value)` for error lines, cut to 80 characters."""
    text = (
        repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of very many digits"
    )
    return text if len(text) <= 80 else f"{text[:77]}..."
