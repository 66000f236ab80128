"""Serves a file of requests: `sample --input`."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from refusion_jax.errors import BadInput, report
from refusion_jax.files import check_output, open_atomically
from refusion_jax.serving.admission import by_length, check_fits, rows_that_fit
from refusion_jax.serving.engine import fitting_shape, in_order, served
from refusion_jax.serving.opened import Opened, open_model
from refusion_jax.serving.progress import Progress, digest, request_digest, run_record
from refusion_jax.serving.requests import Request, is_id, parse
from refusion_jax.serving.results import to_json


class Asked(NamedTuple):
    """A line of the file.

    Attributes:
      digest: of all that its result depends on besides the model.
      request: None if the line holds none.
      refusal: the result of a request that is not served, otherwise None.
    """

    digest: str
    request: Request | None
    refusal: dict[str, Any] | None


def answer_file(flags: argparse.Namespace) -> int:
    """Serves every request of --input; returns the exit code, 2 if some of them cannot be served.

    Those that cannot be served are known before anything is decoded: one line on stderr tells so, and each
    has a result with an `error`.

    Raises:
      BadInput: the file cannot be read, or the output cannot be written, exists or cannot be resumed.
    """
    check_output("--output", flags.output)
    progress = None
    if is_file(flags.output):
        progress = Progress(flags.output, resume=flags.resume, overwrite=flags.overwrite)
        progress.check()
    elif flags.resume:
        raise BadInput(f"--resume: --output={flags.output} must be a regular file")
    lines = read_lines(Path(flags.input))
    opened = open_model(flags)
    asked = [read_request(opened, line, f"{flags.input}:{number}") for number, line in lines]
    if progress is None:
        return stream(opened, asked, flags)
    kept = progress.start(
        run_record(flags.checkpoint, opened) | {"requests": [line.digest for line in asked]}
    )
    if progress.is_whole:
        return report_errors(errors_in(progress.path, len(asked)), len(asked))
    return fill(progress, kept, opened, asked, flags.batch_size)


def is_file(output: str | None) -> bool:
    """Whether --output is a regular file, or will be one."""
    if output in (None, "-"):
        return False
    target = Path(os.path.realpath(output))
    return target.is_file() or not target.exists()


def read_request(opened: Opened, line: str, where: str) -> Asked:
    """The request in a line; `where` is its file and line number, for messages."""
    model, raw = opened.model, None
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Asked(digest(line), None, {"id": None, "error": f"{where}: not JSON ({error})"})
    request = None
    try:
        request = parse(raw, opened.defaults, opened.tokenizer, model.config.vocab_size)
        check_fits(request, model.config, model.dtype)
    except BadInput as error:
        request_id = raw["id"] if isinstance(raw, dict) and is_id(raw.get("id")) else None
        refusal = {"id": request_id, "error": f"{where}: {error}"}
        return Asked(digest(line) if request is None else request_digest(request), request, refusal)
    return Asked(request_digest(request), request, None)


def fill(
    progress: Progress,
    kept: Mapping[int, Mapping[str, Any]],
    opened: Opened,
    asked: Sequence[Asked],
    batch_size: int,
) -> int:
    """Decodes the requests that have no result yet, and writes the output; returns the exit code."""
    errors = {index: answer["error"] for index, answer in kept.items() if "error" in answer}
    for index, line in enumerate(asked):
        if line.refusal is not None and index not in kept:
            progress.add(index, line.refusal)
            errors[index] = line.refusal["error"]
    code = report_errors([errors[index] for index in sorted(errors)], len(asked))
    with opened.scope():
        for index, answer in served_by_length(opened, asked, batch_size, kept):
            progress.add(index, answer)
    progress.finish()
    return code


def stream(opened: Opened, asked: Sequence[Asked], flags: argparse.Namespace) -> int:
    """Writes the results in the order of the requests to standard output, a pipe or a device."""
    refused = [(index, line.refusal) for index, line in enumerate(asked) if line.refusal is not None]
    code = report_errors([refusal["error"] for _, refusal in refused], len(asked))

    def numbered() -> Iterator[tuple[int, dict[str, Any]]]:
        yield from refused
        yield from served_by_length(opened, asked, flags.batch_size)

    with opened.scope(), opened_stream(flags.output) as write:
        for answer in in_order(numbered()):
            write(to_json(answer))
    return code


@contextlib.contextmanager
def opened_stream(output: str | None) -> Iterator[Callable[[str], None]]:
    """Yields a function that writes a line to standard output (None or "-"), a pipe or a device at once."""
    if output in (None, "-"):
        yield lambda line: print(line, flush=True)
        return
    with open_atomically(output) as file:

        def write(line: str) -> None:
            file.write(f"{line}\n".encode())
            file.flush()

        yield write


def errors_in(results: Path, count: int) -> list[str]:
    """The errors in a file of results. Raises BadInput if it does not hold `count` results."""
    answers = [json.loads(line) for line in results.read_text(encoding="utf-8").split("\n")[:-1]]
    if len(answers) != count:
        raise BadInput(
            f"--resume: {results} holds {len(answers)} results, expected one for each of {count} requests or "
            "--overwrite"
        )
    return [answer["error"] for answer in answers if "error" in answer]


def report_errors(errors: Sequence[str], count: int) -> int:
    """Prints one line if there are errors among the results of `count` requests; returns the exit code."""
    if not errors:
        return 0
    return report(BadInput(f"{len(errors)} of {count} requests could not be served, first {errors[0]}"))


def served_by_length(
    opened: Opened, asked: Sequence[Asked], batch_size: int, kept: Container[int] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (index, result) of each request as it is ready; those of about the same length decode together.

    Those in `kept` are left out, but not of the padded shape: what is computed is the same with and without.
    """
    model, params, tokenizer, defaults, _ = opened
    accepted = [index for index, line in enumerate(asked) if line.refusal is None]
    for places in by_length([asked[index].request for index in accepted]):
        indices = [accepted[place] for place in places]
        group = [asked[index].request for index in indices]
        rows = rows_that_fit(group, batch_size, model.config, model.dtype)
        shape = fitting_shape(group, rows, defaults.ahead)
        left = [index for index in indices if index not in kept]
        if left:
            requests = [asked[index].request for index in left]
            for place, answer in served(model, params, tokenizer, requests, shape, defaults.stop):
                yield left[place], answer


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(line number, line) of every line of a file, or of standard input ("-"), that is not blank.

    Raises:
      BadInput: the file cannot be read or holds no request.
    """
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--input={path}: cannot be read ({error})") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise BadInput(f"--input={path}: holds no request")
    return lines
