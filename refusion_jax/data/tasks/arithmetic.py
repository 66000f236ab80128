"""Addition, subtraction and multiplication of multi-digit numbers, with the steps of written arithmetic."""

import dataclasses
import re
from typing import ClassVar, NamedTuple

from refusion_jax.data.tasks.multiplication import product_steps
from refusion_jax.data.tasks.task import Dice, Generator
from refusion_jax.errors import BadInput

_WORDINGS = ("{} = ?", "What is {}?", "Compute {}.", "Work out {}.")
_QUERY = re.compile(
    "|".join(re.escape(w).replace(r"\{\}", r"([0-9]{1,12}) ([-+*]) ([0-9]{1,12})") for w in _WORDINGS)
)


class Problem(NamedTuple):
    left: int
    operation: str
    right: int


@dataclasses.dataclass(frozen=True)
class Arithmetic(Generator):
    """One operation on two integers, each uniform from 0 to 10^digits - 1.

    Sums and differences are worked out column by column, the lowest digit first, with the carry (or borrow)
    as the third number. Products are one partial product per digit of the right operand, then their sums.
    Differences are never negative.

    Attributes:
      digits: most digits of an operand.
      operations: signs to draw from, some of "+-*".
    """

    digits: int = 3
    operations: str = "+-"

    name: ClassVar[str] = "arithmetic"

    def __post_init__(self):
        self._require("digits", 1, 12)
        if not self.operations or set(self.operations) - set("+-*"):
            raise BadInput(f"arithmetic.operations is {self.operations!r}, expected some of the signs +-*")

    def _draw(self, dice: Dice) -> Problem:
        operation = dice.pick(self.operations)
        left, right = dice.below(10**self.digits), dice.below(10**self.digits)
        if operation == "-":
            left, right = max(left, right), min(left, right)
        return Problem(left, operation, right)

    def _key(self, problem: Problem) -> str:
        # Unordered, so that 4+3 and 3+4 are in the same split.
        low, high = sorted((problem.left, problem.right))
        return f"{low}{problem.operation}{high}"

    def _word(self, problem: Problem, dice: Dice) -> str:
        return dice.pick(_WORDINGS).format(f"{problem.left} {problem.operation} {problem.right}")

    def parse(self, query: str) -> Problem | None:
        match = _QUERY.fullmatch(query)
        if match is None:
            return None
        left, operation, right = (group for group in match.groups() if group is not None)
        problem = Problem(int(left), operation, int(right))
        return None if operation == "-" and problem.left < problem.right else problem

    def _solution(self, problem: Problem) -> str:
        steps = _STEPS[problem.operation](problem.left, problem.right)
        answer = _RESULT[problem.operation](problem.left, problem.right)
        return f"{', '.join(steps)} #### {answer}"


def _columns(left: int, right: int) -> list[tuple[int, int]]:
    """Pairs of digits of both numbers, the lowest first; the shorter number is padded with zeros."""
    width = max(len(str(left)), len(str(right)))
    top, bottom = (map(int, reversed(f"{number:0{width}}")) for number in (left, right))
    return list(zip(top, bottom, strict=True))


def _add_steps(left: int, right: int) -> list[str]:
    steps, carry = [], 0
    for a, b in _columns(left, right):
        total = a + b + carry
        steps.append(f"{a}+{b}+{carry}={total}")
        carry = total // 10
    return steps


def _subtract_steps(left: int, right: int) -> list[str]:
    steps, borrowed = [], 0
    for a, b in _columns(left, right):
        lent = 10 if a - b - borrowed < 0 else 0
        steps.append(f"{a + lent}-{b}-{borrowed}={a + lent - b - borrowed}")
        borrowed = lent // 10
    return steps


_STEPS = {"+": _add_steps, "-": _subtract_steps, "*": product_steps}
_RESULT = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
