"""General text from JSON-lines files, to train on beside the tasks."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from refusion_jax.data.sources.example import Example
from refusion_jax.data.sources.jsonl import read_jsonl
from refusion_jax.data.tasks.file_task import FileTask
from refusion_jax.data.tasks.task import split_of


@dataclasses.dataclass(frozen=True)
class Text(FileTask):
    """Lines with `query` and `response`, or with `messages`, in the format of the source "jsonl".

    A hash of the query puts 5 % of the lines in the validation split and 5 % in the test split, so equal
    queries are in the same split. There is no verifier.
    """

    name: ClassVar[str] = "text"
    judged: ClassVar[bool] = False

    def _read(self) -> Iterator[tuple[str, Example]]:
        for example in read_jsonl(self.path):
            yield split_of(f"text:{example.query}"), example

    def parse(self, query: str) -> None:
        return None

    def _solution(self, problem: None) -> None:
        return None
