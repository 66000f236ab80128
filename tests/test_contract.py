"""docs/reference.md against the commands: each flag and field of its tables exists, and none is left out."""

import argparse
import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from refusion_jax import config
from refusion_jax.__main__ import COMMANDS
from refusion_jax.errors import BadInput
from refusion_jax.serving.methods import METHODS, SETTINGS, default_settings
from refusion_jax.serving.requests import PROMPTS
from refusion_jax.serving.score import Score
from refusion_jax.training.metrics import COLUMNS
from refusion_jax.training.run import RunConfig

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "reference.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text under a heading, up to the next of any level."""
    return re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)[1]


def table(title: str) -> dict[str, list[str]]:
    """First cell, without its backticks -> the other cells of its row."""
    rows = [line.strip("|").split(" | ") for line in section(title).splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in row] for row in rows]
    return {first.strip("`"): rest for first, *rest in cells}


class Caught(Exception):
    """Carries the parser of a command."""


@pytest.fixture
def parser_of(monkeypatch):
    def catch(self, *_, **__):
        raise Caught(self)

    def found(name: str) -> argparse.ArgumentParser:
        monkeypatch.setattr(config.Parser, "parse_args", catch)
        monkeypatch.setattr(config.Parser, "parse_known_args", catch)
        with pytest.raises(Caught) as caught:
            importlib.import_module(f"refusion_jax.{name}").main([])
        monkeypatch.undo()
        return caught.value.args[0]

    return found


def flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The flags, and positional arguments by their metavar; --help and --version belong to all commands."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) or action.dest in ("help", "version"):
            continue
        names = [name for name in action.option_strings if name.startswith("--")]
        found[names[0] if names else str(action.metavar)] = action
    return found


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(groups[0].choices) if groups else {}


def test_every_command_is_there(parser_of):
    assert set(table("Commands")) == {f"python -m refusion_jax.{name}" for name in COMMANDS}
    assert re.search("`--help`.*`--version`", section("Commands"))


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_of_a_command(parser_of, name):
    parser = parser_of(name)
    for title, part in {
        name: parser,
        **{f"{name} {sub}": p for sub, p in subcommands(parser).items()},
    }.items():
        if subcommands(part):
            continue
        real, told = flags(part), table(title)
        assert set(told) == set(real)
        for flag, (value, default, meaning) in told.items():
            action = real[flag]
            assert meaning, flag
            if action.nargs == 0:
                assert value == "", flag
            elif action.choices:
                assert value == ", ".join(f"`{choice}`" for choice in action.choices), flag
            if action.required:
                assert default == "required", flag
            elif action.default not in (None, False, []) and flag != "--checkpoint":
                assert default.strip("`") == str(action.default), flag
            setting = flag.removeprefix("--")
            # The defaults of these are the checkpoint's.
            if action.default is None and setting in SETTINGS - {"verify", "first_token", "border"}:
                settings = [default_settings(method).get(setting) for method in METHODS]
                assert all(str(value) in default for value in settings if value not in (None, False)), flag


def test_request_fields():
    assert set(table("Requests")) == {"id", "trace", *PROMPTS, *SETTINGS}


def test_result_fields(served):
    there = {field for result in served.results for field in result}
    assert set(table("Results")) == there


def test_trace_fields(served):
    entries = [entry for result in served.results for entry in result.get("trace", [])]
    assert set(table("Traces")) == {field for entry in entries for field in entry}


def test_figures_of_an_evaluation():
    assert set(table("results.json")) >= {field.name for field in dataclasses.fields(Score)} - {"answers"}


def test_columns_of_the_metrics():
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    rows = [
        line for line in page.split("| column |")[1].split("\n\n")[0].splitlines() if line.startswith("| `")
    ]
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])] == list(COLUMNS)


def test_configuration_fields():
    """The table has a row for each field of a run, with its type as --help names it and its default."""
    told = table("Configuration")
    entries = re.findall(
        rf"^  {re.escape(config.PREFIX)}(\S+?)=(.*?)  ", config.help_text(RunConfig), flags=re.MULTILINE
    )
    assert list(told) == [name for name, _ in entries]
    for name, type_name in entries:
        assert told[name][0] == type_name.replace("|", " or "), name


def test_exit_codes():
    assert set(table("Exit codes")) == {"0", "1", "2", "3", "4", "130", "143"}
    assert issubclass(BadInput, ValueError)
