"""What setup.py declares against what the code imports, and the pinned requirements of each Python."""

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import refusion_jax
from refusion_jax.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
SETUP = ast.parse((ROOT / "setup.py").read_text())
# Imported name -> distribution, where they differ.
DISTRIBUTIONS = {"yaml": "pyyaml", "google": "protobuf", "orbax": "orbax-checkpoint"}
OPTIONAL = {"wandb": "wandb", "gguf": "gguf", "fsspec": "gcs"}  # imported name -> the extra that brings it
PYTHONS = ("3.11", "3.12", "3.13")


def argument(name: str) -> ast.expr:
    (call,) = (n for n in ast.walk(SETUP) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "setup")
    return next(keyword.value for keyword in call.keywords if keyword.arg == name)


def texts(node: ast.expr) -> list[str]:
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(pattern: str) -> set[str]:
    found = set()
    for path in ROOT.glob(pattern):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module)
    return {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names) - {"refusion_jax"}


def test_what_is_imported_is_declared():
    declared = {normal(Requirement(text).name) for text in texts(argument("install_requires"))} | {"jax"}
    wanted = {
        normal(DISTRIBUTIONS.get(name, name)) for name in imported("refusion_jax/**/*.py") - set(OPTIONAL)
    }
    assert wanted <= declared
    # tensorflow-datasets needs importlib_resources and does not declare it.
    assert declared - wanted == {"importlib-resources"}
    extras = argument("extras_require")
    assert set(OPTIONAL.values()) <= {key.value for key in extras.keys}


def test_every_requirement_has_an_upper_bound():
    for text in texts(argument("install_requires")):
        specifiers = str(Requirement(text).specifier)
        assert "<" in specifiers or text.startswith("importlib_resources"), text


@pytest.mark.parametrize("python", PYTHONS)
def test_pinned_requirements_satisfy_the_bounds(python):
    lines = (ROOT / f"requirements-{python}.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+", line) for line in lines), "only names and versions"
    pinned = {normal(name): version for name, version in (line.split("==") for line in lines)}
    for requirement in map(Requirement, metadata.requires("refusion_jax")):
        for extra in ("", "dev"):
            environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": extra}
            if requirement.marker is None or requirement.marker.evaluate(environment):
                assert requirement.specifier.contains(pinned[normal(requirement.name)]), requirement


def test_console_scripts_are_the_commands():
    scripts = {script.name: script.value for script in metadata.entry_points(group="console_scripts")}
    assert scripts["refusion"] == "refusion_jax.__main__:main"
    for name in COMMANDS:
        assert scripts[f"refusion-{name}"] == f"refusion_jax.{name}:main"
    assert metadata.version("refusion_jax") == refusion_jax.__version__


def test_make_and_ci_know_the_same_pythons():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.search(r"python-version: \[(.*)\]", workflow)[1] == ", ".join(f'"{p}"' for p in PYTHONS)
    assert {path.name for path in ROOT.glob("requirements-*.txt")} == {
        f"requirements-{p}.txt" for p in PYTHONS
    }
