"""What every task shares: examples as a function of their number, splits, verification."""

import abc
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np

from refusion_jax.data.sources.example import Example
from refusion_jax.errors import BadInput

T = TypeVar("T")

# Share of all problems, in percent; what is left over is for training.
HELD_OUT = {"validation": 5, "test": 5}
SPLITS = ("train", *HELD_OUT)

# A held-out split gets 1 problem in 20, so that 1000 draws miss it once in 1e22: unless there is
# no such problem at all.
_MAX_DRAWS = 1000


class Dice:
    """Random choices keyed by whatever it is made from: the same key gives the same choices.

    Reads the raw stream of Philox, which unlike NumPy's distributions is fixed across versions.
    """

    def __init__(self, *key: Any):
        self._bits = np.random.Philox(key=stable_hash(repr(key)))
        self._pool: list[int] = []

    def raw(self, count: int) -> np.ndarray:
        """`count` integers of 64 random bits, uint64 [count]."""
        return self._bits.random_raw(count)

    def below(self, stop: int) -> int:
        """An integer of 0 … stop-1."""
        if not self._pool:
            self._pool = self._bits.random_raw(32).tolist()
        return self._pool.pop() % stop

    def between(self, low: int, high: int) -> int:
        """An integer of low … high, both included."""
        return low + self.below(high - low + 1)

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items in random order."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """Examples by number, in splits that never meet, and a judge of answers to them.

    Attributes:
      judged: whether there is such a judge; `check` of a task without one accepts nothing.
    """

    name: ClassVar[str]
    judged: ClassVar[bool] = True

    @abc.abstractmethod
    def example(self, index: int, split: str = "train", seed: int = 0) -> Example:
        """Example number `index` of a split: a pure function of the arguments and the fields.

        Raises BadInput for an unknown split, or if the split holds no example.
        """

    def size(self, split: str) -> int | None:
        """How many examples a split has before they come again; None if there is no end of them."""
        return None

    def solution(self, query: str) -> str | None:
        """A full response to a query, worked out from the query alone."""
        problem = self.parse(query)
        return None if problem is None else self._solution(problem)

    def check(self, query: str, response: str) -> bool:
        """Whether the response's final answer is right; never raises, whatever the texts."""
        problem = self.parse(query)
        return problem is not None and self._accepts(problem, response)

    def check_all(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """`check` of many pairs of query and response, for tasks that do it faster at once."""
        return [self.check(query, response) for query, response in pairs]

    def check_exact(self, query: str, response: str) -> bool:
        """Whether the response is `solution`, every step of it, character by character."""
        return response == self.solution(query)

    @abc.abstractmethod
    def parse(self, query: str) -> Any | None:
        """The problem that a query poses, or None if it is not one of this task's."""

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
    """A generator of problems with an exact verifier; its fields set the difficulty.

    A problem is what has to be solved, apart from how it is worded. Its key alone decides which
    split it belongs to, so no wording of a held-out problem is ever seen in training, at whatever
    difficulty.
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
        return split_of(f"{self.name}:{self._key(problem)}")

    @abc.abstractmethod
    def _draw(self, dice: Dice) -> Any:
        """A random problem."""

    @abc.abstractmethod
    def _key(self, problem: Any) -> str:
        """The same text for all problems that are the same to solve."""

    @abc.abstractmethod
    def _word(self, problem: Any, dice: Dice) -> str:
        """A query that poses the problem, in one of several wordings."""


def split_of(key: str) -> str:
    """The split of whatever a text stands for."""
    place = stable_hash(key) % 100
    for split, share in HELD_OUT.items():
        if place < share:
            return split
        place -= share
    return "train"


def final_answer(response: str) -> str | None:
    """What stands after the last `####`, GSM8K's mark of the final answer."""
    _, mark, answer = response.rpartition("####")
    return answer.strip() if mark else None


def stable_hash(text: str) -> int:
    """128 bits of a hash that, unlike `hash`, is the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
