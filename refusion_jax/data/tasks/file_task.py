"""The base class of tasks whose examples are read from files."""

import abc
import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from refusion_jax.data.sources.example import Example
from refusion_jax.data.tasks.task import SPLITS, Dice, Task
from refusion_jax.errors import BadInput


@dataclasses.dataclass(frozen=True)
class FileTask(Task):
    """Examples of JSON-lines files (also .gz); each line belongs to one split.

    Held-out splits keep the order of the file. The training split has a new order in each epoch, determined
    by the seed. An index beyond the last example starts the next epoch.

    Raises:
      BadInput: `path` is not a text, or a file cannot be used.
    """

    path: str = ""

    def __post_init__(self):
        if not isinstance(self.path, str) or not self.path:
            raise BadInput(f"{self.name}.path is {self.path!r}, expected a JSON-lines file")
        _ = self.splits  # reads the files now, so that errors in them are reported at once

    @functools.cached_property
    def splits(self) -> dict[str, Sequence[Example]]:
        """The examples of each split, in the order of the file."""
        splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
        for split, example in self._read():
            splits[split].append(example)
        return splits

    def size(self, split: str) -> int:
        self._require_split(split)
        return len(self.splits[split])

    def example(self, index: int, split: str = "train", seed: int = 0) -> Example:
        count = self.size(split)
        if count == 0:
            raise BadInput(f"{self}: there is no example of the {split} split")
        epoch, number = divmod(index, count)
        if split == "train":
            number = _order(count, seed, epoch)[number]
        return self.splits[split][number]

    @abc.abstractmethod
    def _read(self) -> Iterable[tuple[str, Example]]:
        """(split, example) of every example."""


@functools.lru_cache(maxsize=16)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A random permutation of 0 to count - 1, int64 [count]."""
    return np.argsort(Dice("order", seed, epoch).raw(count), kind="stable")
