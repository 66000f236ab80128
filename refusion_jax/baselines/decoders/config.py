"""Settings of the decoders of the baselines. Imports no JAX, so that `--help` is fast."""

import dataclasses
from collections.abc import Sequence

from refusion_jax.decode.config import (
    MOST_BLOCK_TOKENS,
    MOST_TOKENS,
    as_ids,
    border_every,
    check_choice,
    check_common,
    check_finite,
    check_first_token,
    check_readings,
    check_whole,
)
from refusion_jax.errors import BadInput
from refusion_jax.model.reading import SLOT_SIZES

CACHES = ("none", "prefix", "dual")
NONE, PREFIX, DUAL = range(3)


@dataclasses.dataclass(frozen=True)
class ARConfig:
    """Settings of autoregressive decoding for one prompt.

    Attributes:
      mask_id: token id of the mask token.
      eos_id: token id of EOS, or several ids, each of which ends a response.
      gen_length: the most response tokens, EOS included.
      temperature: of the sampled tokens (Gumbel-max); 0 is greedy.
      seed: of the samples where temperature is above 0.
      first_token: the logits from which the first response token is read. "next": those of the last prompt
        token, as AR models are trained. "mask": those of one mask token fed after the prompt, as ReFusion
        models are trained (in their training no prompt token predicts the token after it).
      border: the logits from which a response token is read whose place is a border of slots of every size.
        "ar": those of the token before it. "draft": those of a mask token in its place, fed after all tokens
        before it, because ReFusion's training predicts no token across a slot border.
      slot_sizes: the slot sizes that the model was trained with; read with border "draft".
      pad_id: token id of the padding token; None for none. See `removed_ids`.

    Raises:
      BadInput: a setting is out of range; the message names it.
    """

    mask_id: int
    eos_id: int | tuple[int, ...]
    gen_length: int = 128
    temperature: float = 0.0
    seed: int = 0
    first_token: str = "next"
    border: str = "ar"
    slot_sizes: tuple[int, ...] = SLOT_SIZES
    pad_id: int | None = None

    def __post_init__(self):
        check_common(self)
        check_readings(self)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The token ids that end a response."""
        return as_ids(self.eos_id)

    @property
    def border_every(self) -> int:
        """Multiples of this are read off a mask token; 0 for none."""
        return border_every(self)

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raises BadInput if the prompt is empty and `first_token` is "next", which needs a prompt token."""
        check_first_token(self, prompt)


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Settings shared by MDM and BD3 for one prompt; each method adds the length of its blocks.

    Attributes:
      mask_id: token id of the mask token.
      eos_id: token id of EOS, or several ids, each of which ends a response.
      gen_length: the most response tokens, EOS included.
      tokens_per_step: masked tokens of the block that every pass commits, the most confident ones.
      token_threshold: a pass also commits every token drafted with a probability above this; with 1 or more
        there are none.
      temperature: of the drafts (Gumbel-max); 0 is greedy. Their probabilities are those at temperature 1.
      seed: of the drafts where temperature is above 0.

    Raises:
      BadInput: a setting is out of range, or gen_length does not divide into blocks; the message names it.
    """

    mask_id: int
    eos_id: int | tuple[int, ...]
    gen_length: int = 128
    tokens_per_step: int = 1
    token_threshold: float = 1.0
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self):
        check_common(self)
        check_whole("tokens_per_step", self.tokens_per_step, 1, MOST_TOKENS)
        check_finite("token_threshold", self.token_threshold)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The token ids that end a response."""
        return as_ids(self.eos_id)

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Accepts every prompt; these methods can continue an empty one too."""

    def check_blocks(self, setting: str, parts: int, block_len: int) -> None:
        """Raises BadInput unless gen_length is a multiple of `parts` and `block_len` is not too long.

        Args:
          setting: the name of the setting whose value is `parts`.
        """
        if self.gen_length % parts:
            raise BadInput(f"gen_length must be a multiple of {setting} = {parts}, found {self.gen_length}")
        if block_len > MOST_BLOCK_TOKENS:
            raise BadInput(f"blocks must be at most {MOST_BLOCK_TOKENS} tokens long, found {block_len}")


@dataclasses.dataclass(frozen=True)
class MDMConfig(BlockConfig):
    """Settings of MDM decoding for one prompt; other attributes and errors as in BlockConfig.

    Attributes:
      num_blocks: blocks per response, filled left to right; gen_length must be a multiple.
      cache: one of CACHES, described in mdm.py.
    """

    num_blocks: int = 1
    cache: str = "none"

    def __post_init__(self):
        super().__post_init__()
        check_whole("num_blocks", self.num_blocks, 1, MOST_TOKENS)
        self.check_blocks("num_blocks", self.num_blocks, self.gen_length // self.num_blocks)
        check_choice("cache", self.cache, CACHES)

    @property
    def block_len(self) -> int:
        """Tokens per block."""
        return self.gen_length // self.num_blocks

    @property
    def cache_kind(self) -> int:
        """`cache` as a number: NONE, PREFIX or DUAL."""
        return CACHES.index(self.cache)


@dataclasses.dataclass(frozen=True)
class BD3Config(BlockConfig):
    """Settings of BD3 decoding for one prompt; other attributes and errors as in BlockConfig.

    Attributes:
      block_len: tokens per block, as in training; gen_length must be a multiple.
    """

    block_len: int = 32

    def __post_init__(self):
        super().__post_init__()
        check_whole("block_len", self.block_len, 1, MOST_TOKENS)
        self.check_blocks("block_len", self.block_len, self.block_len)

    @property
    def num_blocks(self) -> int:
        """Blocks per response."""
        return self.gen_length // self.block_len
