"""Writes docs/comparison.md and its plots from docs/comparison/results.

    pip install matplotlib
    python docs/comparison/render.py

All content of tables and plots comes from the result files. The prose is docs/comparison/text.md, with
`{{name}}` in the place of each table or plot.
"""

import re

import matplotlib
import plots
from figures import HERE
from plots import plot
from tables import TABLES

PAGE = HERE.parent / "comparison.md"
PLOTS = {
    "curves": lambda: plot("curves", plots.curves),
    "accuracy against speed": lambda: plot("accuracy_against_speed", plots.accuracy_against_speed, 2),
    "accuracy against passes": lambda: plot("accuracy_against_passes", plots.accuracy_against_passes),
    "thresholds": lambda: plot("thresholds", plots.thresholds, 2),
}


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "comparison"  # the same ids in the SVG on every run
    text = (HERE / "text.md").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(.+?)\}\}", lambda match: (TABLES | PLOTS)[match[1]](), text)
    PAGE.write_text(page, encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
