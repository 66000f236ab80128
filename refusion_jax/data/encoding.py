"""From examples to token ids: which can be used, and how many tokens they take."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from refusion_jax.data.sources.example import Example
from refusion_jax.errors import BadInput
from refusion_jax.tokenizer import Tokenizer

Row = dict[str, np.ndarray]


class Counts(NamedTuple):
    """Numbers of usable and of dropped examples, of a whole finite source or of the first ones of a task.

    Attributes:
      broken: lines of the source that cannot be read, which are no examples.
    """

    kept: int
    too_long: int
    empty: int
    broken: int = 0

    def __str__(self) -> str:
        broken = f", {self.broken} broken lines skipped" if self.broken else ""
        return (
            f"{self.kept} examples kept, {self.too_long} longer than max_length and {self.empty} "
            f"with an empty response dropped{broken}"
        )


class Encoded(NamedTuple):
    """Token ids of a prompt, and of its response with EOS; both are empty if the response is empty."""

    prompt: list[int]
    response: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)


class Encoder:
    """Converts examples to token ids and to rows of `max_length` tokens, and decides which can be used.

    Args:
      tokenizer: encodes prompts and responses.
      max_length: tokens per row.
      template: variables of the chat template.
      eos_multiple, eos_extra_blocks: as in DataConfig.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_length: int,
        template: Mapping[str, Any] | None = None,
        eos_multiple: int = 1,
        eos_extra_blocks: int = 0,
    ):
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._template = dict(template or {})
        self._eos_multiple = eos_multiple
        self._eos_extra_blocks = eos_extra_blocks

    @property
    def highest_id(self) -> int:
        """No token has a higher id."""
        return max(self._tokenizer.vocab_size - 1, *self._tokenizer.special.roles().values())

    def fingerprint(self) -> str:
        """A text that is equal for encoders that give equal tokens; `max_length` does not matter."""
        parts = [self._tokenizer.fingerprint(), self._template, self._eos_multiple, self._eos_extra_blocks]
        return json.dumps(parts, sort_keys=True, default=str)

    def encode(self, examples: Sequence[Example], numbers: Sequence[int]) -> list[Encoded]:
        """Token ids of examples. The number of an example determines how many extra EOS it gets."""
        prompts = self._tokenizer.encode_prompts([example.query for example in examples], **self._template)
        responses = self._tokenizer.encode_batch([example.response for example in examples])
        return [
            Encoded(prompt, self._ended(response, number)) if example.response.strip() else Encoded([], [])
            for example, prompt, response, number in zip(examples, prompts, responses, numbers, strict=True)
        ]

    def _ended(self, response: list[int], number: int) -> list[int]:
        """The response followed by EOS, up to a multiple of `eos_multiple` and `eos_extra_blocks` beyond."""
        blocks = len(response) // self._eos_multiple + 1
        if self._eos_extra_blocks:
            blocks += hash32(f"eos {number}") % (self._eos_extra_blocks + 1)
        return response + [self._tokenizer.eos_id] * (blocks * self._eos_multiple - len(response))

    def usable(self, length: int | np.ndarray) -> bool | np.ndarray:
        """Whether an example of this many tokens (0 for an empty response) fits in a row."""
        return (length > 0) & (length <= self._max_length)

    def count(self, lengths: np.ndarray, what: str, broken: int = 0) -> Counts:
        """Counts and logs how many of the examples with these `lengths` [N] are usable.

        Args:
          lengths: tokens of each example.
          what: name of the source, for messages.
          broken: lines of the source that cannot be read.

        Raises:
          BadInput: none is usable; `what` names the source.
        """
        too_long, empty = (int(n.sum()) for n in (lengths > self._max_length, lengths == 0))
        counts = Counts(int(self.usable(lengths).sum()), too_long, empty, broken)
        if counts.kept == 0:
            shortest = f"; the shortest takes {lengths[lengths > 0].min()}" if too_long else ""
            raise BadInput(
                f"{what}: no example can be used with data.max_length {self._max_length} ({counts}{shortest})"
            )
        level = logging.WARNING if too_long or empty or broken else logging.INFO
        logging.getLogger(__name__).log(level, "%s: %s", what, counts)
        return counts

    def row(self, tokens: Sequence[int] | np.ndarray, prompt_len: int, example_id: int) -> Row:
        """The padded row of one example, the tokens of its prompt and its response; see `Examples`."""
        padded = np.full(self._max_length, self._tokenizer.pad_id, np.int32)
        padded[: len(tokens)] = tokens
        return {
            "tokens": padded,
            "prompt_len": np.int32(prompt_len),
            "total_len": np.int32(len(tokens)),
            "example_id": np.int32(example_id % 2**31),
        }


def hash32(text: str) -> int:
    """A 32-bit hash that derives unrelated seeds.

    Grain adds the epoch to its seed, so without it seed 1 would give the order of seed 0 one epoch later.
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
