"""Settings of the baselines' decoders. Imports no JAX, so that `--help` is fast."""

import dataclasses
from collections.abc import Sequence

from refusion_jax.decode.config import (
    MOST_BLOCK_TOKENS,
    MOST_TOKENS,
    check_common,
    check_finite,
    check_whole,
    quoted,
)
from refusion_jax.errors import BadInput

FIRST_TOKENS = ("next", "mask")
CACHES = ("none", "prefix", "dual")
NONE, PREFIX, DUAL = range(3)


@dataclasses.dataclass(frozen=True)
class ARConfig:
    """How one prompt is continued left to right.

    Attributes:
      mask_id, eos_id: of the tokenizer.
      gen_length: most response tokens, EOS included.
      temperature: 0 is greedy.
      seed: of the samples where temperature is above 0.
      first_token: where the first response token is read: "next", off the last prompt token, as AR
        models are trained, or "mask", off one mask fed after the prompt, as ReFusion models are (no
        prompt token was ever trained to predict what follows it).

    Raises:
      BadInput: a setting that cannot be decoded.
    """

    mask_id: int
    eos_id: int
    gen_length: int = 128
    temperature: float = 0.0
    seed: int = 0
    first_token: str = "next"

    def __post_init__(self):
        check_common(self)
        if self.first_token not in FIRST_TOKENS:
            raise BadInput(
                f"first_token must be one of {', '.join(FIRST_TOKENS)}, found {quoted(self.first_token)}"
            )

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raises BadInput for an empty prompt where the first token is read off its last."""
        if self.first_token == "next" and not len(prompt):
            raise BadInput("first_token must be 'mask' for an empty prompt, found 'next'")


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """How one prompt is answered block by block; a method adds how long its blocks are.

    Attributes:
      mask_id, eos_id: of the tokenizer.
      gen_length: most response tokens, EOS included.
      tokens_per_step: of the masked tokens of a block every pass commits so many, the surest.
      token_threshold: and besides them every one drafted with a probability above this; from 1 on none.
      temperature: of the drafts (Gumbel-max); 0 is greedy. Their probability is that at temperature 1.
      seed: of the drafts where temperature is above 0.

    Raises:
      BadInput: a setting that cannot be decoded.
    """

    mask_id: int
    eos_id: int
    gen_length: int = 128
    tokens_per_step: int = 1
    token_threshold: float = 1.0
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self):
        check_common(self)
        check_whole("tokens_per_step", self.tokens_per_step, 1, MOST_TOKENS)
        check_finite("token_threshold", self.token_threshold)

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Any prompt can be continued, an empty one too."""

    def check_blocks(self, of: str, parts: int, block_len: int) -> None:
        """Raises BadInput unless gen_length divides into `parts` (which the setting `of` says) and blocks of
        `block_len` are not too long."""
        if self.gen_length % parts:
            raise BadInput(f"gen_length must be a multiple of {of} = {parts}, found {self.gen_length}")
        if block_len > MOST_BLOCK_TOKENS:
            raise BadInput(f"blocks must be at most {MOST_BLOCK_TOKENS} tokens long, found {block_len}")


@dataclasses.dataclass(frozen=True)
class MDMConfig(BlockConfig):
    """How one prompt is answered; other attributes and errors as in BlockConfig.

    Attributes:
      num_blocks: blocks that are filled left to right; gen_length is a multiple.
      cache: one of CACHES, see above.
    """

    num_blocks: int = 1
    cache: str = "none"

    def __post_init__(self):
        super().__post_init__()
        check_whole("num_blocks", self.num_blocks, 1, MOST_TOKENS)
        self.check_blocks("num_blocks", self.num_blocks, self.gen_length // self.num_blocks)
        if self.cache not in CACHES:
            raise BadInput(f"cache must be one of {', '.join(CACHES)}, found {quoted(self.cache)}")

    @property
    def block_len(self) -> int:
        """Tokens a block."""
        return self.gen_length // self.num_blocks

    @property
    def cache_kind(self) -> int:
        """NONE, PREFIX or DUAL."""
        return CACHES.index(self.cache)


@dataclasses.dataclass(frozen=True)
class BD3Config(BlockConfig):
    """How one prompt is answered; other attributes and errors as in BlockConfig.

    Attributes:
      block_len: tokens of a block, as the model was trained; gen_length is a multiple.
    """

    block_len: int = 32

    def __post_init__(self):
        super().__post_init__()
        check_whole("block_len", self.block_len, 1, MOST_TOKENS)
        self.check_blocks("block_len", self.block_len, self.block_len)

    @property
    def num_blocks(self) -> int:
        """Blocks of a response."""
        return self.gen_length // self.block_len
