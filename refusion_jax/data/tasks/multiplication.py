"""Products of multi-digit numbers, worked out by partial products and their running sum."""

import dataclasses
import re
from typing import ClassVar

from refusion_jax.data.tasks.task import Dice, Generator

_WORDINGS = ("{} x {} = ?", "Multiply {} by {}.", "What is {} times {}?", "Find the product of {} and {}.")
_QUERY = re.compile("|".join(re.escape(w).replace(r"\{\}", "([0-9]{1,12})") for w in _WORDINGS))


@dataclasses.dataclass(frozen=True)
class Multiplication(Generator):
    """The product of a number with exactly `left_digits` digits and one with exactly `right_digits`.

    The response has one partial product per digit of the right number, the lowest first, then their sums. A
    problem is the pair of numbers.
    """

    left_digits: int = 3
    right_digits: int = 2

    name: ClassVar[str] = "multiplication"

    def __post_init__(self):
        self._require("left_digits", 1, 12)
        self._require("right_digits", 1, 12)

    def _draw(self, dice: Dice) -> tuple[int, int]:
        left, right = (
            dice.between(10 ** (digits - 1), 10**digits - 1)
            for digits in (self.left_digits, self.right_digits)
        )
        return left, right

    def _key(self, problem: tuple[int, int]) -> str:
        # Unordered, so that 4 times 3 and 3 times 4 are in the same split.
        low, high = sorted(problem)
        return f"{low}*{high}"

    def _word(self, problem: tuple[int, int], dice: Dice) -> str:
        return dice.pick(_WORDINGS).format(*problem)

    def parse(self, query: str) -> tuple[int, int] | None:
        match = _QUERY.fullmatch(query)
        if match is None:
            return None
        left, right = (int(group) for group in match.groups() if group is not None)
        return left, right

    def _solution(self, problem: tuple[int, int]) -> str:
        left, right = problem
        return f"{', '.join(product_steps(left, right))} #### {left * right}"


def product_steps(left: int, right: int) -> list[str]:
    """One partial product per digit of `right`, the lowest first, then their running sums."""
    parts = [int(d) * 10**power for power, d in enumerate(str(right)[::-1])]
    steps = [f"{left}*{part}={left * part}" for part in parts]
    total = left * parts[0]
    for part in parts[1:]:
        steps.append(f"{total}+{left * part}={total + left * part}")
        total += left * part
    return steps
