"""General text, to be trained on beside the tasks."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from refusion_jax.data.sources.example import Example
from refusion_jax.data.sources.jsonl import read_jsonl
from refusion_jax.data.tasks.file_task import FileTask
from refusion_jax.data.tasks.task import split_of


@dataclasses.dataclass(frozen=True)
class Text(FileTask):
    """Lines of `query` and `response`, or of `messages`, as the source "jsonl" reads them.

    5 in 100 are the validation split and 5 the test split, which a hash of the query decides: so equal
    queries are in the same. Nothing judges an answer.
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
