"""How a prompt is decoded by plan and infill, and the checks that settings of every method share."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

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
            found = quoted(self.slot_score)
            raise BadInput(f"slot_score must be one of {', '.join(SLOT_SCORES)}, found {found}")
        if not isinstance(self.recompute, bool):
            raise BadInput(f"recompute must be true or false, found {quoted(self.recompute)}")
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

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Any prompt can be continued, an empty one too."""


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
        raise BadInput(f"{name} must be a whole number from {least} to {most}, found {quoted(value)}")


def check_finite(name: str, value) -> None:
    """Raises BadInput unless value is a finite number."""
    try:
        finite = not isinstance(value, bool) and math.isfinite(value)
    except (TypeError, OverflowError):  # no number, or a whole number beyond any float
        finite = False
    if not finite:
        raise BadInput(f"{name} must be a finite number, found {quoted(value)}")


def quoted(value) -> str:
    """A value as an error line shows it: a long one by its beginning."""
    text = (
        repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of very many digits"
    )
    return text if len(text) <= 80 else f"{text[:77]}..."
