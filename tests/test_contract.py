"""docs/reference.md against the code: commands, flags, fields and exit codes, each compared both ways."""

import argparse
import dataclasses
import functools
import importlib
import json
import re
import typing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from refusion_jax import aot, config, errors, evaluate, sample
from refusion_jax.__main__ import COMMANDS
from refusion_jax.benchmarks import decode as bench_decode
from refusion_jax.benchmarks import train as bench_train
from refusion_jax.checkpoints.orbax_io import PREEMPTED_EXIT_CODE
from refusion_jax.data.sources.example import Example
from refusion_jax.data.tasks.registry import make_task
from refusion_jax.decode.config import DecodeConfig
from refusion_jax.decode.samples import Samples
from refusion_jax.decode.trace import Trace
from refusion_jax.loader import SMALL
from refusion_jax.serving import engine
from refusion_jax.serving.engine import METHODS, PROMPTS, SETTINGS, Request
from refusion_jax.training import metrics
from refusion_jax.training.step import RunConfig

PAGE = (Path(__file__).parents[1] / "docs" / "reference.md").read_text(encoding="utf-8")
Rows = dict[str, list[str]]  # first cell -> the others


def table(text: str) -> Rows:
    """The rows of the tables in a text, their headers left out; the first cell without its backticks."""
    cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in row] for row in cells]
    assert len({row[0] for row in rows}) == len(rows)
    return {first.strip("`"): rest for first, *rest in rows}


@functools.cache
def sections() -> dict[str, str]:
    """Heading -> the text below it, up to the next heading of any level."""
    _, *parts = re.split(r"^##+ (.*)\n", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def documented_flags(command: str) -> Rows:
    """The flags of all sections whose heading names a command."""
    found: Rows = {}
    for heading, text in sections().items():
        if f"`{command}`" in heading:
            rows = table(text)
            assert not found.keys() & rows.keys()
            found |= rows
    return found


class Parsed(Exception):
    """Carries the parser of a command out of its `main`."""


def parser_of(command: str) -> argparse.ArgumentParser:
    def stop(parser, *_):
        raise Parsed(parser)

    name, *subcommand = command.split()
    module = importlib.import_module(f"refusion_jax.{name}")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed) as stopped:
        patch.setattr(config.Parser, "parse_known_args", stop)
        module.main([])
    (parser,) = stopped.value.args
    for choice in subcommand:
        parser = subcommands(parser)[choice]
    return parser


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return found[0].choices if found else {}


def flags_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    actions = {(a.option_strings or [a.metavar])[-1]: a for a in parser._actions}
    assert {"--help", "--version"} <= actions.keys()
    return {name: action for name, action in actions.items() if name not in ("--help", "--version")}


def with_subcommands() -> list[str]:
    """Every command line that takes flags: `bench train` in place of `bench`."""
    found = []
    for name in COMMANDS:
        below = subcommands(parser_of(name))
        found += [f"{name} {choice}" for choice in below] or [name]
    return found


LINES = with_subcommands()


def test_every_command_has_a_section():
    named = {name for heading in sections() for name in re.findall(r"`([^`]+)`", heading)}
    assert named == set(LINES)


@pytest.mark.parametrize("command", LINES)
def test_flags(command):
    assert documented_flags(command).keys() == flags_of(parser_of(command)).keys()


def literal(value) -> str:
    return f"`{value}`"


def setting_default(name: str) -> str:
    """The default of a decoding setting; that of each method where they differ."""
    methods: dict[str, list[str]] = {}
    for method, about in METHODS.items():
        if name in about.settings:
            methods.setdefault(literal(about.settings[name]), []).append(method)
    if len(methods) == 1:
        return next(iter(methods))
    return ", ".join(f"{value} ({', '.join(names)})" for value, names in methods.items())


@pytest.mark.parametrize("command", LINES)
def test_values_and_defaults(command):
    for name, (value, default, _) in documented_flags(command).items():
        action = flags_of(parser_of(command))[name]
        if action.choices:
            assert value == ", ".join(map(literal, action.choices)), name
        assert (value == "switch") == (action.nargs == 0), name
        if action.required:
            assert default == "required", name
        elif action.default == str(SMALL):
            assert default.startswith("*"), name
        elif action.default not in (None, False, []):
            assert default == literal(action.default), name
        elif action.dest in SETTINGS and not default.startswith("*"):
            assert default == setting_default(action.dest), name
        else:
            assert default.startswith("*"), name  # in words


