"""Extraction of facts from a short text into JSON (one record) or a table (several records)."""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from refusion_jax.data.tasks.task import Dice, Generator

FIELDS = ("code", "city", "size", "team", "room", "boat")

NAMES = ("Ann", "Bob", "Eve", "Ian", "Joy", "Kim", "Leo", "Max", "Pam", "Tom")
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
class Extraction(Generator):
    """Facts about `records` people: `fields` requested ones and `distractors` others per person.

    The facts are in random order, each in one of several wordings. The values are `value_length` random
    letters and digits, so the task needs no knowledge, only finding and copying. The requested fields are
    always the first of `FIELDS`, in that order. The response for one person is a JSON object; for several it
    is a table with one line per person, in the order of first mention.
    """

    fields: int = 3
    records: int = 1
    distractors: int = 0
    value_length: int = 4

    name: ClassVar[str] = "extraction"

    def __post_init__(self):
        self._require("fields", 1, len(FIELDS))
        self._require("records", 1, len(NAMES))
        self._require("distractors", 0, len(FIELDS) - self.fields)
        self._require("value_length", 1, 64)

    def _draw(self, dice: Dice) -> tuple[Fact, ...]:
        return draw_facts(dice, self.records, FIELDS[: self.fields], self.distractors, self.value_length)

    def _key(self, problem: tuple[Fact, ...]) -> str:
        return repr(sorted(list(row.values()) for row in rows_of(problem, FIELDS[: self.fields]).values()))

    def _word(self, problem: tuple[Fact, ...], dice: Dice) -> str:
        return f"{tell(problem, dice)} {dice.pick(_REQUESTS[self.records == 1])}"

    def parse(self, query: str) -> tuple[Fact, ...] | None:
        *sentences, request = query.split(". ")
        if request not in _REQUESTS[self.records == 1]:
            return None
        facts = read_facts(sentences)
        if facts is None:
            return None
        rows = rows_of(facts, FIELDS[: self.fields])
        whole = all(len(row) == self.fields for row in rows.values())
        return facts if whole and len(rows) == self.records else None

    def _solution(self, problem: tuple[Fact, ...]) -> str:
        rows = rows_of(problem, FIELDS[: self.fields])
        if self.records == 1:
            return json.dumps(*rows.values(), separators=(",", ":"))
        header = ("name", *FIELDS[: self.fields])
        return "\n".join(",".join(line) for line in [header, *_lines(rows)])

    def _accepts(self, problem: tuple[Fact, ...], response: str) -> bool:
        solution = self._solution(problem)
        if self.records > 1:
            return response.strip() == solution
        try:
            found = json.loads(response, object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError):
            return False
        return found == json.loads(solution)


def draw_facts(
    dice: Dice, records: int, asked: Sequence[str], distractors: int, value_length: int
) -> tuple[Fact, ...]:
    """Facts in random order: for each of `records` people the fields `asked` and `distractors` others."""
    rest = [field for field in FIELDS if field not in asked]
    facts = []
    for name in dice.sample(NAMES, records):
        for field in (*asked, *dice.sample(rest, distractors)):
            value = "".join(dice.pick(_ALPHABET) for _ in range(value_length))
            facts.append(Fact(name, field, value))
    return tuple(dice.sample(facts, len(facts)))


def tell(facts: Sequence[Fact], dice: Dice) -> str:
    """The text with one sentence per fact, each in a random wording."""
    return " ".join(
        dice.pick(_WORDINGS[fact.field]).format(name=fact.name, value=fact.value) + "." for fact in facts
    )


def read_facts(sentences: Sequence[str]) -> tuple[Fact, ...] | None:
    """The facts in sentences (without full stops); None if a sentence is not a fact or a fact is repeated."""
    facts = [_read_fact(sentence) for sentence in sentences]
    if None in facts or len({(fact.name, fact.field) for fact in facts}) < len(facts):
        return None
    return tuple(facts)


def rows_of(facts: Sequence[Fact], asked: Sequence[str]) -> dict[str, dict[str, str]]:
    """name -> field -> value of the fields `asked`; names in the order of first mention."""
    rows: dict[str, dict[str, str]] = {fact.name: {} for fact in facts}
    for field in asked:
        for fact in facts:
            if fact.field == field:
                rows[fact.name][field] = fact.value
    return rows


def _read_fact(sentence: str) -> Fact | None:
    for field, pattern in _PATTERNS:
        if match := pattern.fullmatch(sentence):
            return Fact(match["name"], field, match["value"])
    return None


def _lines(rows: dict[str, dict[str, str]]) -> list[tuple[str, ...]]:
    return [(name, *row.values()) for name, row in rows.items()]


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A dict of the pairs. Raises ValueError for a repeated key, of which json would keep the last value."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)
