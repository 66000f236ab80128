"""Tasks whose examples stand in files."""

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
    """Examples of JSON-lines files (.gz too), each line in one split for good.

    Held-out splits keep the order of the file; training has a new order each time round, which the seed
    decides. An index beyond the last example begins again.
    """

    path: str = ""

    def __post_init__(self):
        if not isinstance(self.path, str) or not self.path:
            raise BadInput(f"{self.name}.path is {self.path!r}, expected a JSON-lines file")
        _ = self.splits  # whatever is wrong with the files is said at once

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
        epoch, place = divmod(index, count)
        if split == "train":
            place = _order(count, seed, epoch)[place]
        return self.splits[split][place]

    @abc.abstractmethod
    def _read(self) -> Iterable[tuple[str, Example]]:
        """Every example with its split."""


@functools.lru_cache(maxsize=16)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    """0 … count - 1 in random order."""
    return np.argsort(Dice("order", seed, epoch).raw(count), kind="stable")
