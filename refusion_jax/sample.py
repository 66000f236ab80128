"""Decodes prompts from the command line, a file of requests, or a terminal.

python -m refusion_jax.sample --checkpoint=DIR --prompt="..."
python -m refusion_jax.sample --checkpoint=DIR --input=requests.jsonl --output=results.jsonl
python -m refusion_jax.sample --checkpoint=DIR
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

from refusion_jax import hf, serving, sharding, terminal
from refusion_jax.baselines import ar, mdm
from refusion_jax.config import Parser
from refusion_jax.errors import BadInput, command
from refusion_jax.loader import decoding_scope, load
from refusion_jax.model import Transformer
from refusion_jax.requests import MOST_BLOCK_TOKENS, SEMANTICS
from refusion_jax.serving import METHODS, Defaults, Request
from refusion_jax.tokenizer import MASK_MISSING, Tokenizer

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


def add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model decodes and how; shared by the commands that decode."""
    add = parser.add_argument
    add(
        "--checkpoint", metavar="DIR", required=True, help="model folder: Hugging Face's, or written by train"
    )
    add("--method", choices=tuple(METHODS), help="decoder (default: what the checkpoint was trained for)")
    add_setting_flags(parser)
    add(
        "--semantics",
        choices=SEMANTICS,
        help="of refusion; release: the authors' code to the letter, its slips included (default fixed)",
    )
    add(
        "--first_token",
        choices=ar.FIRST_TOKENS,
        help="where --method=ar reads the first token: off the last prompt token, or off a mask "
        "(default: as the checkpoint's objective trained it)",
    )
    add(
        "--batch_size",
        type=int,
        metavar="N",
        default=8,
        help="requests decoded together (default %(default)s)",
    )
    add(
        "--tensor",
        type=int,
        metavar="N",
        default=1,
        help="devices that share each matrix product (default %(default)s)",
    )
    add(
        "--dtype",
        choices=tuple(DTYPES),
        help="of weights and computation (default bfloat16, on a CPU float32)",
    )
    add(
        "--int8",
        action="store_true",
        help="int8 weights, a scale for each output channel, for decoding alone",
    )
    add("--raw", action="store_true", help="feed a text prompt as it is, without the chat template")
    add(
        "--enable_thinking",
        choices=("true", "false"),
        help="told to the chat template (default: not told, and Qwen3's has the model think)",
    )
    add("--stop", metavar="TEXT", action="append", default=[], help="end the text before TEXT; repeatable")


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of what methods can be told, and --ahead; what is not given is None, the method's default."""

    def add(setting: str, help: str, **how: Any) -> None:
        parser.add_argument(f"--{setting}", help=f"{help} {_default(setting)}", **how)

    whole: dict[str, Any] = {"type": int, "metavar": "N"}
    number: dict[str, Any] = {"type": float, "metavar": "X"}
    add("gen_length", "most response tokens", **whole)
    add("slot_size", "refusion: tokens of a slot", **whole)
    add(
        "num_blocks",
        "refusion, mdm: blocks decoded left to right; gen_length is a multiple of num_blocks, for refusion "
        "of num_blocks x slot_size",
        **whole,
    )
    add(
        "block_len",
        "bd3: tokens of a block; gen_length is a multiple; where the checkpoint says nothing",
        **whole,
    )
    add(
        "slot_threshold",
        "refusion: probability above which a slot is chosen; below 0 always, from 1 never",
        **number,
    )
    add("token_threshold", "probability above which a drafted token is accepted; likewise", **number)
    add("tokens_per_step", "mdm, bd3: tokens that a pass commits however unsure it is of them", **whole)
    add("cache", "mdm: keys and values that are kept while a block is filled", choices=mdm.CACHES)
    add("temperature", "of the drafts, 0 is greedy", **number)
    add("seed", "of the drafts when temperature is above 0", **whole)
    parser.add_argument(
        "--ahead",
        **whole,
        help="refusion: tokens up to which passes of a request are filled with predictions ahead of need; 0 "
        "feeds one phase a pass, as the authors do (default: what costs the device next to nothing)",
    )


def _default(setting: str) -> str:
    """The default of a setting, as --help shows it; that of each method where they differ."""
    by_method = {
        name: method.settings[setting] for name, method in METHODS.items() if setting in method.settings
    }
    values = set(by_method.values())
    return f"(default {values.pop() if len(values) == 1 else by_method})"


class Opened(NamedTuple):
    """A model ready to serve requests, in `scope`."""

    model: Transformer
    params: Any
    tokenizer: Tokenizer
    defaults: Defaults
    mesh: jax.sharding.Mesh | None

    def scope(self) -> contextlib.AbstractContextManager:
        """Within it decoding takes the devices that hold the parameters."""
        return decoding_scope(self.model, self.mesh)


