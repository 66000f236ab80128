"""Writes docs/comparison.md and its plots from docs/comparison/results.

    pip install matplotlib
    python docs/comparison/render.py

Tables and plots hold nothing that is not in the result files; what is said about them stands in
docs/comparison/text.md, with a line `{{name}}` where each table or plot belongs.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from refusion_jax.evaluate import wilson

HERE = Path(__file__).parent
PAGE = HERE.parent / "comparison.md"
NAMES = {"ar": "AR", "refusion": "ReFusion", "mdm": "MDM", "bd3": "BD3"}

Result = dict[str, Any]


def results(kind: str) -> list[Result]:
    """The result files of a kind (train, validation, test, speed), by name."""
    return [json.loads(path.read_text()) for path in sorted((HERE / "results").glob(f"{kind}_*.json"))]


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def share(right: int, problems: int) -> str:
    """In percent, with its 95 % interval."""
    low, high = wilson(right / problems, problems)
    return f"{right / problems:.1%} ({100 * low:.0f} to {100 * high:.0f})"


def shown(settings: Result) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "-"


def is_main(run: str) -> bool:
    return run in NAMES


def trained() -> str:
    """What every run was fed."""
    rows = [
        [r["run"], r["steps"], f"{r['tokens'] / 1e6:.1f}", f"{r['flops'] / 1e15:.1f}", f"{r['seconds']:.0f}"]
        for r in results("train")
    ]
    commands = "\n".join(f"{r['run']}: {r['command']}" for r in results("train"))
    return table(["run", "steps", "million tokens", "PFLOP", "s"], rows) + f"\n\n```\n{commands}\n```"


def right_answers() -> str:
    """Accuracy on held-out problems, each task by the setting that validation chose for it."""
    found: dict[str, dict[str, Result]] = {}
    for result in results("test"):
        if is_main(result["run"]):
            of_run = found.setdefault(result["run"], {})
            for entry in result["found"]:
                of_run |= {
                    task: row | {"settings": entry["settings"]} for task, row in entry["tasks"].items()
                }
    runs = [run for run in NAMES if run in found]
    tasks = sorted({task for of_run in found.values() for task in of_run})
    rows = [
        [task, *(share(found[run][task]["right"], found[run][task]["problems"]) for run in runs)]
        for task in tasks
    ]
    rows.append(["mean", *(f"{mean(found[run].values()):.1%}" for run in runs)])
    chosen: dict[tuple[str, str], list[str]] = {}  # method and setting -> tasks
    for run in runs:
        for task in tasks:
            chosen.setdefault((NAMES[run], shown(found[run][task]["settings"])), []).append(task)
    settings = [[*key, ", ".join(of_tasks)] for key, of_tasks in chosen.items()]
    return (
        table(["task", *map(NAMES.get, runs)], rows)
        + "\n\n"
        + table(["method", "setting", "tasks"], settings)
    )


def mean(rows: Iterable[Result]) -> float:
    shares = [row["right"] / row["problems"] for row in rows]
    return sum(shares) / len(shares)


def speeds() -> list[Result]:
    """Of every method and setting that was timed: accuracy, and what decoding took."""
    rows = []
    for result in results("speed"):
        for entry in result["found"]:
            tasks = entry["tasks"].values()
            seconds, problems = sum(r["seconds"] for r in tasks), sum(r["problems"] for r in tasks)
            useful = sum(r["answer_tokens"] for r in tasks)
            rows.append(
                {
                    "run": result["run"],
                    "method": NAMES[result["method"]],
                    "settings": entry["settings"],
                    "batch_size": entry["batch_size"],
                    "accuracy": mean(tasks),
                    "tokens_per_second": useful / seconds,
                    "tokens_per_forward": sum(r["tokens"] for r in tasks) / sum(r["forwards"] for r in tasks),
                    "answer": useful / problems,
                    "latency": seconds * min(entry["batch_size"], problems) / problems,
                    "device": result["device"],
                }
            )
    return rows


def speed_table() -> str:
    header = ["method", "setting", "at a time", "accuracy", "tokens/s", "tokens a pass", "answer", "latency"]
    rows = [
        [
            row["method"],
            shown(row["settings"]),
            row["batch_size"],
            f"{row['accuracy']:.1%}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_forward']:.2f}",
            f"{row['answer']:.0f} tokens",
            f"{1e3 * row['latency']:.0f} ms",
        ]
        for row in speeds()
    ]
    return table(header, rows)


def search() -> str:
    """The runs that chose the rates: mean accuracy in validation."""
    rows = [
        [r["run"], shown(entry["settings"]), f"{mean(entry['tasks'].values()):.1%}"]
        for r in results("search")
        for entry in r["found"]
    ]
    return table(["run", "setting", "mean accuracy in validation"], rows)


def plot(name: str, draw: Callable[[Any], None]) -> str:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    draw(figure.subplots())
    path = HERE / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})  # the same file from the same results
    return f"![{name.replace('_', ' ')}]({path.relative_to(PAGE.parent)})"


def accuracy_against_speed(axes: Any) -> None:
    for method in NAMES.values():
        rows = [r for r in speeds() if r["method"] == method and r["batch_size"] == 1]
        axes.scatter(
            [r["tokens_per_second"] for r in rows], [100 * r["accuracy"] for r in rows], label=method
        )
    axes.set(xscale="log", xlabel="tokens/s, one request at a time", ylabel="mean accuracy, %")
    axes.legend()


def thresholds(axes: Any) -> None:
    """ReFusion in validation: every setting."""
    for result in results("validation"):
        if result["run"] != "refusion":
            continue
        sizes: dict[str, list[tuple[float, float]]] = {}
        for entry in result["found"]:
            tasks, of = entry["tasks"].values(), entry["settings"]
            passes = sum(r["tokens"] for r in tasks) / sum(r["forwards"] for r in tasks)
            label = f"slots of {of['slot_size']}, {of['num_blocks']} blocks"
            sizes.setdefault(label, []).append((passes, 100 * mean(tasks)))
        for label, points in sizes.items():
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=label)
    axes.set(xlabel="tokens a pass", ylabel="mean accuracy in validation, %")
    axes.legend()


def main() -> None:
    parts = {
        "trained": trained,
        "right answers": right_answers,
        "speed": speed_table,
        "search": search,
        "accuracy against speed": lambda: plot("accuracy_against_speed", accuracy_against_speed),
        "thresholds": lambda: plot("thresholds", thresholds),
    }
    text = (HERE / "text.md").read_text()
    PAGE.write_text(re.sub(r"\{\{(.+?)\}\}", lambda match: parts[match[1]](), text))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
