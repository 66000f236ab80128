"""Shared by the tests of the sample command: how to call it, a checkpoint, and requests."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from refusion_jax import sample

ROOT = Path(__file__).parent.parent
ORACLE = ROOT / "tests" / "data" / "oracle" / "tiny_a"
WEIGHTS = "model.safetensors"
# The flags of a test that does not choose its own.
FLAGS = [
    "--gen_length=32",
    "--slot_size=4",
    "--slot_threshold=0.6",
    "--token_threshold=0.1",
    "--batch_size=4",
]
OF_OTHERS = ["--gen_length=32", "--batch_size=4"]  # those of FLAGS that all methods have
DEFAULTS = {"gen_length": 32, "slot_size": 4, "slot_threshold": 0.6, "token_threshold": 0.1}
FIELDS = {
    "id",
    "text",
    "ids",
    "raw_ids",
    "finish_reason",
    "num_tokens",
    "num_forwards",
    "tokens_per_forward",
    "num_iterations",
}


class Ran(NamedTuple):
    """The exit code of a command, its stdout and its stderr."""

    code: int
    out: str
    err: str


def command(*arguments: str) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = sample.main([str(argument) for argument in arguments])
    return Ran(code, out.getvalue(), err.getvalue())


def assert_refused(ran: Ran, message: str) -> None:
    """Asserts exit code 2 and one error line, without a traceback."""
    assert ran.code == 2, ran
    (line,) = ran.err.splitlines()
    assert line.startswith("error: ") and re.search(message, line), line


def copied(folder: Path) -> Path:
    """A copy of the checkpoint in `folder`, without the recordings and with a chat template."""
    folder.mkdir()
    for name in ("config.json", WEIGHTS, "tokenizer.json"):
        (folder / name).write_bytes((ORACLE / name).read_bytes())
    # The format of this model's training prompts: <bos>26+0+10=
    template = (
        "{% for m in messages %}<bos>{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def change_config(folder: Path, **fields: Any) -> None:
    """Sets fields of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def lines(path_or_text: Path | str) -> list[dict[str, Any]]:
    text = path_or_text if isinstance(path_or_text, str) else path_or_text.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


SUM = [1, 6, 10, 40, 4, 40, 5, 4, 41]  # <bos>26+0+10=


def recordings() -> dict[str, dict[str, Any]]:
    """Recorded decodes of the authors' code that are as short as the requests here, by request id."""
    cases = json.loads((ORACLE / "decode.json").read_text())["cases"]
    short = [c for c in cases if c["params"]["gen_length"] == 32 and len(c["prompt"]) <= 24]
    assert len(short) >= 5
    return {f"recorded-{i}": case for i, case in enumerate(short)}


def recorded_request(name: str, case: dict[str, Any]) -> dict[str, Any]:
    settings = dict(case["params"])
    settings["num_blocks"] = settings.pop("serial_num_blocks")
    return {"id": name, "prompt_ids": case["prompt"], "semantics": "release", "trace": True} | settings


