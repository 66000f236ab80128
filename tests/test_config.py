"""Configuration files, overrides and their mistakes."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml

from refusion_jax import config
from refusion_jax.errors import BadInput
from refusion_jax.training.run import RunConfig

ROOT = Path(__file__).parents[1]


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
    tasks: Mapping[str, Mapping] | Sequence[str] | str = ()

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
        ("copy", "tasks", "copy"),
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
        ("--config.model.limit=x", "--config.model.limit: must be int or None"),
        ("--config.model.sizes=3", "--config.model.sizes: must be list of int"),
        ("--config.model.sizes=(1, 'a')", "--config.model.sizes: must be list of int"),
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


def test_no_file(tmp_path):
    with pytest.raises(BadInput, match=r"none\.py: no such file"):
        config.load(tmp_path / "none.py", [], Run)


def test_as_dict_reads_back(load):
    run = load()
    assert config.build(Run, config.as_dict(run), "here") == run
    assert config.as_dict(run)["other"]["sizes"] == [1, 2]


def test_help_names_every_field_with_its_meaning_and_default():
    text = config.help_text(Run)
    assert "--config.model.width=int  of a layer, in channels (required)" in text
    assert "--config.other.rate=float   (default 0.5)" in text
    assert "--config.kind=str  of run (default 'long')" in text
    assert text.count("\n") == 1 + 2 * len(dataclasses.fields(Model))


def test_the_yaml_of_a_run_is_a_configuration(tmp_path):
    """As `as_dict` writes it, with the same overrides and errors as a Python file."""
    wanted = config.load(str(ROOT / "configs" / "tiny.py"), ["--config.train.steps=7"], RunConfig)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.as_dict(wanted), sort_keys=False))
    assert config.load(file, [], RunConfig) == wanted
    assert config.load(file, ["--config.train.steps=9"], RunConfig).train.steps == 9
    file.write_text("model: {width: 3}\n")
    with pytest.raises(BadInput, match=r"config\.yaml: model\.width: no such field"):
        config.load(file, [], RunConfig)
    mistakes = {"- 1\n": "must hold a mapping of sections, found list", "a: [": "not readable as YAML"}
    for text, message in mistakes.items():
        file.write_text(text)
        with pytest.raises(BadInput, match=message) as stopped:
            config.load(file, [], RunConfig)
        assert "\n" not in str(stopped.value)
    with pytest.raises(BadInput, match=r"missing\.yaml: no such file"):
        config.load(tmp_path / "missing.yaml", [], RunConfig)


def test_help_names_types_as_a_user_would_write_them():
    text = config.help_text(RunConfig)
    assert "refusion_jax." not in text and "collections" not in text
    assert max(map(len, text.splitlines())) <= 110
    for entry in (
        "--config.model.rope_scaling=mapping or None  ",
        "--config.data.tasks=mapping, list of str or str  ",
        "--config.diffusion.slot_sizes=list of int  ",
    ):
        assert entry in text
