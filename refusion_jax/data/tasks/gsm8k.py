"""GSM8K: grade-school math word problems (Cobbe et al. 2021, arXiv 2110.14168)."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import ClassVar

from refusion_jax.data.sources.example import Example
from refusion_jax.data.sources.jsonl import read_jsonl
from refusion_jax.data.tasks.file_task import FileTask
from refusion_jax.data.tasks.task import final_answer, split_of, stable_hash
from refusion_jax.errors import BadInput

_FIELDS = ("question", "answer")
_CALCULATION = re.compile(r"<<[^<>]*>>")
# The strict match of lm-evaluation-harness: the first number that follows the mark and one space.
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[0-9]{1,30}(\.[0-9]{1,30})?")

# `_fingerprint` of some questions of the published test set. A file with one of them is not the training set,
# whatever its name.
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
    """The files as published, lines of `question` and `answer`. They do not come with this package.

    The train and validation splits come from the training file; a hash of the question puts 5 % in the
    validation split. The test split is the test file. Questions of the test file are left out of the other
    splits, and a training file with questions of the published test set is an error.

    The response is the published solution without the calculator annotations <<...>>. The verifier is the
    strict match of lm-evaluation-harness: the first number after `#### ` in the response, whatever follows
    it, must be written as in the solution but for commas and a full stop.

    Attributes:
      path: the training file.
      test_path: the test file, needed for the test split only.

    Raises:
      BadInput: a file cannot be used, or the training file contains questions of the published test set.
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
        """The question itself, if it is in the files."""
        return query if query in self._answers else None

    def _solution(self, problem: str) -> str:
        return self._answers[problem]

    def _accepts(self, problem: str, response: str) -> bool:
        found = _STRICT.search(response)
        return found is not None and _plain(found[1]) == _number(self._answers[problem])


def _examples(path: str) -> Iterator[Example]:
    for number, example in enumerate(read_jsonl(path, _FIELDS), start=1):
        response = _CALCULATION.sub("", example.response)
        if _number(response) is None:
            raise BadInput(f"{path}: example {number} has no number after ####, found {response[-40:]!r}")
        yield Example(example.query, response)


def _fingerprint(question: str) -> int:
    """A hash of the letters and digits of a question, the same for all ways to write it."""
    return stable_hash(re.sub(r"[\W_]+", "", question.lower()))


def _number(solution: str) -> str | None:
    """The number after the mark of a published solution, None if there is none."""
    number = _plain(final_answer(solution) or "")
    return number if _NUMBER.fullmatch(number) else None


def _plain(number: str) -> str:
    return number.replace(",", "").replace("$", "").strip().removesuffix(".")
