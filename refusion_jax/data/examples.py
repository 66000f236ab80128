"""Examples as fixed-length rows of token ids, in one endless sequence with random access."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from refusion_jax.data.sources.example import Example
from refusion_jax.data.tasks.task import Task
from refusion_jax.errors import BadInput
from refusion_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    import grain

_SCAN = 1024  # examples tokenised at a time, and how many of an endless task are looked at

Row = dict[str, np.ndarray]


class Counts(NamedTuple):
    """What became of the examples scanned: a whole finite source, or the first of an endless one."""

    kept: int
    too_long: int
    empty: int

    def __str__(self) -> str:
        return (
            f"{self.kept} examples kept, {self.too_long} longer than max_length and {self.empty} "
            "with an empty response dropped"
        )


class Encoded(NamedTuple):
    """Ids of the prompt, and of the response with EOS; both empty if the response is."""

    prompt: list[int]
    response: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)


class Encoder:
    """Examples to token ids and rows of `max_length`; knows which examples can be used.

    `template` are options of the chat template, `eos_multiple` and `eos_extra_blocks` as in DataConfig.
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
        """Ids of examples; the number of each decides how far it is filled up."""
        prompts = self._tokenizer.encode_prompts([example.query for example in examples], **self._template)
        responses = self._tokenizer.encode_batch([example.response for example in examples])
        return [
            Encoded(prompt, self._ended(response, number)) if example.response.strip() else Encoded([], [])
            for example, prompt, response, number in zip(examples, prompts, responses, numbers, strict=True)
        ]

    def _ended(self, response: list[int], number: int) -> list[int]:
        """The response with its EOS, and those that fill it up."""
        blocks = len(response) // self._eos_multiple + 1
        if self._eos_extra_blocks:
            blocks += hash32(f"eos {number}") % (self._eos_extra_blocks + 1)
        return response + [self._tokenizer.eos_id] * (blocks * self._eos_multiple - len(response))

    def usable(self, length: int | np.ndarray) -> bool | np.ndarray:
        return (length > 0) & (length <= self._max_length)

    def count(self, lengths: np.ndarray, what: str) -> Counts:
        """Counts and logs what of `lengths` [N] is usable; raises BadInput when nothing is."""
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

    def row(self, encoded: Encoded, index: int) -> Row:
        tokens = np.full(self._max_length, self._tokenizer.pad_id, np.int32)
        tokens[: encoded.length] = encoded.prompt + encoded.response
        return {
            "tokens": tokens,
            "prompt_len": np.int32(len(encoded.prompt)),
            "total_len": np.int32(encoded.length),
            "example_id": np.int32(index % 2**31),
        }


class Examples(Protocol):
    """An endless sequence of usable examples, each a function of its place.

    `counts` has one entry for each source.
    """

    counts: dict[str, Counts]

    def __getitem__(self, place: int) -> Row:
        """tokens [L] (prompt, response, EOS, padding), prompt_len [], total_len [], index []; int32.

        `total_len` counts prompt, response and EOS. `index` numbers the examples over the whole
        run: no two places share one (up to 2^31). In a finite source of N examples, those dropped
        included, it is epoch * N + the example's number in the source.

        Of packed rows (see `packing`) a place holds several, back to back in `tokens`; the others are [E],
        with a `total_len` of 0 where there is no example.
        """


class FiniteExamples:
    """The usable examples of a source (`name` is for messages), epoch after epoch.

    With a `shuffle_seed` each epoch has an order of its own, otherwise that of the source. `len` is
    the number of examples in an epoch, `lengths` [len] how many tokens each has. See `Examples`.
    """

    def __init__(self, encoder: Encoder, source: Sequence[Example], name: str, shuffle_seed: int | None):
        if len(source) == 0:
            raise BadInput(f"{name}: holds no examples")
        self._encoder = encoder
        self._source = source
        # Everything is tokenised once before the first step. Only then is the place of an example
        # known without a look at all those before it, which sharding and resuming rely on.
        lengths = np.concatenate(
            [
                _lengths(encoder, source.__getitem__, range(start, min(start + _SCAN, len(source))))
                for start in range(0, len(source), _SCAN)
            ]
        )
        self.counts = {name: encoder.count(lengths, name)}
        self._kept = np.flatnonzero(encoder.usable(lengths))
        self.lengths = lengths[self._kept]
        self._order = endless_order(len(self._kept), shuffle_seed)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, place: int) -> Row:
        return self.example(place // len(self), self._order[place])

    def example(self, epoch: int, which: int) -> Row:
        """The usable example `which`, of 0 … len - 1, as it is in an epoch."""
        number = int(self._kept[which])
        (encoded,) = self._encoder.encode([self._source[number]], [number])
        return self._encoder.row(encoded, epoch * len(self._source) + number)


class TaskExamples:
    """Examples of tasks that take turns; one that is too long is drawn again.

    `shares` says how many turns a task has in each cycle, 1 without it; `turns` is their number in all.
    `shortest` is the least number of tokens among the first of each task. See `Examples`.
    """

    _DRAWS = 1000
    _NEXT_DRAW = 2**40  # far beyond any place, so that no example is used for two places

    def __init__(
        self, encoder: Encoder, tasks: Sequence[Task], split: str, seed: int, shares: Sequence[int] = ()
    ):
        self._encoder = encoder
        shares = shares or [1] * len(tasks)
        # A task's turns, with their number among its own, are spread evenly over the cycle.
        turns = [
            (task, turn, share) for task, share in zip(tasks, shares, strict=True) for turn in range(share)
        ]
        self._cycle = sorted(turns, key=lambda entry: (entry[1] + 0.5) / entry[2])
        self.turns = len(turns)
        self._split = split
        self._seed = seed
        self.counts = {}
        usable = []
        for task in tasks:
            lengths = _lengths(encoder, lambda i, task=task: task.example(i, split, seed), range(_SCAN))
            self.counts[task.name] = encoder.count(lengths, str(task))
            usable.append(lengths[encoder.usable(lengths)])
        self.shortest = int(np.concatenate(usable).min())

    def __getitem__(self, place: int) -> Row:
        cycle, which = divmod(place, self.turns)
        task, turn, share = self._cycle[which]
        number = cycle * share + turn
        for draw in range(self._DRAWS):
            example = task.example(number + draw * self._NEXT_DRAW, self._split, self._seed)
            (encoded,) = self._encoder.encode([example], [place])
            if self._encoder.usable(encoded.length):
                return self._encoder.row(encoded, place)
        raise BadInput(f"{task}: {self._DRAWS} examples in a row are longer than data.max_length")


def _lengths(encoder: Encoder, example: Callable[[int], Example], numbers: Sequence[int]) -> np.ndarray:
    encoded = encoder.encode([example(number) for number in numbers], numbers)
    return np.array([one.length for one in encoded])


def endless_order(count: int, shuffle_seed: int | None) -> "grain.MapDataset":
    """0 … count - 1 again and again: each time in an order of its own, or as they stand without a seed."""
    import grain  # loads JAX and Orbax, which a worker that makes examples of tasks does without

    order = grain.MapDataset.range(count)
    if shuffle_seed is not None:
        order = order.shuffle(hash32(f"shuffle {shuffle_seed}"))
    return order.repeat()


def shuffled(index: int, count: int, seed: int) -> int:
    """Where `index` of 0 … count - 1 goes in an order drawn by `seed`."""
    import grain  # as above

    return grain.experimental.index_shuffle(index, count - 1, seed, 4)


def hash32(text: str) -> int:
    """Scatters seeds: grain adds the epoch to its seed, so seed 1 would be seed 0 an epoch later."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