def open_model(flags: argparse.Namespace) -> Opened:
    """The model and default settings that the decoding flags name."""
    if flags.batch_size < 1:
        raise BadInput(f"--batch_size must be at least 1 request, found {flags.batch_size}")
    if flags.ahead is not None and not 0 <= flags.ahead <= MOST_BLOCK_TOKENS:
        raise BadInput(f"--ahead must be 0 to {MOST_BLOCK_TOKENS} tokens, found {flags.ahead}")
    use_compilation_cache()
    on_cpu = jax.default_backend() == "cpu"
    dtype = DTYPES[flags.dtype or ("float32" if on_cpu else "bfloat16")]
    mesh = None if flags.tensor == 1 else sharding.tensor_mesh(flags.tensor)
    model, params, tokenizer = load(flags.checkpoint, mesh, dtype, flags.int8)
    method = asked_method(flags)
    settings = asked_settings(flags, method)
    if method != "ar" and tokenizer.mask_id is None:
        raise BadInput(f"{flags.checkpoint}: {MASK_MISSING}")
    template = {} if flags.enable_thinking is None else {"enable_thinking": flags.enable_thinking == "true"}
    defaults = Defaults(method, settings, flags.raw, template, tuple(flags.stop), flags.ahead)
    return Opened(model, params, tokenizer, defaults, mesh)


def asked_method(flags: argparse.Namespace) -> str:
    """How to decode: --method, or what the checkpoint was trained for.

    Raises:
      BadInput: the checkpoint was trained for something else, or cannot be read.
    """
    method = flags.method or hf.objective(flags.checkpoint)
    if method not in METHODS:
        where = f"{flags.checkpoint}/config.json: objective"
        raise BadInput(f"{where} must be one of {', '.join(METHODS)}, found {method!r}")
    return method


def asked_settings(flags: argparse.Namespace, method: str) -> dict[str, Any]:
    """What the method is told: the flags given, in place of the defaults of checkpoint and method.

    Raises:
      BadInput: a flag is given that the method does not know.
    """
    known, given = METHODS[method].settings, given_settings(flags)
    for name in given:
        if name not in known:
            having = [other for other in METHODS if name in METHODS[other].settings]
            raise BadInput(f"--{name} is for --method={' or '.join(having)} alone, found --method={method}")
    trained = {}
    if method == "ar":
        trained["first_token"] = hf.first_token(flags.checkpoint)
    if method == "bd3" and (block_len := hf.block_len(flags.checkpoint)) is not None:
        trained["block_len"] = block_len
    return known | trained | given


def given_settings(flags: argparse.Namespace) -> dict[str, Any]:
    """The settings that flags were given for."""
    found = {name: value for name, value in vars(flags).items() if name in serving.SETTINGS}
    return {name: value for name, value in found.items() if value is not None}


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or ~/.cache/refusion_jax."""
    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "refusion_jax"))


def from_file(flags: argparse.Namespace) -> int:
    """Serves every request of --input; 2 if some could not be served."""
    check_output("--output", flags.output)
    lines = read_lines(Path(flags.input))
    opened = open_model(flags)
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
    opened = open_model(flags)
    requests = [text_request(opened, prompt, trace=bool(flags.trace)) for prompt in prompts]
    with opened.scope():
        answers = print_answers(opened, requests)
    if flags.trace:
        write_trace(Path(flags.trace), opened, requests[0], prompts[0], answers[0])
    return 0


def converse(flags: argparse.Namespace) -> int:
    """Answers lines typed on a terminal until it is closed."""
    opened = open_model(flags)
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


def write_trace(path: Path, opened: Opened, request: Request, prompt: str, answer: dict[str, Any]) -> None:
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


def text_request(opened: Opened, prompt: str, trace: bool = False) -> Request:
    raw = {"id": 0, "prompt": prompt, "trace": trace}
    return serving.parse(raw, opened.defaults, opened.tokenizer, opened.model.config.vocab_size)


def print_answers(opened: Opened, requests: Sequence[Request]) -> list[dict[str, Any]]:
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
    add_decoding_flags(parser)
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="a prompt; repeatable")
    parser.add_argument("--input", metavar="FILE", help="requests, one JSON object a line")
    parser.add_argument("--output", metavar="FILE", help="results, one JSON object a line (default stdout)")
    parser.add_argument(
        "--trace", metavar="FILE", help="write how the answer to the one --prompt came about, JSON"
    )
    flags = parser.parse_args(arguments)
    if flags.trace and (len(flags.prompt) != 1 or asked_method(flags) != "refusion"):
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
