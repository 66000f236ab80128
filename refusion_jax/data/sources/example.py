"""The example, which every source and every task returns."""

from collections.abc import Sequence
from typing import NamedTuple

from refusion_jax.tokenizer.chat_template import Message


class Example(NamedTuple):
    """A prompt (`query`) and its response. A query is a text or the messages of a conversation so far."""

    query: str | Sequence[Message]
    response: str


class Broken(NamedTuple):
    """A line of a source that cannot be read: its file and line, and what is wrong with it."""

    where: str
    error: str