def field_default(field: dataclasses.Field) -> str:
    made = field.default_factory
    default = field.default if made is dataclasses.MISSING else made()
    return "required" if default is dataclasses.MISSING else literal(repr(default))


def test_run_configuration():
    found = {}
    for name, kind in typing.get_type_hints(RunConfig).items():
        if dataclasses.is_dataclass(kind):
            found |= {f"{name}.{field.name}": field_default(field) for field in dataclasses.fields(kind)}
        else:
            found[name] = field_default(RunConfig.__dataclass_fields__[name])
    assert {name: cells[0] for name, cells in table(sections()["Run configuration"]).items()} == found


# Fields


CONFIG = DecodeConfig(mask_id=1, eos_id=2, gen_length=4, slot_size=2)
REQUEST = Request("7", [5, 6], CONFIG, trace=True)


@pytest.fixture(scope="module")
def answer():
    """The result of a request with a trace of one step."""
    number, flag = np.zeros(1, np.int32), np.zeros(1, bool)
    trace = Trace(
        block=number,
        planned=np.ones((1, 2), bool),
        confidence=np.ones((1, 2), np.float32),
        iterative=flag,
        rounds=number,
        accepted=np.ones((1, 4), np.int32),
        committed=np.ones((1, 4), bool),
        forwards=number,
    )
    one = np.int32(1)
    samples = Samples(np.array([7, 0, 0, 0]), one, one, one, one, trace)
    return engine.result(REQUEST, samples, SimpleNamespace(decode=str), stop=())


def test_request_fields():
    assert table(sections()["Requests"]).keys() == {"id", "trace", *PROMPTS} | SETTINGS


def test_result_fields(answer):
    assert table(sections()["Results"]).keys() == answer.keys()


def test_trace_step_fields(answer):
    assert table(sections()["Trace steps"]).keys() == answer["trace"][0].keys()


def test_trace_file_fields(answer, tmp_path):
    path = tmp_path / "trace.json"
    opened = SimpleNamespace(tokenizer=SimpleNamespace(decode=str))
    sample.write_trace(path, opened, REQUEST, "prompt", answer)
    assert json.loads(path.read_text()).keys() - answer.keys() == table(sections()["Trace files"]).keys()


def test_samples_jsonl_fields(answer):
    judged = dict(answer)
    evaluate.judge(make_task("arithmetic", {}), [Example("1 + 1 = ?", "2")], [judged])
    assert judged.keys() - answer.keys() == table(sections()["samples.jsonl"]).keys()


def test_results_json_fields(answer):
    flags = SimpleNamespace(checkpoint="DIR", split="test", limit=1, batch_size=1)
    scored = evaluate.summary([answer | {"correct": True}], 1.0, 1.0, 1)
    opened = SimpleNamespace(
        model=SimpleNamespace(dtype="float32", int8=False),
        defaults=SimpleNamespace(method="refusion", settings={}, ahead=None),
        mesh=None,
    )
    tasks = [make_task(name, {}) for name in ("arithmetic", "countdown")]
    documented = table(sections()["results.json"])
    assert evaluate.results(flags, tasks[:1], [scored], opened).keys() == documented.keys()
    several = evaluate.results(flags, tasks, [scored] * 2, opened)
    by_task = {name for name, cells in documented.items() if cells[0] == "yes"}
    assert [figures.keys() for figures in several["tasks"].values()] == [by_task] * 2
    assert several.keys() == documented.keys() - by_task | {"tasks"}


def test_metrics_columns():
    assert tuple(table(sections()["metrics.csv"])) == metrics.COLUMNS


def test_bench_columns():
    first, second = re.split(
        r"(?=^\| column of `bench decode`)", sections()["bench figures"], flags=re.MULTILINE
    )
    assert list(table(first)) == list(bench_train.COLUMNS)
    assert list(table(second)) == list(bench_decode.COLUMNS)


def test_exit_codes(capsys):
    codes = {0, errors.report(RuntimeError()), errors.report(errors.BadInput("")), aot.DOES_NOT_FIT}
    assert {int(code) for code in table(sections()["Exit codes"])} == codes | {PREEMPTED_EXIT_CODE}
