"""Examples from JSONL files."""

import codecs
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from refusion_jax import buckets
from refusion_jax.buckets import is_remote, location
from refusion_jax.data.sources.example import Broken, Example
from refusion_jax.errors import BadInput
from refusion_jax.files import read_json_if_there, write_atomically
from refusion_jax.tokenizer.chat_template import check_messages

FIELDS = ("query", "response")


class JsonlSource:
    """The examples of JSONL files, in order; a `Source`.

    Args:
      paths: the files, local or in a bucket.
      fields: names of the fields of query and response.

    Attributes:
      name: the paths.
    """

    def __init__(self, paths: Sequence[str | Path], fields: tuple[str, str] = FIELDS):
        self.name = ", ".join(map(str, paths))
        self._paths = [location(path) for path in paths]
        self._fields = fields
        self._read = self._size = 0

    def entries(self) -> Iterator[tuple[str, Example] | Broken]:
        """Raises BadInput if a file cannot be read, or holds nothing."""
        self._read, self._size = 0, sum(map(_size, self._paths))
        for path in self._paths:
            for where, line in _lines(path):
                self._read += len(line)
                try:
                    yield where, _read_line(line, where, self._fields)
                except BadInput as error:
                    yield Broken(where, str(error).removeprefix(f"{where}: "))

    def progress(self) -> float:
        return min(1.0, self._read / max(1, self._size))  # of a .gz file more is read than its size

    def fingerprint(self, cache: Path) -> str:
        digests = [_digest(path, cache / "digests") for path in self._paths]
        # Whether a file is decompressed depends on its name.
        return json.dumps([digests, [path.name.endswith(".gz") for path in self._paths], self._fields])


def _size(path: Path) -> int:
    try:
        return buckets.size(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from None


def _digest(path: Path, cache: Path) -> str:
    """The SHA-256 of a file; it is kept in `cache`, and read again when the file has changed since."""
    try:
        state = _state(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from None
    key = hashlib.sha256(str(buckets.absolute(path)).encode()).hexdigest()[:32]
    known = cache / f"{key}.json"
    try:
        found = read_json_if_there(known)
    except BadInput:
        found = {}
    if found.get("state") != state:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from None
        found = {"state": state, "sha256": digest}
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(known, json.dumps(found))
    return found["sha256"]


def _state(path: Path) -> list[int]:
    """What changes when a file does, by its metadata."""
    if is_remote(path):
        return [int(buckets.file_system().info(str(path))["generation"])]
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def read_jsonl(path: str | Path, fields: tuple[str, str] = FIELDS) -> Iterator[Example]:
    """Reads the examples of one file with one JSON object per line; blank lines are skipped.

    A line is `{"query": text, "response": text}` or `{"messages": [{"role", "content"}, ...]}`, see
    `read_record`.

    Args:
      path: the file; one with the suffix .gz is decompressed.
      fields: names of the fields of query and response.

    Raises:
      BadInput: the file cannot be read or has no example, or a line is malformed.
    """
    for where, line in _lines(location(path)):
        yield _read_line(line, where, fields)


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """("FILE:LINE", line) of the lines of a file that are not blank, without a byte order mark.

    Raises:
      BadInput: the file cannot be read, or has no such line.
    """
    count = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield f"{path}:{number}", line
                    count += 1
    except (OSError, EOFError, zlib.error) as error:  # the last two are raised for damaged .gz files
        raise BadInput(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if count == 0:
        raise BadInput(f"{path}: holds no examples, expected one JSON object a line")


def _open(path: Path) -> IO[bytes]:
    file = path.open("rb")
    return gzip.open(file, "rb") if path.name.endswith(".gz") else file


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
