"""The tables that `bench` prints: a line of names, and under it one for each row of figures."""

from collections.abc import Mapping
from typing import Any

Columns = Mapping[str, str]  # name -> format
NARROWEST = 8  # characters


def header(columns: Columns) -> str:
    """The names, each over its column."""
    return _aligned({name: name for name in columns})


def line(columns: Columns, row: Mapping[str, Any]) -> str:
    """The figures of a row under the header; what is not known is a dash."""
    return _aligned({n: "-" if row[n] is None else format(row[n], spec) for n, spec in columns.items()})


def _aligned(cells: Mapping[str, str]) -> str:
    return "  ".join(f"{cell:>{max(len(name), NARROWEST)}}" for name, cell in cells.items())
