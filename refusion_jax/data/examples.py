"""Examples as rows of token ids of fixed length, in one endless sequence with random access."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from refusion_jax.data.sources.example import Example
from refusion_jax.data.tasks.file_task import FileTask
from refusion_jax.data.tasks.task import Task
from refusion_jax.errors import BadInput
from refusion_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    import grain

_SCAN = 1024  # examples tokenised at a time; also the number of examples of an endless task that are scanned

Row = dict[str, np.ndarray]


class Counts(NamedTuple):
    """Numbers of usable and of dropped examples, of a whole finite source or of the first _SCAN of a task."""

    kept: int
    too_long: int
    empty: int

    def __str__(self) -> str:
        return (
            f"{self.kept} examples kept, {self.too_long} longer than max_length and {self.empty} "
            "with an empty response dropped"
        )


class Identity(NamedTuple):
    """What examples are: a run that resumes must have the same, or its row numbers mean other examples.

    Attributes:
      examples: number of examples of finite sources, dropped ones included; tasks without end have none.
      sha256: of the tokens of all examples, of tasks of the first _SCAN, and of the text of tasks in files.
    """

    examples: int
    sha256: str


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

    def count(self, lengths: np.ndarray, what: str) -> Counts:
        """Counts and logs how many of the examples with these `lengths` [N] are usable.

        Raises:
          BadInput: none is usable; `what` names the source.
        """
        too_long, empty = (int(n.sum()) for n in (lengths > self._max_length, lengths == 0))
        counts = Counts(int(self.usable(lengths).sum()), too_long, empty)
        if counts.kept == 0:
            shortest = f"; the shortest takes {lengths[lengths > 0].min()}" if too_long else ""
            raise BadInput(
                f"{what}: no example can be used with data.max_length {self._max_length} ({counts}{shortest})"
            )
        level = logging.WARNING if too_long or empty else logging.INFO
        logging.getLogger(__name__).log(level, "%s: %s", what, counts)
        return counts

    def row(self, encoded: Encoded, example_id: int) -> Row:
        """The padded row of one example, see `Examples`."""
        tokens = np.full(self._max_length, self._tokenizer.pad_id, np.int32)
        tokens[: encoded.length] = encoded.prompt + encoded.response
        return {
            "tokens": tokens,
            "prompt_len": np.int32(len(encoded.prompt)),
            "total_len": np.int32(encoded.length),
            "example_id": np.int32(example_id % 2**31),
        }


class Examples(Protocol):
    """An endless sequence of rows; each row is a function of its index.

    Attributes:
      counts: numbers of usable and dropped examples, by source.
      identity: what the examples are, wherever they are read from.
    """

    counts: dict[str, Counts]
    identity: "Identity"

    def __getitem__(self, row_index: int) -> Row:
        """One row, as int32 arrays:

          tokens [L]: prompt, response, EOS, padding.
          prompt_len []: tokens of the prompt.
          total_len []: tokens of prompt, response and EOS.
          example_id []: number of the example within the whole run, unique up to 2^31. In a finite source of
            N examples, dropped ones included, it is epoch * N + the example's number in the source.

        A packed row (see `packing`) contains several examples back to back in `tokens`. The other arrays are
        then [E], with `total_len` 0 in unused entries.
        """


class FiniteExamples:
    """The usable examples of a finite source, one per row, repeated epoch after epoch. See `Examples`.

    `len` is the number of usable examples.

    Args:
      encoder: encodes the examples.
      source: the examples.
      name: name of the source, for messages.
      shuffle_seed: seed of the order, a new one for each epoch; None keeps the order of the source.

    Attributes:
      lengths: int [len], tokens of each usable example.
      identity: as in Examples.

    Raises:
      BadInput: the source has no usable example.
    """

    def __init__(self, encoder: Encoder, source: Sequence[Example], name: str, shuffle_seed: int | None):
        if len(source) == 0:
            raise BadInput(f"{name}: holds no examples")
        self._encoder = encoder
        self._source = source
        # All examples are tokenised once before the first step, to know which are usable. Sharding and
        # resuming need the example at any row index without reading all examples before it.
        digest = hashlib.sha256()
        lengths = np.concatenate(
            [
                _lengths(encoder, source.__getitem__, range(start, min(start + _SCAN, len(source))), digest)
                for start in range(0, len(source), _SCAN)
            ]
        )
        self.identity = Identity(len(source), digest.hexdigest())
        self.counts = {name: encoder.count(lengths, name)}
        self._kept = np.flatnonzero(encoder.usable(lengths))
        self.lengths = lengths[self._kept]
        self._order = endless_order(len(self._kept), shuffle_seed)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, row_index: int) -> Row:
        return self.example(row_index // len(self), self._order[row_index])

    def example(self, epoch: int, which: int) -> Row:
        """The row of usable example `which`, 0 to len - 1, with its `example_id` in this epoch."""
        number = int(self._kept[which])
        (encoded,) = self._encoder.encode([self._source[number]], [number])
        return self._encoder.row(encoded, epoch * len(self._source) + number)


class TaskExamples:
    """Examples of tasks, one per row; the tasks take turns. Examples that are too long are drawn again.

    See `Examples`.

    Args:
      encoder: encodes the examples.
      tasks: the tasks.
      split: split of the tasks.
      seed: seed of the examples.
      shares: turns of each task per cycle; by default 1 each.

    Attributes:
      turns: number of turns per cycle.
      shortest: fewest tokens of an example among the first _SCAN of each task.
      identity: as in Examples.

    Raises:
      BadInput: a task has no usable example among its first _SCAN.
    """

    _DRAWS = 1000
    _NEXT_DRAW = 2**40  # far beyond any row index, so that no example is used for two rows

    def __init__(
        self, encoder: Encoder, tasks: Sequence[Task], split: str, seed: int, shares: Sequence[int] = ()
    ):
        self._encoder = encoder
        shares = shares or [1] * len(tasks)
        # The turns of a task are spread evenly over the cycle; `turn` counts the turns of one task.
        turns = [
            (task, turn, share) for task, share in zip(tasks, shares, strict=True) for turn in range(share)
        ]
        self._cycle = sorted(turns, key=lambda entry: (entry[1] + 0.5) / entry[2])
        self.turns = len(turns)
        self._split = split
        self._seed = seed
        self.counts = {}
        usable, size, digest = [], 0, hashlib.sha256()
        for task in tasks:
            lengths = _lengths(
                encoder, lambda i, task=task: task.example(i, split, seed), range(_SCAN), digest
            )
            if isinstance(task, FileTask):
                size += task.size(split)
                for example in task.splits[split]:
                    digest.update(f"{example.query}\0{example.response}\0".encode())
            self.counts[task.name] = encoder.count(lengths, str(task))
            usable.append(lengths[encoder.usable(lengths)])
        self.shortest = int(np.concatenate(usable).min())
        self.identity = Identity(size, digest.hexdigest())

    def __getitem__(self, row_index: int) -> Row:
        cycle, which = divmod(row_index, self.turns)
        task, turn, share = self._cycle[which]
        number = cycle * share + turn
        for draw in range(self._DRAWS):
            example = task.example(number + draw * self._NEXT_DRAW, self._split, self._seed)
            (encoded,) = self._encoder.encode([example], [row_index])
            if self._encoder.usable(encoded.length):
                return self._encoder.row(encoded, row_index)
        raise BadInput(f"{task}: {self._DRAWS} examples in a row are longer than data.max_length")


def _lengths(
    encoder: Encoder, example: Callable[[int], Example], numbers: Sequence[int], digest: "hashlib._Hash"
) -> np.ndarray:
    """int [N], tokens of the examples with these numbers; adds their tokens to the digest."""
    encoded = encoder.encode([example(number) for number in numbers], numbers)
    for one in encoded:
        digest.update(np.array([len(one.prompt), *one.prompt, *one.response], np.int64).tobytes())
    return np.array([one.length for one in encoded])


def endless_order(count: int, shuffle_seed: int | None) -> "grain.MapDataset":
    """0 to count - 1, repeated without end: shuffled anew in each epoch, or in order if the seed is None."""
    import grain  # imports JAX and Orbax, which workers that make examples of tasks do not need

    order = grain.MapDataset.range(count)
    if shuffle_seed is not None:
        order = order.shuffle(hash32(f"shuffle {shuffle_seed}"))
    return order.repeat()


def shuffled(index: int, count: int, seed: int) -> int:
    """The position of `index` in a random permutation, drawn by `seed`, of 0 to count - 1."""
    import grain  # as above

    return grain.experimental.index_shuffle(index, count - 1, seed, 4)


def hash32(text: str) -> int:
    """A 32-bit hash that derives unrelated seeds.

    Grain adds the epoch to its seed, so without it seed 1 would give the order of seed 0 one epoch later.
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
