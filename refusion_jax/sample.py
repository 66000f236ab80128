"""Decodes prompts from the command line, a file of requests, or a terminal.

python -m refusion_jax.sample --prompt="..."
python -m refusion_jax.sample --checkpoint=DIR --prompt="..."
python -m refusion_jax.sample --checkpoint=DIR --input=requests.jsonl --output=results.jsonl
python -m refusion_jax.sample --checkpoint=DIR

Without --checkpoint the small model that comes with the package decodes.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from refusion_jax.config import Parser
from refusion_jax.errors import BadInput, command
from refusion_jax.serving import engine as serving
from refusion_jax.serving import flags as opening
from refusion_jax.serving import terminal
from refusion_jax.serving.engine import Request


def from_file(flags: argparse.Namespace) -> int:
    """Serves every request of --input; 2 if some could not be served."""
    check_output("--output", flags.output)
    lines = read_lines(Path(flags.input))
    opened = opening.open_model(flags)
    model, params, tokenizer, defaults, _ = opened
    answers: list[dict[str, Any] | None] = []
    requests: list[Request] = []
    for number, line in lines:
        try:
            raw = json.loads(line)
        except (ValueError, RecursionError) as error:
            answers.append({"id": None, "error": f"{flags.input}:{number}: not JSON ({error})"})
            continue
        try:
            requests.append(serving.parse(raw, defaults, tokenizer, model.config.vocab_size))
            answers.append(None)
        except BadInput as error:
            name = raw["id"] if isinstance(raw, dict) and serving.is_id(raw.get("id")) else None
            answers.append({"id": name, "error": f"{flags.input}:{number}: {error}"})

    served = iter(())
    if requests:
        shape = serving.fitting_shape(requests, flags.batch_size, defaults.ahead)
        served = serving.serve(model, params, tokenizer, requests, shape, defaults.stop)
    with opened.scope():
        write_results((next(served) if answer is None else answer for answer in answers), flags.output)
    errors = [answer["error"] for answer in answers if answer is not None]
    if errors:
        raise BadInput(f"{len(errors)} of {len(answers)} requests could not be served, first {errors[0]}")
    return 0


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(line number, line) of every line of a file that is not blank."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--input={path}: cannot be read ({error})") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise BadInput(f"--input={path}: holds no request")
    return lines


def write_results(results, output: str | None) -> None:
    """Writes results as JSON lines, to a file that takes its name when it is whole, or to stdout."""
    if output is None:
        for answer in results:
            print(to_json(answer), flush=True)
        return
    partial = Path(f"{output}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for answer in results:
            file.write(to_json(answer) + "\n")
            file.flush()
    os.replace(partial, output)


def to_json(answer: dict[str, Any]) -> str:
    """One line of JSON; an id that is no valid Unicode stays escaped."""
    line = json.dumps(answer, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(answer)
    return line


def check_output(flag: str, path: str | None) -> None:
    """Raises BadInput where a file cannot be written, before any work is done for it."""
    if path is None:
        return
    if Path(path).is_dir():
        raise BadInput(f"{flag}={path}: cannot be written (it is a folder)")
    if not Path(path).absolute().parent.is_dir():
        raise BadInput(f"{flag}={path}: cannot be written (its folder does not exist)")


def answer_prompts(flags: argparse.Namespace, prompts: Sequence[str]) -> int:
    """Prints the answer to each --prompt and what it took."""
    check_output("--trace", flags.trace)
    opened = opening.open_model(flags)
    requests = [text_request(opened, prompt, trace=bool(flags.trace)) for prompt in prompts]
    with opened.scope():
        answers = print_answers(opened, requests)
    if flags.trace:
        write_trace(Path(flags.trace), opened, requests[0], prompts[0], answers[0])
    return 0


def converse(flags: argparse.Namespace) -> int:
    """Answers lines typed on a terminal until it is closed."""
    opened = opening.open_model(flags)
    print("Type a prompt and Enter; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return 0
        try:
            with opened.scope():
                print_answers(opened, [text_request(opened, prompt)])
        except BadInput as error:
            print(f"error: {error}", file=sys.stderr)


def write_trace(
    path: Path, opened: opening.Opened, request: Request, prompt: str, answer: dict[str, Any]
) -> None:
    """Writes how an answer came about, for `view`: the prompt, each token's text, and every plan."""
    tokenizer = opened.tokenizer
    trace = {
        "prompt": prompt,
        "prompt_ids": list(request.prompt),
        "settings": dataclasses.asdict(request.config),
        "token_texts": [tokenizer.decode([token]) for token in answer["raw_ids"]],
        **answer,
    }
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(trace, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def text_request(opened: opening.Opened, prompt: str, trace: bool = False) -> Request:
    raw = {"id": 0, "prompt": prompt, "trace": trace}
    return serving.parse(raw, opened.defaults, opened.tokenizer, opened.model.config.vocab_size)


def print_answers(opened: opening.Opened, requests: Sequence[Request]) -> list[dict[str, Any]]:
    """Each answer on stdout and what it took on stderr; one compilation serves them all."""
    model, params, tokenizer, defaults, _ = opened
    shape = serving.fitting_shape(requests, 1, defaults.ahead)
    console = Console()
    live = console.is_terminal and defaults.method == "refusion"
    start = time.perf_counter()
    serving.warm_up(model, params, tokenizer, requests[0], shape)
    compiled = f"; compiled in {time.perf_counter() - start:.1f} s"
    answers = []
    for request in requests:
        start = time.perf_counter()
        if live:
            answer = terminal.answer(console, model, params, tokenizer, request, shape, defaults.stop)
        else:
            (answer,) = serving.serve(model, params, tokenizer, [request], shape, defaults.stop)
        seconds = time.perf_counter() - start
        print(answer["text"], flush=True)
        print(
            f"[{answer['num_tokens']} tokens in {answer['num_forwards']} forwards, "
            f"{answer['tokens_per_forward']:.2f} tokens per forward, "
            f"{answer['num_tokens'] / seconds:.0f} tokens/s{compiled}]",
            file=sys.stderr,
            flush=True,
        )
        compiled = ""
        answers.append(answer)
    return answers


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m refusion_jax.sample",
        description="Decodes prompts. Without --prompt or --input it asks for prompts on the terminal.",
        allow_abbrev=False,
    )
    opening.add_decoding_flags(parser)
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="a prompt; repeatable")
    parser.add_argument("--input", metavar="FILE", help="requests, one JSON object a line")
    parser.add_argument("--output", metavar="FILE", help="results, one JSON object a line (default stdout)")
    parser.add_argument(
        "--trace", metavar="FILE", help="write how the answer to the one --prompt came about, JSON"
    )
    flags = parser.parse_args(arguments)
    if flags.trace and (len(flags.prompt) != 1 or opening.asked_method(flags) != "refusion"):
        raise BadInput("--trace needs exactly one --prompt and --method=refusion")
    if flags.prompt and flags.input:
        raise BadInput("--prompt and --input: give one of the two")
    if flags.output and not flags.input:
        raise BadInput("--output needs --input")
    if flags.input:
        return from_file(flags)
    return answer_prompts(flags, flags.prompt) if flags.prompt else converse(flags)


if __name__ == "__main__":
    sys.exit(main())
