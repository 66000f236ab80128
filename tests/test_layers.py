"""What may import what, read off the source; nothing is run.

The rules are those of docs and commit messages: a reader who knows them knows where to look.
"""

import ast
import functools
from pathlib import Path

import pytest

PACKAGE = "refusion_jax"
ROOT = Path(__file__).resolve().parent.parent / PACKAGE
TRAIN_SIDE = {"train", "train_step", "objectives"}
SANDBOXED = "data.sandbox_child"
DECODE_SIDE = {"decode", "phases", "serving", "sample"}


def module_name(path: Path) -> str:
    """`data.task` for refusion_jax/data/task.py, `data` for refusion_jax/data/__init__.py, `` for its own."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
MODULES = sorted(FILES)


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


@functools.cache
def imported(module: str) -> frozenset[str]:
    """Absolute dotted names of all that a module imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(tree(module)):
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
    assert TRAIN_SIDE | DECODE_SIDE | {"model", "errors", "checkpoint", "sharding", "baselines.ar"} <= set(
        FILES
    )
    assert {"model", "errors", "diffusion", "sharding"} <= reachable("train_step")
    assert {"kv_cache", "model", "requests"} <= reachable("decode")
    assert {"decode", "baselines.ar", "baselines.mdm", "baselines.bd3"} <= ours("serving")
    assert {"train", "sample"} <= {module for module in MODULES if is_command(module)}


@pytest.mark.parametrize("module", sorted(TRAIN_SIDE))
def test_training_does_not_bring_decoding_along(module):
    assert not reachable(module) & DECODE_SIDE


@pytest.mark.parametrize(
    "module", sorted(DECODE_SIDE | {"baselines.ar", "baselines.mdm", "baselines.bd3", "loader"})
)
def test_decoding_does_not_bring_training_along(module):
    assert not reachable(module) & TRAIN_SIDE


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("errors", set()),
        ("rope", set()),
        ("triton_attention", set()),
        ("triton_int8", set()),
        ("attention", {"triton_attention"}),
        ("model_config", {"rope"}),
        ("layers", {"model_config", "rope", "attention", "triton_attention", "triton_int8"}),
        ("model", {"attention", "layers", "model_config", "rope", "triton_attention"}),
        ("kv_cache", {"model", "attention"}),
        ("one_array", set()),
        ("cross_entropy", set()),
        ("segments", set()),
        ("diffusion", {"cross_entropy", "segments"}),
        ("baselines.ar_objective", {"diffusion", "segments"}),
        ("baselines.mdm_objective", {"diffusion", "segments"}),
        ("baselines.bd3_objective", {"baselines.mdm_objective", "diffusion", "segments"}),
        ("lora", {"stored"}),
    ],
    ids=lambda value: ",".join(sorted(value)) if isinstance(value, set | tuple) else None,
)
def test_the_lowest_modules_import_next_to_nothing_of_ours(module, allowed):
    """The model knows no slots, mesh, tokenizer or sampling; the objective knows no model."""
    assert ours(module) <= allowed


def test_no_cycles():
    # The package's own __init__ re-exports and is imported by nobody inside.
    for module in MODULES:
        for other in ours(module):
            assert other != "", f"{module} imports the package itself"
            assert module not in reachable(other), f"{module} and {other} import each other"


@pytest.mark.parametrize(
    ("libraries", "allowed"),
    [
        (("orbax",), lambda module: module == "checkpoint"),
        (("grain", "tensorflow_datasets"), lambda module: comes_from(module, "data")),
        (("argparse",), lambda module: is_command(module) or module in ("config", "opening")),
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
    nodes = [node for module in ("model", "layers", "model_config") for node in ast.walk(tree(module))]
    identifiers = {node.id for node in nodes if isinstance(node, ast.Name)}
    identifiers |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    assert not {name for name in identifiers if "slot" in name or "mesh" in name or "eos" in name}