GOOD = [
    {"id": "templated", "prompt": "26+0+10"},
    {"id": "messages", "messages": [{"role": "user", "content": "26+0+10"}]},
    {"id": "ids", "prompt_ids": SUM},
    {"id": 7, "prompt_ids": SUM, "gen_length": 16, "slot_size": 2, "num_blocks": 2},
    {"id": "always", "prompt_ids": SUM, "slot_threshold": -1, "token_threshold": -1},
    {"id": "never", "prompt_ids": SUM, "slot_threshold": 1, "token_threshold": 2.5, "trace": True},
    {
        "id": "hot",
        "prompt_ids": SUM,
        "temperature": 2.0,
        "seed": 3,
        "slot_threshold": -1,
        "token_threshold": -1,
    },
    {
        "id": "hotter",
        "prompt_ids": SUM,
        "temperature": 2.0,
        "seed": 4,
        "slot_threshold": -1,
        "token_threshold": -1,
    },
    {"id": "quiet", "prompt": "26+0+10", "trace": False},
    {"id": "empty", "prompt_ids": [], "slot_threshold": -1},
    *(recorded_request(*item) for item in recordings().items()),
]
# (line of the input, pattern of its error)
BAD = [
    ('{"id": "x", "prompt": ', "not JSON"),
    ("[1, 2]", "must be a JSON object, found list"),
    ("17", "must be a JSON object, found int"),
    ('{"prompt": "1+1"}', "id must be text or a whole number, found None"),
    ('{"id": true, "prompt": "1+1"}', "id must be text or a whole number, found True"),
    (
        '{"id": "x", "prompt": "1+1", "gen_length": 32768, "slot_size": 32768}',
        "gen_length / num_blocks must be at most 4096 tokens, found 32768",
    ),
    ('{"id": "x"}', "exactly one of prompt, messages, prompt_ids is needed, found none"),
    ('{"id": "x", "prompt": "1", "prompt_ids": [1]}', "exactly one of .* found \\['prompt', 'prompt_ids'\\]"),
    ('{"id": "x", "prompt": 1}', "prompt must be text, found 1"),
    ('{"id": "x", "prompt": "\\ud800"}', "lone surrogate"),
    ('{"id": "x", "messages": "hello"}', "messages must be a list of messages, found 'hello'"),
    ('{"id": "x", "messages": [{"role": "user"}]}', "messages\\[0\\].content is None, expected text"),
    ('{"id": "x", "prompt_ids": "12"}', "prompt_ids must be a list of token ids, found str"),
    ('{"id": "x", "prompt_ids": [64]}', "whole number from 0 to 63, found 64"),
    ('{"id": "x", "prompt_ids": [-1]}', "found -1"),
    ('{"id": "x", "prompt_ids": [true]}', "found True"),
    ('{"id": "x", "prompt": "1", "gen_len": 8}', "unknown field 'gen_len'"),
    ('{"id": "x", "prompt": "1", "mask_id": 8}', "unknown field 'mask_id'"),
    ('{"id": "x", "prompt": "1", "gen_length": 30}', "gen_length must be a multiple .* found gen_length 30"),
    ('{"id": "x", "prompt": "1", "num_blocks": 5}', "gen_length must be a multiple .* = 20"),
    ('{"id": "x", "prompt": "1", "gen_length": 0}', "gen_length must be a whole number from 1 .* found 0"),
    ('{"id": "x", "prompt": "1", "gen_length": -4}', "found -4"),
    ('{"id": "x", "prompt": "1", "gen_length": 8.0}', "found 8.0"),
    ('{"id": "x", "prompt": "1", "slot_size": "4"}', "slot_size .* found '4'"),
    ('{"id": "x", "prompt": "1", "num_blocks": null}', "num_blocks .* found None"),
    (
        '{"id": "x", "prompt": "1", "slot_threshold": NaN}',
        "slot_threshold must be a finite number, found nan",
    ),
    ('{"id": "x", "prompt": "1", "token_threshold": Infinity}', "token_threshold .* found inf"),
    ('{"id": "x", "prompt": "1", "token_threshold": true}', "token_threshold .* found True"),
    ('{"id": "x", "prompt": "1", "temperature": -0.5}', "temperature must be 0 or above, found -0.5"),
    ('{"id": "x", "prompt": "1", "seed": -1}', "seed .* found -1"),
    ('{"id": "x", "prompt": "1", "semantics": "paper"}', "semantics must be one of .* found 'paper'"),
    ('{"id": "x", "prompt": "1", "trace": "yes"}', "trace must be true or false, found 'yes'"),
]


class Served(NamedTuple):
    """One run of the command over all of GOOD and BAD, interleaved, with blank lines between."""

    ran: Ran
    input: Path
    output: Path
    line_numbers: list[int]
    results: list[dict[str, Any]]


def serve(checkpoint: Path, folder: Path) -> Served:
    """Runs the command over GOOD and BAD, with its files in `folder`."""
    text, line_numbers = "\n", []
    for i in range(max(len(GOOD), len(BAD))):
        for line in [json.dumps(x) for x in GOOD[i : i + 1]] + [line for line, _ in BAD[i : i + 1]]:
            text += line + "\n" * (1 + i % 2)
            line_numbers.append(text[: text.rindex(line)].count("\n") + 1)
    (folder / "requests.jsonl").write_text(text, encoding="utf-8")
    ran = command(
        f"--checkpoint={checkpoint}",
        *FLAGS,
        f"--input={folder / 'requests.jsonl'}",
        f"--output={folder / 'results.jsonl'}",
    )
    return Served(
        ran,
        folder / "requests.jsonl",
        folder / "results.jsonl",
        line_numbers,
        lines(folder / "results.jsonl"),
    )


def of(served: Served, name: str | int) -> dict[str, Any]:
    (result,) = [r for r in served.results if r["id"] == name and "error" not in r]
    return result


def assert_passes_add_up(result) -> None:
    """Asserts bounds on `num_forwards`: at best every refill and every plan but the first is speculative, at
    worst none is."""
    steps = result["trace"]
    least = 1 + sum(1 + step["rounds"] for step in steps)
    assert least <= result["num_forwards"] <= sum(2 + 2 * step["rounds"] for step in steps)
