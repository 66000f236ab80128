"""The numbers game Countdown: reach a target with given numbers, each used at most once."""

import dataclasses
import itertools
import re
from collections import Counter
from typing import ClassVar, NamedTuple

from refusion_jax.data.tasks.task import Dice, Generator

_MOST_NUMBERS = 5  # an exhaustive search then takes less than a second
_WORDINGS = (
    "Use {numbers} to make {target}.",
    "Make {target} from {numbers}.",
    "Numbers: {numbers}. Target: {target}.",
    "Reach {target} with {numbers}, each used at most once.",
)
_LIST = rf"(?P<numbers>[0-9]{{1,6}}(?:, [0-9]{{1,6}}){{1,{_MOST_NUMBERS - 1}}})"
_QUERIES = [
    re.compile(re.escape(w).replace(r"\{numbers\}", _LIST).replace(r"\{target\}", "(?P<target>[0-9]{1,6})"))
    for w in _WORDINGS
]
_STEP = re.compile(r"([0-9]{1,12}) ?([-+*/]) ?([0-9]{1,12}) ?= ?([0-9]{1,12})")


class Problem(NamedTuple):
    numbers: tuple[int, ...]
    target: int
    way: tuple[str, ...] = ()  # steps to the target; empty if the problem was parsed from a query


@dataclasses.dataclass(frozen=True)
class Countdown(Generator):
    """Reach a target from `numbers` numbers between 2 and `largest`.

    A step combines two of the available numbers by + - * /, without negative results or fractions, and its
    result replaces them. The target and all intermediate results are at most `largest_target`. The response
    is the sequence of steps from which the problem was made. It uses the numbers one after another, all of
    them or (of three or more) all but one. Any other valid sequence is accepted.
    """

    numbers: int = 4
    largest: int = 25
    largest_target: int = 100

    name: ClassVar[str] = "countdown"

    def __post_init__(self):
        self._require("numbers", 2, _MOST_NUMBERS)
        self._require("largest", 5, 1000)
        self._require("largest_target", 2 * self.largest, 100_000)

    def _draw(self, dice: Dice) -> Problem:
        while True:
            numbers = [dice.between(2, self.largest) for _ in range(self.numbers)]
            value, way = numbers[0], []
            for number in numbers[1 : dice.between(max(2, self.numbers - 1), self.numbers)]:
                choices = [step for step in _steps(value, number) if 2 <= step[1] <= self.largest_target]
                if not choices:
                    break
                step, value = dice.pick(choices)
                way.append(f"{step}={value}")
            else:
                if value not in numbers:
                    return Problem(tuple(dice.sample(numbers, len(numbers))), value, tuple(way))

    def _key(self, problem: Problem) -> str:
        return f"{sorted(problem.numbers)}{problem.target}"

    def _word(self, problem: Problem, dice: Dice) -> str:
        numbers = ", ".join(map(str, problem.numbers))
        return dice.pick(_WORDINGS).format(numbers=numbers, target=problem.target)

    def parse(self, query: str) -> Problem | None:
        match = next(filter(None, (pattern.fullmatch(query) for pattern in _QUERIES)), None)
        if match is None:
            return None
        numbers, target = tuple(map(int, match["numbers"].split(", "))), int(match["target"])
        return None if target in numbers else Problem(numbers, target)

    def _solution(self, problem: Problem) -> str | None:
        way = problem.way or _search(tuple(sorted(problem.numbers)), problem.target, set())
        return None if way is None else f"{', '.join(way)} #### {problem.target}"

    def _accepts(self, problem: Problem, response: str) -> bool:
        steps, _, answer = response.rpartition("####")
        if answer.strip() != str(problem.target):
            return False
        at_hand, result = Counter(problem.numbers), None
        for step in steps.split(","):
            match = _STEP.fullmatch(step.strip())
            if match is None:
                return False
            left, right, result = int(match[1]), int(match[3]), int(match[4])
            at_hand.subtract((left, right))
            if min(at_hand[left], at_hand[right]) < 0 or not _holds(left, match[2], right, result):
                return False
            at_hand[result] += 1
        return result == problem.target


def _holds(left: int, sign: str, right: int, result: int) -> bool:
    if sign == "/":
        return right > 0 and left == right * result
    return result == {"+": left + right, "-": left - right, "*": left * right}[sign]


def _steps(a: int, b: int) -> list[tuple[str, int]]:
    """(expression, result) of each step that combines two numbers, without x * 1, x / 1 and x - x."""
    high, low = max(a, b), min(a, b)
    found = [(f"{a}+{b}", a + b)]
    if high > low:
        found.append((f"{high}-{low}", high - low))
    if low > 1:
        found.append((f"{a}*{b}", a * b))
        if high % low == 0:
            found.append((f"{high}/{low}", high // low))
    return found


def _search(numbers: tuple[int, ...], target: int, tried: set[tuple[int, ...]]) -> tuple[str, ...] | None:
    """Searches exhaustively for steps from some of `numbers` (ascending) to the target; None without any."""
    tried.add(numbers)
    for i, j in itertools.combinations(range(len(numbers)), 2):
        for step, value in _steps(numbers[i], numbers[j]):
            way = (f"{step}={value}",)
            if value == target:
                return way
            others = [number for k, number in enumerate(numbers) if k not in (i, j)]
            left = tuple(sorted([*others, value]))
            if len(left) > 1 and left not in tried and (rest := _search(left, target, tried)):
                return way + rest
    return None
