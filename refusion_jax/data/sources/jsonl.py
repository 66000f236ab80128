"""Examples from JSONL files."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from refusion_jax.data.sources.example import Example
from refusion_jax.errors import BadInput
from refusion_jax.tokenizer.chat_template import check_messages

FIELDS = ("query", "response")


def load_jsonl(paths: Sequence[str | Path], fields: tuple[str, str] = FIELDS) -> list[Example]:
    """All examples of the files, in order. For data that does not fit in memory see `sources.tfds`.

    Raises:
      BadInput: a file cannot be read or has no example, or a line is malformed.
    """
    return [example for path in paths for example in read_jsonl(path, fields)]


def read_jsonl(path: str | Path, fields: tuple[str, str] = FIELDS) -> Iterator[Example]:
    """Reads the examples of one file with one JSON object per line; blank lines are skipped.

    A line is `{"query": text, "response": text}` or `{"messages": [{"role", "content"}, ...]}`, see
    `read_record`.

    Args:
      path: the file; one with the suffix .gz is decompressed.
      fields: names of the fields of query and response.

    Raises:
      BadInput: as for `load_jsonl`.
    """
    count = 0
    open_file = gzip.open if str(path).endswith(".gz") else open
    try:
        with open_file(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _read_line(line, f"{path}:{number}", fields)
                    count += 1
    except (OSError, EOFError, zlib.error) as error:  # the last two are raised for damaged .gz files
        raise BadInput(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if count == 0:
        raise BadInput(f"{path}: holds no examples, expected one JSON object a line")


def _read_line(line: bytes, where: str, fields: tuple[str, str]) -> Example:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise BadInput(f"{where}: a JSON {type(record).__name__}, expected an object")
    return read_record(record, where, fields)


def read_record(record: Mapping[str, Any], where: str, fields: tuple[str, str] = FIELDS) -> Example:
    """The example in a record with query and response, or with `messages`.

    The last message of the assistant is the response, and the messages before it are the query. Messages
    after it are ignored.

    Args:
      record: fields of the record.
      where: file and line, for messages.
      fields: names of the fields of query and response.

    Raises:
      BadInput: the record has another form. The message begins with `where`.
    """
    if "messages" in record:
        return _read_messages(record["messages"], where)
    query, response = fields
    for field in fields:
        if field not in record:
            raise BadInput(
                f"{where}: has no {field!r} but {sorted(record)}; "
                f"expected {query} and {response}, or messages"
            )
        _check_text(record[field], field, where)
    return Example(record[query], record[response])


def _read_messages(messages: Any, where: str) -> Example:
    if not isinstance(messages, list):
        raise BadInput(f"{where}: messages is {messages!r}, expected a list")
    try:
        messages = check_messages(messages)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from error
    for number, message in enumerate(messages):
        _check_text(message["content"], f"messages[{number}].content", where)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[-1] == 0:
        raise BadInput(
            f"{where}: messages have roles {[m['role'] for m in messages]}, expected a message by "
            "the assistant with at least one before it"
        )
    query, response = messages[: answers[-1]], messages[answers[-1]]["content"]
    if len(query) == 1 and query[0]["role"] == "user":
        return Example(query[0]["content"], response)
    return Example(query, response)


def _check_text(value: Any, field: str, where: str) -> None:
    if not isinstance(value, str):
        raise BadInput(f"{where}: {field} is {value!r}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(f"{where}: {field} has a lone surrogate at {error.start}") from error
