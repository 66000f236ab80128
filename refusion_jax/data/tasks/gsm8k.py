"""GSM8K: word problems of grade-school mathematics (Cobbe et al. 2021, arXiv 2110.14168)."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import ClassVar

from refusion_jax.data.sources.example import Example
from refusion_jax.data.sources.jsonl import read_jsonl
from refusion_jax.data.tasks.file_task import FileTask
from refusion_jax.data.tasks.task import final_answer, split_of, stable_hash
from refusion_jax.errors import BadInput

_FIELDS = ("question", "answer")
_CALCULATION = re.compile(r"<<[^<>]*>>")
_NUMBER = re.compile(r"-?[0-9]{1,30}(\.[0-9]{1,30})?")

# Some questions of the published test set, as `_fingerprint` has them: a file with one of them is not
# the training set, whatever its name.
_TEST_QUESTIONS = {
    0xE474AC65A7F8698D801CA78471B55783,
    0xFB97E83C738E616D556665C30F4EB5F6,
    0x18FFAD778E2050FA331F7A169B790F50,
    0xA021B42052537ADB7AC31EE2A8163A18,
    0xD3C970E668F3C5112C47F11745E2B8DA,
    0xE7971AC3D5BD80FB8934722EA7D2FF6B,
    0xDF18D5CE341C8B9618059BA29913A3B9,
    0x70E4D43BA6886541A42B34D23A34A406,
}


@dataclasses.dataclass(frozen=True)
class Gsm8k(FileTask):
    """The files as published, lines of `question` and `answer`; nothing of them comes with this package.

    `path` is the training file: 5 in 100 of its problems, which a hash of the question decides, are the
    validation split, the others the train split. `test_path` is the test file, needed for the test
    split only. A question of the test file, or of the published test set, is never in another split:
    the former are left out of them, and a `path` with some of the latter is refused.

    The response is the published solution without the calculator's marks <<…>>. It is judged by the
    number after `####`; commas, a dollar sign and a full stop make no difference.
    """

    test_path: str = ""

    name: ClassVar[str] = "gsm8k"

    def _read(self) -> Iterator[tuple[str, Example]]:
        tested = set()
        for example in _examples(self.test_path) if self.test_path else ():
            tested.add(_fingerprint(example.query))
            yield "test", example
        for example in _examples(self.path):
            mark = _fingerprint(example.query)
            if mark in _TEST_QUESTIONS:
                raise BadInput(
                    f"gsm8k.path is {self.path!r}, which holds problems of GSM8K's test set; "
                    "expected its training set"
                )
            if mark not in tested:
                split = split_of(f"gsm8k:{mark}")
                yield ("validation" if split == "validation" else "train"), example

    @functools.cached_property
    def _answers(self) -> dict[str, str]:
        return {example.query: example.response for examples in self.splits.values() for example in examples}

    def parse(self, query: str) -> str | None:
        """The problem is the question itself, if it is one of the files'."""
        return query if query in self._answers else None

    def _solution(self, problem: str) -> str:
        return self._answers[problem]

    def _accepts(self, problem: str, response: str) -> bool:
        number = _number(response)
        return number is not None and number == _number(self._answers[problem])


def _examples(path: str) -> Iterator[Example]:
    for number, example in enumerate(read_jsonl(path, _FIELDS), start=1):
        response = _CALCULATION.sub("", example.response)
        if _number(response) is None:
            raise BadInput(f"{path}: example {number} has no number after ####, found {response[-40:]!r}")
        yield Example(example.query, response)


def _fingerprint(question: str) -> int:
    """The same for all spellings of a question: letters and digits count alone."""
    return stable_hash(re.sub(r"[\W_]+", "", question.lower()))


def _number(response: str) -> Decimal | None:
    answer = (final_answer(response) or "").replace(",", "").replace("$", "").removesuffix(".").strip()
    return Decimal(answer) if _NUMBER.fullmatch(answer) else None
