"""Word problems in plain English with two to six steps of arithmetic."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from refusion_jax.data.tasks.task import Dice, Generator

_NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas")
_ITEMS = ("apples", "books", "coins", "cards", "eggs", "marbles", "pens", "shells", "stamps")

# The same templates word sentences and parse them.
_START = ("{name} has {n} {item}.", "{name} owns {n} {item}.", "{name} starts with {n} {item}.")
_CHANGES = {  # sign -> sentences that change the number of the one person
    "+": ("{name} buys {n} more.", "A friend gives {name} {n} more.", "{name} finds another {n}."),
    "-": ("{name} gives away {n}.", "{name} loses {n} of them.", "Then {n} of the {item} break."),
    "*": ("{name} swaps them for {n} times as many.", "A trade turns each one into {n}."),
    "/": ("{name} makes {n} equal piles and keeps one pile.", "{name} keeps one of {n} equal shares."),
}
_RELATIONS = {  # sign -> sentences that relate a new person to the previous one
    "+": ("{name} has {n} more {item} than {other}.", "{name} has as many as {other} and {n} more."),
    "-": ("{name} has {n} fewer {item} than {other}.", "{other} has {n} more {item} than {name}."),
    "*": ("{name} has {n} times as many {item} as {other}.", "{name} has {n} for each of {other}'s."),
}
_QUESTIONS = {
    "changes": ("How many {item} does {name} have now?", "How many {item} are left for {name}?"),
    "relations": ("How many {item} does {name} have?", "What is the number of {name}'s {item}?"),
    "total": ("How many {item} do they have together?", "How many {item} is that in all?"),
}
_GAPS = {
    "name": "(?P<name>[A-Z][a-z]+)",
    "other": "(?P<other>[A-Z][a-z]+)",
    "item": "(?P<item>[a-z]+)",
    "n": "(?P<n>[0-9]{1,6})",
}


_MOST_STEPS = 6


class Problem(NamedTuple):
    story: str  # a key of _QUESTIONS
    start: int
    steps: tuple[tuple[str, int], ...]  # sign and number, applied one after the other


@dataclasses.dataclass(frozen=True)
class WordProblems(Generator):
    """Stories of `min_steps` to `max_steps` steps, with no intermediate number above `largest`.

    Either the number of one person changes step by step, and the last number is asked for; or the number of
    each person is given relative to the previous person, and the last number or the sum is asked for. A sum
    takes as many steps again.
    """

    min_steps: int = 2
    max_steps: int = 5
    largest: int = 100

    name: ClassVar[str] = "word_problems"

    def __post_init__(self):
        self._require("max_steps", 2, _MOST_STEPS)
        self._require("min_steps", 2, self.max_steps)
        self._require("largest", 10, 100_000)

    def _draw(self, dice: Dice) -> Problem:
        length = dice.between(self.min_steps, self.max_steps)
        stories = ("changes", "relations", "total") if length % 2 == 0 else ("changes", "relations")
        story = dice.pick(stories)
        start = value = dice.between(2, self.largest)
        steps = []
        for _ in range(length // 2 if story == "total" else length):
            sign, number = self._draw_step(dice, value, "+-*/" if story == "changes" else "+-*")
            steps.append((sign, number))
            value = _apply(value, sign, number)
        return Problem(story, start, tuple(steps))

    def _draw_step(self, dice: Dice, value: int, signs: str) -> tuple[str, int]:
        """A random step with a result between 2, so that plurals stay correct, and `largest`."""
        choices = {
            "+": range(2, self.largest - value + 1),
            "-": range(2, value - 1),
            "*": range(2, min(9, self.largest // value) + 1),
            "/": [n for n in range(2, 10) if value % n == 0 and value // n >= 2],
        }
        sign = dice.pick([sign for sign in signs if choices[sign]])
        return sign, dice.pick(choices[sign])

    def _key(self, problem: Problem) -> str:
        # "changes" and "relations" word the same calculation.
        return f"{problem.start}{problem.steps}{problem.story == 'total'}"

    def _word(self, problem: Problem, dice: Dice) -> str:
        item = dice.pick(_ITEMS)
        people = dice.sample(_NAMES, len(problem.steps) + 1)
        if problem.story == "changes":
            people = people[:1] * len(people)
        forms = _CHANGES if problem.story == "changes" else _RELATIONS
        sentences = [dice.pick(_START).format(name=people[0], n=problem.start, item=item)]
        pairs = itertools.pairwise(people)
        for (sign, n), (other, name) in zip(problem.steps, pairs, strict=True):
            wording = dice.pick(forms[sign])
            sentences.append(wording.format(name=name, other=other, n=n, item=item))
        question = dice.pick(_QUESTIONS[problem.story]).format(name=people[-1], item=item)
        return " ".join([*sentences, question])

    def parse(self, query: str) -> Problem | None:
        sentences = re.split(r"(?<=[.?]) ", query)
        if not 3 <= len(sentences) <= 2 + _MOST_STEPS:
            return None
        stories = (_read_story(story, sentences) for story in _QUESTIONS)
        return next((problem for problem in stories if problem is not None), None)

    def _solution(self, problem: Problem) -> str:
        values, lines = [problem.start], []
        for sign, number in problem.steps:
            values.append(_apply(values[-1], sign, number))
            lines.append(f"{values[-2]}{sign}{number}={values[-1]}")
        answer = values[-1]
        if problem.story == "total":
            answer = values[0]
            for value in values[1:]:
                lines.append(f"{answer}+{value}={answer + value}")
                answer += value
        return f"{', '.join(lines)} #### {answer}"


def _apply(value: int, sign: str, number: int) -> int:
    match sign:
        case "+":
            return value + number
        case "-":
            return value - number
        case "*":
            return value * number
        case "/":
            return value // number
    raise AssertionError(sign)


def _read_story(story: str, sentences: Sequence[str]) -> Problem | None:
    """The problem in the sentences, read as this kind of story; None if they are not one."""
    start, *middle, question = sentences
    opening = _read(_START, start)
    if opening is None:
        return None
    item, people = opening["item"], [opening["name"]]
    value, steps = int(opening["n"]), []
    for sentence in middle:
        role = "name" if story == "changes" else "other"
        found = _read_step(story, sentence, {"item": item, role: people[-1]})
        if found is None:
            return None
        sign, n, name = found
        if (story != "changes" and name in people) or (sign == "/" and (n == 0 or value % n)):
            return None
        people.append(name)
        steps.append((sign, n))
        value = _apply(value, sign, n)
    asked = _read(_QUESTIONS[story], question, item=item, name=people[-1])
    return None if asked is None else Problem(story, int(opening["n"]), tuple(steps))


def _read_step(story: str, sentence: str, known: dict[str, str]) -> tuple[str, int, str] | None:
    """(sign, number, person whose number results) of a step; None if the sentence is not one."""
    for sign, wordings in (_CHANGES if story == "changes" else _RELATIONS).items():
        if found := _read(wordings, sentence, **known):
            return sign, int(found["n"]), found["name"]
    return None


def _read(wordings: Sequence[str], sentence: str, **known: str) -> dict[str, str] | None:
    """Gap -> value in the first wording that matches `sentence` and agrees with `known`; None without one."""
    for wording in wordings:
        if match := _pattern(wording).fullmatch(sentence):
            found = match.groupdict()
            if all(found.get(gap, value) == value for gap, value in known.items()):
                return {**known, **found}
    return None


@functools.cache
def _pattern(wording: str) -> re.Pattern:
    pattern = re.escape(wording)
    for gap, filling in _GAPS.items():
        pattern = pattern.replace(re.escape(f"{{{gap}}}"), filling)
    return re.compile(pattern)
