"""What may import what, read off the source; nothing is run.

`MAY_IMPORT` is the whole rule: a room of the package (a folder, or a module at its top) imports only those
listed for it. No room may reach itself through others, so imports point one way.
"""

import ast
import functools
from pathlib import Path

import pytest

import refusion_jax.__main__

PACKAGE = "refusion_jax"
ROOT = Path(__file__).resolve().parent.parent / PACKAGE
SANDBOXED = "data.tasks.sandbox_child"
COMMANDS = set(refusion_jax.__main__.COMMANDS)

# Rooms that any other may import.
GROUND = {"buckets", "compilation", "errors", "files", "deferred", "interrupt", "version"}
MAY_IMPORT = {
    "": set(),
    # ground
    "buckets": set(),
    "compilation": set(),
    "errors": set(),
    "interrupt": set(),
    "deferred": set(),
    "version": set(),
    "__main__": {"config"},
    "files": set(),
    "config": set(),
    "devices": set(),
    "sharding": set(),
    # the model, the objective, the decoder
    "model": {"model.kernels"},
    "model.kernels": set(),
    "diffusion": set(),
    "decode": {"devices", "model"},
    "baselines": set(),
    "baselines.objectives": {"diffusion"},
    "baselines.decoders": {"decode", "model"},
    # files of models
    "weights": set(),
    "checkpoints": {"model", "weights"},
    "tokenizer": set(),
    "loader": {"checkpoints", "model", "sharding", "tokenizer", "weights"},
    # training
    "data.sources": {"tokenizer"},
    "data.tasks": {"data.sources", "tokenizer"},
    "data": {"data.sources", "data.tasks", "tokenizer"},
    "training": {
        "devices",
        "baselines.objectives",
        "checkpoints",
        "config",
        "data",
        "diffusion",
        "loader",
        "model",
        "sharding",
        "tokenizer",
        "weights",
    },
    # decoding for users
    "serving": {
        "baselines.decoders",
        "checkpoints",
        "config",
        "data.sources",
        "data.tasks",
        "decode",
        "loader",
        "model",
        "sharding",
        "tokenizer",
    },
    # measuring, and compiling for other machines
    "benchmarks": {
        "diffusion",
        "devices",
        "data",
        "decode",
        "loader",
        "model",
        "serving",
        "sharding",
        "training",
    },
    "tpu": {"devices", "decode", "loader", "model", "sharding", "training"},
    # commands
    "train": {"config", "training"},
    "sample": {"config", "serving"},
    "evaluate": {"config", "data", "data.tasks", "serving", "training"},
    "convert": {"checkpoints", "config", "loader", "model", "tokenizer", "weights"},
    "aot": {"benchmarks", "config", "decode", "devices", "model", "sharding", "tpu", "training"},
    "bench": {"benchmarks", "config", "decode", "loader", "serving", "sharding", "training"},
    "demo": {"config", "data.tasks", "serving"},
}


def module_name(path: Path) -> str:
    """`data.tasks.task` for refusion_jax/data/tasks/task.py, `data` for refusion_jax/data/__init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
MODULES = sorted(FILES)


def room(module: str) -> str:
    """The folder that a module lies in, or the module itself where that is the package's top."""
    parts = FILES[module].relative_to(ROOT).parts[:-1]
    return ".".join(parts) or module


ROOMS = sorted({room(module) for module in MODULES})


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def nodes(module: str):
    """All nodes of a module but those under `if TYPE_CHECKING:`, which is never run."""
    left: list[ast.AST] = [tree(module)]
    while left:
        node = left.pop()
        yield node
        type_checking = isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        left += [] if type_checking else ast.iter_child_nodes(node)


