"""What every source gives."""

from collections.abc import Sequence
from typing import NamedTuple

from refusion_jax.tokenizer.chat_template import Message


class Example(NamedTuple):
    """A prompt and its response. A query of several messages is a conversation so far."""

    query: str | Sequence[Message]
    response: str
