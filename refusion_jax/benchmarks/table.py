"""Text tables that are printed row by row, as figures become known.

Lines are plain ASCII of the same width on a terminal, in a pipe and in a file.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import rich.box
import rich.table
from rich.console import Console
from rich.text import Text

NARROWEST = 8  # characters
NO_LIMIT = 10_000  # characters; lines never wrap


class Table:
    """Formats the header and the rows of one table.

    Attributes:
      columns: name -> format specification of the column's figures.
      widths: name -> least width in characters; by default that of the name, and at least NARROWEST.
      box: how columns are separated: None by spaces, or a style of rich.box.
    """

    def __init__(
        self,
        columns: Mapping[str, str],
        widths: Mapping[str, int] = MappingProxyType({}),
        box: rich.box.Box | None = None,
    ):
        self.columns = columns
        self.widths = {name: max(len(name), NARROWEST) for name in columns} | dict(widths)
        self.box = box

    def header(self) -> str:
        """The names, each over its column."""
        return self._render(None)

    def line(self, row: Mapping[str, Any]) -> str:
        """The figures of a row, name -> value; None prints as a dash."""
        return self._render(
            ["-" if row[name] is None else format(row[name], spec) for name, spec in self.columns.items()]
        )

    def _render(self, cells: Sequence[str] | None) -> str:
        """One row of cells, or the header."""
        table = rich.table.Table(box=self.box, show_header=cells is None, pad_edge=self.box is not None)
        for name in self.columns:
            table.add_column(name, justify="right", no_wrap=True, min_width=self.widths[name])
        if cells is not None:
            table.add_row(*map(Text, cells))
        console = Console(width=NO_LIMIT, color_system=None)
        with console.capture() as captured:
            console.print(table)
        return "\n".join(line.rstrip() for line in captured.get().splitlines() if line.strip())