@functools.cache
def imported(module: str) -> frozenset[str]:
    """Absolute dotted names of all that a module imports, at its top or inside a function."""
    names = set()
    for node in nodes(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import, line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def comes_from(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def importers(package: str) -> set[str]:
    return {module for module in MODULES if any(comes_from(name, package) for name in imported(module))}


@functools.cache
def ours(module: str) -> frozenset[str]:
    """The modules of the package that a module imports."""
    found = set()
    for name in imported(module):
        if comes_from(name, PACKAGE):
            inside = name.removeprefix(PACKAGE).removeprefix(".")
            # `package.module` itself, or something in it.
            candidates = [inside, inside.rpartition(".")[0]]
            found.add(next(candidate for candidate in candidates if candidate in FILES))
    return frozenset(found)


def rooms_imported(of: str) -> set[str]:
    return {room(other) for module in MODULES if room(module) == of for other in ours(module)} - {of}


def reachable(module: str) -> set[str]:
    """The modules of the package that come along with a module, itself included."""
    found, new = set(), {module}
    while new:
        found |= new
        new = {after for before in new for after in ours(before)} - found
    return found


def is_command(module: str) -> bool:
    return 'if __name__ == "__main__":' in FILES[module].read_text(encoding="utf-8")


def test_the_graph_is_read_as_meant():
    """Guards the tests below against finding nothing because they look for nothing."""
    assert {"model.transformer", "diffusion.slot_diffusion", "sharding"} <= reachable("training.step")
    assert {"decode.kv_cache", "model.transformer", "decode.batch"} <= reachable("decode.loop")
    assert {room("decode.loop"), room("model.config"), room("errors")} == {"decode", "model", "errors"}
    assert {module for module in MODULES if is_command(module)} >= COMMANDS


def test_every_room_has_its_line():
    assert set(ROOMS) == set(MAY_IMPORT)


@pytest.mark.parametrize("of", ROOMS)
def test_a_room_imports_what_its_line_allows(of):
    assert rooms_imported(of) - GROUND <= MAY_IMPORT[of]


def rooms_reached(of: str) -> set[str]:
    """The rooms that come along with a room, itself left out."""
    found, new = set(), rooms_imported(of)
    while new - found:
        found |= new
        new = {after for before in new for after in rooms_imported(before)}
    return found


def test_imports_point_one_way():
    assert [of for of in ROOMS if of in rooms_reached(of)] == []


DECODING = {"decode", "baselines.decoders", "serving"}
TRAINING = {"training", "diffusion", "baselines.objectives"}


@pytest.mark.parametrize(("of", "never"), [(TRAINING, DECODING), (DECODING, TRAINING)])
def test_training_and_decoding_do_not_reach_each_other(of, never):
    for room in of:
        assert not rooms_reached(room) & never, room


def test_few_files_lie_at_the_top():
    """Besides the commands."""
    assert len([path for path in ROOT.iterdir() if path.is_file() and path.stem not in COMMANDS]) <= 14


@pytest.mark.parametrize("module", MODULES)
def test_no_module_reaches_itself(module):
    for other in ours(module):
        assert other != "", f"{module} imports the package itself"
        assert module not in reachable(other), f"{module} and {other} import each other"


@pytest.mark.parametrize(
    ("libraries", "allowed"),
    [
        (("orbax",), lambda module: module == "checkpoints.orbax_io"),
        (("grain", "tensorflow_datasets"), lambda module: comes_from(module, "data")),
        (("argparse",), lambda module: is_command(module) or module == "config" or room(module) == "serving"),
        (("ml_collections",), lambda module: module == "config"),
        (
            ("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"),
            lambda _: False,
        ),
        (("torch", "transformers"), lambda _: False),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_who_imports_a_library(libraries, allowed):
    for library in libraries:
        assert {module for module in importers(library) if not allowed(module)} == set()


def test_nothing_evaluates_text_or_unpickles():
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if not isinstance(node, ast.Call):
                continue
            where = f"{module}, line {node.lineno}"
            if isinstance(node.func, ast.Name) and module != SANDBOXED:
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), where
            for keyword in node.keywords:
                unpickles = (
                    keyword.arg == "allow_pickle" and getattr(keyword.value, "value", True) is not False
                )
                assert not unpickles, where


def test_what_is_sandboxed_is_imported_nowhere():
    """Running code that a model wrote is the business of a script in a process of its own."""
    assert importers(f"{PACKAGE}.{SANDBOXED}") == set()
    assert ours(SANDBOXED) == set()


def test_only_sharding_names_mesh_axes():
    def names(module: str) -> set[str]:
        constants = (node for node in ast.walk(tree(module)) if isinstance(node, ast.Constant))
        return {node.value for node in constants if node.value in ("fsdp", "tensor")}

    assert names("sharding") == {"fsdp", "tensor"}
    assert {module: names(module) for module in MODULES if module != "sharding" and names(module)} == {}


def test_the_model_knows_no_slots():
    """Neither by import nor by the names of its parameters and functions."""
    found = [
        node
        for module in MODULES
        if module in ("model.transformer", "model.layers", "model.config")
        for node in ast.walk(tree(module))
    ]
    identifiers = {node.id for node in found if isinstance(node, ast.Name)}
    identifiers |= {node.arg for node in found if isinstance(node, ast.arg)}
    assert not {name for name in identifiers if "slot" in name or "mesh" in name or "eos" in name}
