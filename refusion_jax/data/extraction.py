"""Reading facts out of a short text into JSON (one record) or a table (several)."""

import dataclasses
import json
import re
from typing import ClassVar, NamedTuple

from refusion_jax.data.task import Dice, Task

FIELDS = ("code", "city", "size", "team", "room", "boat")

_NAMES = ("Ann", "Bob", "Eve", "Ian", "Joy", "Kim", "Leo", "Max", "Pam", "Tom")
_WORDINGS = {
    field: (
        f"{{name}} has {field} {{value}}",
        f"The {field} of {{name}} is {{value}}",
        f"{{value}} is the {field} of {{name}}",
        own,
    )
    for field, own in {
        "code": "{name} signs as {value}",
        "city": "{name} lives in {value}",
        "size": "{name} wears {value}",
        "team": "{name} plays for {value}",
        "room": "{name} sleeps in {value}",
        "boat": "{name} sails on {value}",
    }.items()
}
_PATTERNS = [
    (field, re.compile(wording.format(name="(?P<name>[A-Z][a-z]+)", value="(?P<value>[a-z0-9]+)")))
    for field, wordings in _WORDINGS.items()
    for wording in wordings
]
_REQUESTS = {True: ("JSON:", "As JSON:", "Give JSON:"), False: ("Table:", "As a table:")}
_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


class Fact(NamedTuple):
    name: str
    field: str
    value: str


@dataclasses.dataclass(frozen=True)
class Extraction(Task):
    """`records` people with `fields` facts each, and `distractors` facts each that are not asked for.

    All facts stand in random order, each in one of several wordings; the values are random letters
    and digits, so there is nothing to know, only to find and copy. The fields asked for are always
    the first of `FIELDS`, in that order. One record becomes a JSON object, several a table with one
    line a person, in the order of first mention.
    """

    fields: int = 3
    records: int = 1
    distractors: int = 0
    value_length: int = 4

    name: ClassVar[str] = "extraction"

    def __post_init__(self):
        self._require("fields", 1, len(FIELDS))
        self._require("records", 1, len(_NAMES))
        self._require("distractors", 0, len(FIELDS) - self.fields)
        self._require("value_length", 1, 64)

    def _draw(self, dice: Dice) -> tuple[Fact, ...]:
        facts = []
        for name in dice.sample(_NAMES, self.records):
            others = dice.sample(FIELDS[self.fields :], self.distractors)
            for field in (*FIELDS[: self.fields], *others):
                value = "".join(dice.pick(_ALPHABET) for _ in range(self.value_length))
                facts.append(Fact(name, field, value))
        return tuple(dice.sample(facts, len(facts)))

    def _key(self, problem: tuple[Fact, ...]) -> str:
        return repr(sorted(list(row.values()) for row in self._rows(problem).values()))

    def _word(self, problem: tuple[Fact, ...], dice: Dice) -> str:
        sentences = [
            dice.pick(_WORDINGS[fact.field]).format(name=fact.name, value=fact.value) + "."
            for fact in problem
        ]
        return " ".join([*sentences, dice.pick(_REQUESTS[self.records == 1])])

    def parse(self, query: str) -> tuple[Fact, ...] | None:
        *sentences, request = query.split(". ")
        if request not in _REQUESTS[self.records == 1]:
            return None
        facts = [_read_fact(sentence) for sentence in sentences]
        if None in facts or len({(fact.name, fact.field) for fact in facts}) < len(facts):
            return None
        rows = self._rows(tuple(facts))
        whole = all(len(row) == self.fields for row in rows.values())
        return tuple(facts) if whole and len(rows) == self.records else None

    def _rows(self, problem: tuple[Fact, ...]) -> dict[str, dict[str, str]]:
        """The values asked for, by name in the order of first mention, then by field."""
        rows: dict[str, dict[str, str]] = {fact.name: {} for fact in problem}
        for field in FIELDS[: self.fields]:
            for fact in problem:
                if fact.field == field:
                    rows[fact.name][field] = fact.value
        return rows

    def _solution(self, problem: tuple[Fact, ...]) -> str:
        rows = self._rows(problem)
        if self.records == 1:
            return json.dumps(*rows.values(), separators=(",", ":"))
        header = ("name", *FIELDS[: self.fields])
        return "\n".join(",".join(line) for line in [header, *_lines(rows)])

    def _same_answer(self, response: str, solution: str) -> bool:
        if self.records > 1:
            return response.strip() == solution
        try:
            found = json.loads(response, object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError):
            return False
        return found == json.loads(solution)


def _read_fact(sentence: str) -> Fact | None:
    for field, pattern in _PATTERNS:
        if match := pattern.fullmatch(sentence):
            return Fact(match["name"], field, match["value"])
    return None


def _lines(rows: dict[str, dict[str, str]]) -> list[tuple[str, ...]]:
    return [(name, *row.values()) for name, row in rows.items()]


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """JSON lets a key stand twice and keeps the last value; an exact answer names each once."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)
