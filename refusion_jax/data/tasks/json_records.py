"""Extraction of several records from a text into JSON with the keys and nesting that the query prescribes."""

import dataclasses
import json
import re
from typing import Any, ClassVar, NamedTuple

from refusion_jax.data.tasks.extraction import FIELDS, NAMES, Fact, draw_facts, read_facts, rows_of, tell
from refusion_jax.data.tasks.task import Dice, Generator

_GROUPS = ("info", "data", "more", "card")
_REQUESTS = ("As JSON, keys {}:", "Give JSON with {}:", "JSON list of {}:")
_QUERIES = [re.compile(re.escape(wording).replace(r"\{\}", "([a-z, ()]+)")) for wording in _REQUESTS]
_KEY = re.compile(r"([a-z]+)(?:\(([a-z, ]+)\))?")


class Key(NamedTuple):
    name: str
    inner: tuple[str, ...] = ()  # fields, if the value is an object


class Problem(NamedTuple):
    facts: tuple[Fact, ...]
    schema: tuple[Key, ...]


@dataclasses.dataclass(frozen=True)
class JsonRecords(Generator):
    """Facts about `records` people, `fields` requested ones and `distractors` others each.

    The facts are worded as in `extraction`. The query prescribes the keys of an object and their order;
    `nested` of the fields are in an inner object. The response is a list of objects, in the order of first
    mention. White space is free; the order of keys is not.
    """

    records: int = 2
    fields: int = 3
    nested: int = 2
    distractors: int = 1
    value_length: int = 3

    name: ClassVar[str] = "json_records"

    def __post_init__(self):
        self._require("records", 1, len(NAMES))
        self._require("fields", 1, len(FIELDS))
        self._require("nested", 0, self.fields)
        self._require("distractors", 0, len(FIELDS) - self.fields)
        self._require("value_length", 1, 64)

    def _draw(self, dice: Dice) -> Problem:
        asked = dice.sample(FIELDS, self.fields)
        facts = draw_facts(dice, self.records, asked, self.distractors, self.value_length)
        keys = [Key("name"), *map(Key, asked[self.nested :])]
        if self.nested:
            keys.append(Key(dice.pick(_GROUPS), tuple(asked[: self.nested])))
        return Problem(facts, tuple(dice.sample(keys, len(keys))))

    def _key(self, problem: Problem) -> str:
        return f"{problem.schema}{sorted(map(str, _records(problem)))}"

    def _word(self, problem: Problem, dice: Dice) -> str:
        keys = (f"{key.name}({', '.join(key.inner)})" if key.inner else key.name for key in problem.schema)
        return f"{tell(problem.facts, dice)} {dice.pick(_REQUESTS).format(', '.join(keys))}"

    def parse(self, query: str) -> Problem | None:
        *sentences, request = query.split(". ")
        match = next(filter(None, (pattern.fullmatch(request) for pattern in _QUERIES)), None)
        facts, schema = read_facts(sentences), match and _read_schema(match[1])
        if not facts or not schema:
            return None
        asked = _fields(schema)
        whole = all(len(row) == len(asked) for row in rows_of(facts, asked).values())
        return Problem(facts, schema) if whole else None

    def _solution(self, problem: Problem) -> str:
        return json.dumps(_records(problem), separators=(",", ":"))

    def _accepts(self, problem: Problem, response: str) -> bool:
        try:
            # Objects become tuples of items, so that the order of keys and repeated keys count.
            found = json.loads(response, object_pairs_hook=tuple)
        except (ValueError, RecursionError):
            return False
        return found == json.loads(self._solution(problem), object_pairs_hook=tuple)


def _fields(schema: tuple[Key, ...]) -> list[str]:
    return [field for key in schema if key.name != "name" for field in key.inner or (key.name,)]


def _records(problem: Problem) -> list[dict[str, Any]]:
    rows = rows_of(problem.facts, _fields(problem.schema))
    return [
        {
            key.name: {field: row[field] for field in key.inner}
            if key.inner
            else (person if key.name == "name" else row[key.name])
            for key in problem.schema
        }
        for person, row in rows.items()
    ]


def _read_schema(text: str) -> tuple[Key, ...] | None:
    """Parses `a, b, group(c, d)`; None unless it has the key `name` and each field at most once."""
    keys = []
    for part in re.split(r", (?![^(]*\))", text):
        match = _KEY.fullmatch(part)
        if match is None or (match[2] and match[1] not in _GROUPS):
            return None
        keys.append(Key(match[1], tuple(match[2].split(", ")) if match[2] else ()))
    named, fields = [key.name for key in keys], _fields(tuple(keys))
    distinct = len(set(named)) == len(named) and len(set(fields)) == len(fields)
    return tuple(keys) if "name" in named and fields and distinct and set(fields) <= set(FIELDS) else None
