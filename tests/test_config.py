"""Configuration files, overrides and their mistakes."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import yaml

from refusion_jax import config
from refusion_jax.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Scaling:
    factor: float


@dataclasses.dataclass(frozen=True)
class Model:
    """Attributes:
    width: of a layer,
      in channels.
    name: what it is called.
    """

    width: int
    name: str = "one"
    rate: float = 0.5
    bias: bool = False
    limit: int | None = None
    sizes: tuple[int, ...] = (4, 8)
    names: tuple[str, ...] = ("one",)
    tasks: Mapping[str, Mapping] | Sequence[str] | str = ()
    scaling: Scaling | Mapping[str, Any] | None = None
    path: str = ""

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")


@dataclasses.dataclass(frozen=True)
class Run:
    """Attributes:
    kind: of run.
    """

    model: Model
    other: Model
    kind: str = "long"


FILE = """
from ml_collections import ConfigDict

def get_config():
    c = ConfigDict()
    c.model = ConfigDict({"width": 16})
    c.other = ConfigDict({"width": 2, "rate": 1, "sizes": [1, 2], "tasks": {"copy": {"length": 3}}})
    c.other.limit = c.model.get_ref("width")
    return c
"""


@pytest.fixture
def load(tmp_path):
    def load(*overrides, text=FILE):
        path = tmp_path / "config.py"
        path.write_text(text)
        return config.load(path, overrides, Run)

    return load


def test_file_and_defaults(load):
    run = load()
    assert run.model == Model(16)
    assert run.other == Model(2, rate=1.0, sizes=(1, 2), limit=16, tasks={"copy": {"length": 3}})
    assert type(run.other.rate) is float


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("32", "width", 32),
        ("two", "name", "two"),
        ("7", "name", "7"),
        ("", "name", ""),
        ("a=b", "name", "a=b"),
        ("3", "rate", 3.0),
        ("1e-3", "rate", 1e-3),
        ("True", "bias", True),
        ("true", "bias", True),
        ("5", "limit", 5),
        ("None", "limit", None),
        ("(1, 2, 3)", "sizes", (1, 2, 3)),
        ("[9]", "sizes", (9,)),
        ("one,two", "names", ("one", "two")),
        ("('one',)", "names", ("one",)),
        ("one", "names", ("one",)),
        ("copy", "tasks", "copy"),
        ("copy,sort", "tasks", "copy,sort"),
        ("{'factor': 2}", "scaling", {"factor": 2}),
        ("('copy', 'sort')", "tasks", ("copy", "sort")),
        ("{'copy': {'length': 2}}", "tasks", {"copy": {"length": 2}}),
    ],
)
def test_override(load, text, field, value):
    found = getattr(load(f"--config.model.{field}={text}").model, field)
    assert found == value
    assert type(found) is type(value)


def test_references_follow_overrides(load):
    assert load("--config.model.width=32").other.limit == 32


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.no_such=1", "--config.no_such: no such field"),
        ("--config.model.no_such=1", "--config.model.no_such: no such field"),
        ("--config.model.widht=1", "did you mean --config.model.width?"),
        ("--config.model=1", "--config.model: no such field"),
        ("--config.model.width.x=1", "--config.model.width.x: no such field"),
        ("--config.model.width=wide", "--config.model.width: must be int, found 'wide'"),
        ("--config.model.width=1.5", "--config.model.width: must be int, found '1.5'"),
        ("--config.model.width=True", "--config.model.width: must be int, found 'True'"),
        ("--config.model.rate=fast", "--config.model.rate: must be float"),
        ("--config.model.bias=1", "--config.model.bias: must be bool"),
        ("--config.model.limit=x", "--config.model.limit: must be int | None"),
        ("--config.model.sizes=3", "--config.model.sizes: must be tuple"),
        ("--config.model.sizes=(1, 'a')", "--config.model.sizes: must be tuple"),
        ("--config.model.tasks=3.5{", None),  # any text may name a task
        ("--config.model.width=0", "model.width must be at least 1, got 0"),
        ("--config.model.width", "--config.model.width: no such flag"),
        ("--width=3", "--width=3: no such flag"),
    ],
)
def test_override_that_cannot_be(load, override, message):
    if message is None:
        load(override)
        return
    with pytest.raises(BadInput) as error:
        load(override)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "no function get_config()"),
        ("def get_config():\n    return (\n", "config.py:2: '(' was never closed"),
        ("def get_config():\n    return nothing\n", "config.py:2: NameError"),
        ("import no_such_module\n", "config.py:1: ModuleNotFoundError"),
        ("def get_config(): return {}", "must return a ConfigDict, found dict"),
        (FILE.replace('"width": 2, ', ""), "other.width: is missing"),
        (FILE.replace('"width": 16', '"width": "wide"'), "model.width: must be int, found 'wide'"),
        (FILE.replace('"width": 16', '"width": 16, "name": None'), "model.name: must be str, found None"),
        (FILE.replace('"width": 16', '"width": 16, "depth": 2'), "model.depth: no such field"),
        (FILE.replace("c.model", "c.modal"), "unknown section modal, did you mean model?"),
        (FILE.replace("return c", "return ConfigDict({'model': 3})"), "section model must be a ConfigDict"),
    ],
)
def test_file_that_cannot_be_used(load, text, message):
    with pytest.raises(BadInput) as error:
        load(text=text)
    assert message in str(error.value)
    assert "config.py" in str(error.value)


def test_a_field_outside_sections(load):
    assert load().kind == "long"
    text = FILE.replace("return c", "c.kind = 'short'\n    return c")
    assert load(text=text).kind == "short"
    assert load("--config.kind=none", text=text).kind == "none"
    with pytest.raises(BadInput, match=r"config\.py: kind: must be str, found 3"):
        load(text=text.replace("'short'", "3"))
    with pytest.raises(BadInput, match=r"--config.kid: no such field, did you mean --config.kind\?"):
        load("--config.kid=none")


@pytest.mark.parametrize("name", ["none.py", "none.yaml"])
def test_no_file(tmp_path, name):
    with pytest.raises(BadInput, match=rf"^--config=.*{name}: no such file"):
        config.load(tmp_path / name, [], Run)


@pytest.mark.parametrize("name", ["config.yaml", "config.yml"])
def test_yaml_gives_the_same_run(load, tmp_path, name):
    run = load()
    path = tmp_path / name
    path.write_text(yaml.safe_dump(config.as_dict(run)))
    assert config.load(path, [], Run) == run
    changed = config.load(path, ["--config.model.width=32", "--config.kind=short"], Run)
    assert changed == dataclasses.replace(run, model=Model(32), kind="short")
    path.write_text("model: {width: 16}\nother: {width: 2}\n")
    assert config.load(path, [], Run) == Run(Model(16), Model(2))


YAML = "model: {width: 16}\nother:\n  width: 2\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.yaml: must hold a mapping of sections, found NoneType"),
        ("- 1\n", "config.yaml: must hold a mapping of sections, found list"),
        ("model: {width: 16\nother", "config.yaml:2: not readable as YAML"),
        ("model: !!python/object:os.system {}\n", "config.yaml:1: not readable as YAML"),
        ("1: 2\n", "config.yaml: 1 cannot be the name of a section or field"),
        ("\udcff", "config.yaml: cannot be read as UTF-8 text"),
        (YAML + "  tasks: {a.b: {}}\n", "config.yaml: 'a.b' cannot be the name of a section or field"),
        (YAML.replace("width: 2", "wide: 2"), "config.yaml: other.wide: no such field"),
        (YAML.replace("width: 2", "rate: 2"), "config.yaml: other.width: is missing"),
        (YAML.replace("16", "wide"), "config.yaml: model.width: must be int, found 'wide'"),
        (YAML.replace("16", "0"), "config.yaml: model.width must be at least 1, got 0"),
        (YAML.replace("model", "modal"), "config.yaml: unknown section modal, did you mean model?"),
        (YAML.replace("{width: 16}", "3"), "config.yaml: section model must be a mapping, found 3"),
        (YAML.replace("{width: 16}", ""), "config.yaml: section model must be a mapping, found None"),
    ],
)
def test_yaml_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadInput) as error:
        config.load(path, [], Run)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_as_dict_reads_back(load):
    run = load()
    assert config.build(Run, config.as_dict(run), "here") == run
    assert config.as_dict(run)["other"]["sizes"] == [1, 2]


def test_help_names_every_field_with_its_meaning_and_default():
    text = config.help_text(Run)
    assert "--config.model.width=INT  of a layer, in channels (required)" in text
    assert "--config.other.rate=FLOAT   (default 0.5)" in text
    assert "--config.kind=TEXT  of run (default long)" in text
    for line in (
        "bias=true|false   (default false)",
        "limit=INT|None   (default None)",
        "sizes=LIST of INT   (default 4,8)",
        "names=LIST of TEXT   (default one,)",
        "tasks=MAPPING|LIST of TEXT|TEXT   (default ())",
        "scaling=MAPPING|None   (default None)",
        'path=TEXT   (default "")',
    ):
        assert f"--config.model.{line}\n" in text
    assert text.count("\n") == 2 + 2 * len(dataclasses.fields(Model))


def test_a_default_can_be_given_as_help_writes_it(load):
    shown = re.findall(r"--config\.(model\.\w+)=.*\(default (.*)\)$", config.help_text(Run), re.M)
    assert len(shown) == len(dataclasses.fields(Model)) - 1
    for field, default in shown:
        run = load(f"--config.{field}={default.strip(chr(34))}")
        name = field.removeprefix("model.")
        assert getattr(run.model, name) == getattr(Model(1), name), name
