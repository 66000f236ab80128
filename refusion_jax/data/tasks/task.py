"""The base classes of tasks: numbered examples, splits, verification of responses."""

import abc
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np

from refusion_jax.data.sources.example import Example
from refusion_jax.errors import BadInput

T = TypeVar("T")

# Share of all problems in percent; the rest is the split "train".
HELD_OUT = {"validation": 5, "test": 5}
SPLITS = ("train", *HELD_OUT)

# A held-out split has 1 problem in 20, so 1000 draws miss it with probability 1e-22, unless there is no such
# problem at all.
_MAX_DRAWS = 1000


class Dice:
    """A random generator seeded by a key: the same key always gives the same choices.

    It uses the raw bits of Philox, which are fixed across versions of NumPy, unlike NumPy's distributions.
    """

    def __init__(self, *key: Any):
        self._bits = np.random.Philox(key=stable_hash(repr(key)))
        self._pool: list[int] = []

    def raw(self, count: int) -> np.ndarray:
        """uint64 [count] of random bits."""
        return self._bits.random_raw(count)

    def below(self, stop: int) -> int:
        """A random integer from 0 to stop - 1."""
        if not self._pool:
            self._pool = self._bits.random_raw(32).tolist()
        return self._pool.pop() % stop

    def between(self, low: int, high: int) -> int:
        """A random integer from low to high, both included."""
        return low + self.below(high - low + 1)

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items in random order."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """Numbered examples in disjoint splits, and a verifier of responses. Its fields are the task's settings.

    Attributes:
      name: name in the registry.
      judged: whether the task has a verifier; without one, `check` accepts nothing.
    """

    name: ClassVar[str]
    judged: ClassVar[bool] = True

    @abc.abstractmethod
    def example(self, index: int, split: str = "train", seed: int = 0) -> Example:
        """Example number `index` of a split, a pure function of the arguments and the fields.

        Raises:
          BadInput: the split is unknown or has no example.
        """

    def size(self, split: str) -> int | None:
        """Number of different examples in a split; None if it is unlimited."""
        return None

    def solution(self, query: str) -> str | None:
        """A correct full response to a query, from the query alone; None if the query is not of this task."""
        problem = self.parse(query)
        return None if problem is None else self._solution(problem)

    def check(self, query: str, response: str) -> bool:
        """Whether the final answer of the response is right. Never raises because of the texts."""
        problem = self.parse(query)
        return problem is not None and self._accepts(problem, response)

    def check_all(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """`check` of many pairs of query and response; some tasks do this faster than one at a time."""
        return [self.check(query, response) for query, response in pairs]

    @abc.abstractmethod
    def parse(self, query: str) -> Any | None:
        """The problem that a query poses; None if the query is not of this task."""

    @abc.abstractmethod
    def _solution(self, problem: Any) -> str | None: ...

    def _accepts(self, problem: Any, response: str) -> bool:
        return final_answer(response) == final_answer(self._solution(problem))

    def _require_split(self, split: str) -> None:
        if split not in SPLITS:
            raise BadInput(f"split is {split!r}, expected one of {', '.join(SPLITS)}")

    def _require(self, field: str, low: int, high: int) -> None:
        value = getattr(self, field)
        if type(value) is not int or not low <= value <= high:
            raise BadInput(f"{self.name}.{field} is {value!r}, expected {low} to {high}")


@dataclasses.dataclass(frozen=True)
class Generator(Task):
    """A task that generates problems and verifies them exactly; its fields set the difficulty.

    A problem is independent of its wording. Its key alone determines its split, so no wording of a held-out
    problem occurs in training, at any difficulty.
    """

    def example(self, index: int, split: str = "train", seed: int = 0) -> Example:
        self._require_split(split)
        dice = Dice(self, split, seed, index)
        for _ in range(_MAX_DRAWS):
            problem = self._draw(dice)
            if self.split_of(problem) == split:
                return Example(self._word(problem, dice), self._solution(problem))
        raise BadInput(f"{self}: no problem of the {split} split in {_MAX_DRAWS} draws; make it more varied")

    def split_of(self, problem: Any) -> str:
        """The split of a problem."""
        return split_of(f"{self.name}:{self._key(problem)}")

    @abc.abstractmethod
    def _draw(self, dice: Dice) -> Any:
        """A random problem."""

    @abc.abstractmethod
    def _key(self, problem: Any) -> str:
        """A text that is equal for all problems that are solved in the same way; it determines the split."""

    @abc.abstractmethod
    def _word(self, problem: Any, dice: Dice) -> str:
        """A query that poses the problem, in one of several wordings."""


def split_of(key: str) -> str:
    """The split of an item, determined by its key."""
    percentile = stable_hash(key) % 100
    for split, share in HELD_OUT.items():
        if percentile < share:
            return split
        percentile -= share
    return "train"


def final_answer(response: str) -> str | None:
    """The text after the last `####`, GSM8K's mark of the final answer; None without the mark."""
    _, mark, answer = response.rpartition("####")
    return answer.strip() if mark else None


def stable_hash(text: str) -> int:
    """A 128-bit hash that, unlike `hash`, is the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
