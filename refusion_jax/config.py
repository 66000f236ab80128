"""Run configurations: a file, `--config.a.b=value` overrides on top, frozen dataclasses as the result.

The file is Python with a function `get_config()` that returns an `ml_collections.ConfigDict`, or the
config.yaml that a run wrote. Its sections become frozen dataclasses, the fields of the run's dataclass, which
may also have plain fields. A field that the file leaves out has the dataclass's default. No other module
handles a ConfigDict.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import re
import runpy
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ml_collections
import yaml

from refusion_jax.buckets import local_copy, location
from refusion_jax.errors import BadInput
from refusion_jax.files import read_text
from refusion_jax.version import __version__

PREFIX = "--config."
# Names of the dtypes that a model computes in, as flags and configurations give them; jnp.dtype takes them.
DTYPES = ("float32", "bfloat16")
FILE_HELP = "Python file with get_config(), or the config.yaml of a run"  # help of --config

Run = TypeVar("Run")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with --version, whose errors are one line, as those of all bad input."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_argument("--version", action="version", version=f"refusion_jax {__version__}")

    def error(self, message: str) -> typing.NoReturn:
        raise BadInput(f"{message}; see --help")


def whole_number(text: str) -> int:
    """Argparse `type` of a flag: a positive integer."""
    if not text.isdecimal() or not text.strip("0"):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, found {text!r}")
    return int(text)


def whole_numbers(text: str) -> list[int]:
    """Argparse `type` of a flag: one or more positive integers, separated by commas."""
    return [whole_number(part) for part in text.split(",")]


def load(path: str | Path, overrides: Sequence[str], run_class: type[Run]) -> Run:
    """The run described by a configuration file and overrides.

    Args:
      path: a Python file with `get_config()`, or a .yaml or .yml file as a run writes it.
      overrides: `--config.section.field=value`, or `--config.field=value` for a field outside sections. A
        value is a Python literal of the field's type; text needs no quotes, and items of a list no brackets.
      run_class: a dataclass; its fields that are dataclasses are the sections.

    Raises:
      BadInput: the file cannot be used; a section, field or value is unknown, missing or of a wrong type.
    """
    path = location(path)
    if not path.is_file():
        raise BadInput(f"--config={path}: no such file")
    is_yaml = path.suffix in (".yaml", ".yml")
    config = _read_yaml(path) if is_yaml else _read_python(path)
    with config.unlocked():
        for name, section_class in _sections(run_class).items():
            section = config[name] = config.get(name, ml_collections.ConfigDict())
            if not isinstance(section, ml_collections.ConfigDict):
                kind = "mapping" if is_yaml else "ConfigDict"
                raise BadInput(f"{path}: section {name} must be a {kind}, found {section!r}")
            _fill_up(section, section_class)
        _fill_up(config, run_class)
    for override in overrides:
        _override(config, override, run_class)
    return build(run_class, config.to_dict(), str(path))


def build(run_class: type[Run], values: Mapping[str, Any], source: str) -> Run:
    """The run from nested mappings; lists become tuples.

    Args:
      run_class: as in `load`.
      values: section -> field -> value, and field -> value for fields outside sections.
      source: name of the file, for messages.

    Raises:
      BadInput: a section or field is unknown, missing or of a wrong type.
    """
    known = typing.get_type_hints(run_class)
    for name in values:
        if name not in known:
            raise BadInput(f"{source}: unknown section {name}{_did_you_mean(name, known)}")
    built = {
        name: _build(section_class, values.get(name) or {}, f"{source}: {name}.")
        for name, section_class in _sections(run_class).items()
    }
    return _build(run_class, {**values, **built}, f"{source}: ")


def as_dict(run: Any) -> dict[str, Any]:
    """The run as nested dicts and lists, the content of config.yaml."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    return plain(dataclasses.asdict(run))


def help_text(run_class: type) -> str:
    """Help on the fields that overrides can set: one line for each with its type, meaning and default."""
    lines = [
        "fields of the configuration; a value given here replaces the file's, and that replaces the default",
        """(write a LIST as 1,2,3 and a MAPPING as "{'name': value}"):""",
    ]
    sections = _sections(run_class)
    for prefix, owner in [("", run_class), *((f"{name}.", found) for name, found in sections.items())]:
        about, hints = _field_docs(owner), typing.get_type_hints(owner)
        for field in dataclasses.fields(owner):
            if owner is run_class and field.name in sections:
                continue
            default = _default(field)
            note = "required" if default is dataclasses.MISSING else f"default {_as_written(default)}"
            text = about.get(field.name, "").removesuffix(".")
            lines.append(f"  {PREFIX}{prefix}{field.name}={_placeholder(hints[field.name])}  {text} ({note})")
    return "\n".join(lines)


def _sections(run_class: type) -> dict[str, type]:
    """Name -> dataclass of the fields of a run that are sections."""
    hints = typing.get_type_hints(run_class)
    return {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}


def _fill_up(values: ml_collections.ConfigDict, owner: type) -> None:
    """Sets the fields of a dataclass that the file leaves out to their defaults."""
    for field in dataclasses.fields(owner):
        if field.name not in values and (default := _default(field)) is not dataclasses.MISSING:
            values[field.name] = default


def _read_yaml(path: Path) -> ml_collections.ConfigDict:
    try:
        values = yaml.safe_load(read_text(path))
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise BadInput(f"{path}{line}: not readable as YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{path}: not readable as YAML ({error})") from None
    if not isinstance(values, dict):
        raise BadInput(f"{path}: must hold a mapping of sections, found {type(values).__name__}")
    for key in _keys(values):
        if not isinstance(key, str) or "." in key:  # ConfigDict takes no others
            raise BadInput(f"{path}: {key!r} cannot be the name of a section or field")
    return ml_collections.ConfigDict(values)


