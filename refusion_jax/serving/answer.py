"""The modes of `sample`: prompts given by flags, prompts typed on a terminal, and a file of requests."""

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from refusion_jax.errors import BadInput
from refusion_jax.files import check_output, write_atomically
from refusion_jax.serving.engine import fitting_shape, serve, warm_up
from refusion_jax.serving.opened import Opened, asked_method, open_model
from refusion_jax.serving.request_file import answer_file
from refusion_jax.serving.requests import Request, parse
from refusion_jax.serving.terminal import live_view


def answer(flags: argparse.Namespace) -> int:
    """Runs the mode that the flags of `sample` ask for; returns the exit code.

    Raises:
      BadInput: flags contradict each other, or a file cannot be read or written.
    """
    if flags.trace and (len(flags.prompt) != 1 or asked_method(flags.checkpoint, flags.method) != "refusion"):
        raise BadInput("--trace needs exactly one --prompt and --method=refusion")
    if flags.prompt and flags.input:
        raise BadInput("--prompt and --input: give one of the two")
    if flags.output and not flags.input:
        raise BadInput("--output needs --input")
    if (flags.resume or flags.overwrite) and flags.output in (None, "-"):
        raise BadInput(f"--{'resume' if flags.resume else 'overwrite'} needs --output=FILE")
    if flags.input:
        return answer_file(flags)
    return answer_prompts(flags, flags.prompt) if flags.prompt else converse(flags)


def answer_prompts(flags: argparse.Namespace, prompts: Sequence[str]) -> int:
    """Prints the answer to each --prompt and its cost; writes --trace."""
    check_output("--trace", flags.trace)
    opened = open_model(flags)
    requests = [text_request(opened, prompt, trace=bool(flags.trace)) for prompt in prompts]
    with opened.scope():
        answers = print_answers(opened, requests)
    if flags.trace:
        write_trace(Path(flags.trace), opened, requests[0], prompts[0], answers[0])
    return 0


def converse(flags: argparse.Namespace) -> int:
    """Answers each line typed on the terminal, until end of input, or an interrupt at the prompt.

    An interrupt while an answer is decoded ends that answer alone.
    """
    opened = open_model(flags)
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)


def write_trace(path: Path, opened: Opened, request: Request, prompt: str, answer: dict[str, Any]) -> None:
    """Writes the trace file of an answer: prompt, settings, the text of each token, and the result itself."""
    tokenizer = opened.tokenizer
    trace = {
        "prompt": prompt,
        "prompt_ids": list(request.prompt),
        "settings": dataclasses.asdict(request.config),
        "token_texts": [tokenizer.decode([token]) for token in answer["raw_ids"]],
        **answer,
    }
    write_atomically(path, json.dumps(trace, ensure_ascii=False) + "\n")


def text_request(opened: Opened, prompt: str, trace: bool = False) -> Request:
    """A request for a text prompt with the default settings."""
    raw = {"id": 0, "prompt": prompt, "trace": trace}
    return parse(raw, opened.defaults, opened.tokenizer, opened.model.config.vocab_size)


def print_answers(opened: Opened, requests: Sequence[Request]) -> list[dict[str, Any]]:
    """Prints each answer on stdout and its cost on stderr. All requests share one compilation.

    Returns:
      the results, as `engine.serve` yields them.
    """
    model, params, tokenizer, defaults, _ = opened
    shape = fitting_shape(requests, 1, defaults.ahead)
    console = Console()
    live = console.is_terminal and defaults.method == "refusion"
    start = time.perf_counter()
    warm_up(model, params, tokenizer, requests[0], shape)
    compiled = f"; compiled in {time.perf_counter() - start:.1f} s"
    answers = []
    for request in requests:
        start = time.perf_counter()
        with live_view(console, tokenizer, request) if live else contextlib.nullcontext() as watch:
            (answer,) = serve(model, params, tokenizer, [request], shape, defaults.stop, watch)
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
