"""Writes docs/comparison.md and its plots from docs/comparison/results.

    pip install matplotlib
    python docs/comparison/render.py

Tables and plots hold nothing that is not in the result files; what is said about them stands in
docs/comparison/text.md, with `{{name}}` where each table or plot belongs.
"""

import re

import matplotlib
import plots
import tables
from figures import HERE
from plots import plot

PAGE = HERE.parent / "comparison.md"
PARTS = {
    "device": tables.device,
    "trained": tables.trained,
    "search": tables.search,
    "right answers": tables.right_answers,
    "chosen": tables.chosen,
    "speed": tables.speed,
    "blocks": lambda: tables.ablation("num_blocks"),
    "scores": lambda: tables.ablation("slot_score", "slot_threshold"),
    "recompute": lambda: tables.ablation("recompute", "slot_threshold"),
    "sizes": tables.sizes,
    "commands": tables.commands,
    "curves": lambda: plot("curves", plots.curves),
    "accuracy against speed": lambda: plot("accuracy_against_speed", plots.accuracy_against_speed, 2),
    "thresholds": lambda: plot("thresholds", plots.thresholds, 2),
}


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "comparison"  # ids of the SVG that do not differ between runs
    text = (HERE / "text.md").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(.+?)\}\}", lambda match: PARTS[match[1]](), text)
    PAGE.write_text(page, encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