def _keys(values: Any) -> Iterator[Any]:
    """The keys of nested mappings."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield key
            yield from _keys(value)


def _read_python(path: Path) -> ml_collections.ConfigDict:
    with local_copy(path) as local:
        try:
            return _run_python(local)
        except BadInput as error:
            raise BadInput(str(error).replace(str(local), str(path))) from None


def _run_python(path: Path) -> ml_collections.ConfigDict:
    """What get_config() of a Python file returns."""
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if not isinstance(get_config, Callable):
            raise BadInput(f"{path}: has no function get_config()")
        config = get_config()
    except BadInput:
        raise
    except SyntaxError as error:
        raise BadInput(f"{error.filename}:{error.lineno}: {error.msg}") from None
    except Exception as error:  # whatever the user's own code raises
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        place = f"{path}:{lines[-1]}" if lines else str(path)
        raise BadInput(f"{place}: {type(error).__name__}: {error}") from None
    if not isinstance(config, ml_collections.ConfigDict):
        raise BadInput(f"{path}: get_config() must return a ConfigDict, found {type(config).__name__}")
    return config


def _override(config: ml_collections.ConfigDict, argument: str, run_class: type) -> None:
    """Sets the field that `argument` names: `--config.section.field=value` or `--config.field=value`."""
    key, equals, text = argument.removeprefix(PREFIX).partition("=")
    flag = f"{PREFIX}{key}"
    if not argument.startswith(PREFIX) or not equals:
        raise BadInput(
            f"{argument}: no such flag; a field of the configuration is {PREFIX}section.field=value"
        )
    sections, hints = _sections(run_class), typing.get_type_hints(run_class)
    fields = {name: hint for name, hint in hints.items() if name not in sections} | {
        f"{name}.{field}": hint
        for name, section_class in sections.items()
        for field, hint in typing.get_type_hints(section_class).items()
    }
    if key not in fields:
        raise BadInput(f"{flag}: no such field{_did_you_mean(key, fields, PREFIX)}")
    name, _, field = key.rpartition(".")
    owner = config[name] if name else config
    with owner.unlocked(), owner.ignore_type():
        owner[field] = _parse(text, fields[key], flag)


def _parse(text: str, hint: Any, flag: str) -> Any:
    """`text` as a value of type `hint`."""
    if hint is str:
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    for candidate in (value, text, text.removesuffix(",").split(",")):
        if _fits(candidate, hint):
            return candidate
    raise BadInput(f"{flag}: must be {_type_name(hint)}, found {text!r}")


def _build(owner: type, values: Mapping[str, Any], place: str) -> Any:
    """The dataclass `owner` with the given values; messages put `place` before a field's name."""
    hints = typing.get_type_hints(owner)
    for field, value in values.items():
        if field not in hints:
            raise BadInput(f"{place}{field}: no such field{_did_you_mean(field, hints)}")
        if not _fits(value, hints[field]):
            raise BadInput(f"{place}{field}: must be {_type_name(hints[field])}, found {value!r}")
    for field in dataclasses.fields(owner):
        if field.name not in values and _default(field) is dataclasses.MISSING:
            raise BadInput(f"{place}{field.name}: is missing")
    values = {field: _cast(value, hints[field]) for field, value in values.items()}
    try:
        return owner(**values)
    except BadInput:
        raise
    except ValueError as error:
        raise BadInput(f"{place}{error}") from None


def _default(field: dataclasses.Field) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` may stand where the type is `hint`; an int may stand for a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin in (tuple, Sequence):
        return isinstance(value, tuple | list) and all(_fits(item, arguments[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping)
    if hint is float:
        return type(value) in (int, float)
    return hint is Any or type(value) is (type(None) if hint in (None, type(None)) else origin or hint)


def _cast(value: Any, hint: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return float(value) if hint is float else value


def _type_name(hint: Any) -> str:
    """The type in error messages, as Python code without the names of modules."""
    plain = isinstance(hint, type) and not typing.get_args(hint)
    return hint.__name__ if plain else re.sub(r"\b[a-z_.]+\.(?=\w)", "", str(hint))


def _placeholder(hint: Any) -> str:
    """The type in help, as users of the command line know it: INT, LIST of TEXT, MAPPING|None."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return "|".join(dict.fromkeys(map(_placeholder, arguments)))
    if origin in (tuple, Sequence):
        return f"LIST of {_placeholder(arguments[0])}"
    if origin is Mapping or dataclasses.is_dataclass(hint):
        return "MAPPING"
    return {int: "INT", float: "FLOAT", str: "TEXT", bool: "true|false", types.NoneType: "None"}[hint]


def _as_written(value: Any) -> str:
    """A default as an override would give it."""
    if isinstance(value, tuple | list):
        items = ",".join(map(_as_written, value))
        return f"{items}," if len(value) == 1 else items or "()"
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'


def _did_you_mean(name: str, known: Sequence[str] | Mapping[str, Any], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {prefix}{close[0]}?" if close else ""


def _field_docs(section_class: type) -> dict[str, str]:
    """Field -> its text in the class's docstring: `name: text`, continued on lines indented deeper."""
    names = {field.name for field in dataclasses.fields(section_class)}
    docs: dict[str, str] = {}
    name, depth = "", 0
    for line in (inspect.getdoc(section_class) or "").splitlines():
        entry = re.fullmatch(r"( *)(\w+): (.*)", line)
        if entry and entry[2] in names:
            name, depth = entry[2], len(entry[1])
            docs[name] = entry[3]
        elif name and line.startswith(" " * (depth + 1)):
            docs[name] += " " + line.strip()
        else:
            name = ""
    return docs
