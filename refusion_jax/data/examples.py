"""Examples as rows of token ids of fixed length, in one endless sequence with random access."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from refusion_jax.data.encoding import Counts, Encoder, Row, hash32
from refusion_jax.data.index import Index
from refusion_jax.data.sources.example import Example
from refusion_jax.data.tasks.file_task import FileTask
from refusion_jax.data.tasks.task import Task
from refusion_jax.errors import BadInput

if TYPE_CHECKING:
    import grain

_SCAN = 1024  # examples of an endless task that are scanned


class Identity(NamedTuple):
    """What examples are: a run that resumes must have the same, or its row numbers mean other examples.

    Attributes:
      examples: number of examples of finite sources, dropped ones included; tasks without end have none.
      sha256: of the tokens of all examples, of tasks of the first _SCAN, and of the text of tasks in files.
    """

    examples: int
    sha256: str


class Examples(Protocol):
    """An endless sequence of rows; each row is a function of its index.

    Attributes:
      counts: numbers of usable and dropped examples, by source.
      identity: what the examples are, wherever they are read from.
      broken_lines: a file that lists the lines that cannot be read, None if there are none.
    """

    counts: dict[str, Counts]
    identity: "Identity"
    broken_lines: Path | None

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
      index: the encoded examples. Sharding and resuming need the example at any row index without reading
        all examples before it, and which are usable is known once all were encoded.
      name: name of the source, for messages.
      shuffle_seed: seed of the order, a new one for each epoch; None keeps the order of the source.

    Attributes:
      index: as given.
      lengths: int [len], tokens of each usable example.
      identity: as in Examples.

    Raises:
      BadInput: the source has no usable example.
    """

    def __init__(self, encoder: Encoder, index: Index, name: str, shuffle_seed: int | None):
        self.index = index
        self._encoder = encoder
        self.identity = Identity(index.meta.examples, index.meta.sha256)
        self.counts = {name: encoder.count(index.lengths, name, index.meta.broken)}
        self._kept = np.flatnonzero(encoder.usable(index.lengths))
        self.lengths = index.lengths[self._kept]
        self._order = endless_order(len(self._kept), shuffle_seed)

    @property
    def broken_lines(self) -> Path | None:
        return self.index.broken_lines

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, row_index: int) -> Row:
        return self.example(row_index // len(self), self._order[row_index])

    def example(self, epoch: int, which: int) -> Row:
        """The row of usable example `which`, 0 to len - 1, with its `example_id` in this epoch."""
        number = int(self._kept[which])
        return self._encoder.row(*self.index[number], epoch * self.identity.examples + number)


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

    broken_lines = None
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
                tokens = encoded.prompt + encoded.response
                return self._encoder.row(tokens, len(encoded.prompt), row_index)
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
