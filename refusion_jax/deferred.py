"""Lazy public names of a package: imported when they are first used (PEP 562)."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def deferred(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose public names are defined in modules that are slow to import.

    Args:
      package: `__name__` of the package.
      modules: public name -> full name of the module that defines it, or, if the name is a module, its own
        full name.
    """

    def getattr_(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(modules[name])
        return module if modules[name] == f"{package}.{name}" else getattr(module, name)

    return getattr_
