"""Reads docs/comparison/results and computes figures from it."""

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from settings import USUAL, accuracy, tokens_a_pass

from refusion_jax.serving.score import Z

HERE = Path(__file__).parent
NAMES = {"ar": "AR", "refusion": "ReFusion", "mdm": "MDM", "bd3": "BD3", "refusion_ar": "ReFusion's as AR"}

Result = dict[str, Any]
RESAMPLES = 10_000  # of the paired bootstrap


def results(kind: str) -> dict[str, Result]:
    """The result files of a kind, by the rest of their names: the run, and the decoding method where the run
    was trained for another one. Kinds: train, search, validation, test, speed, ablations, sizes; and
    earlier_test and earlier_speed of the models of the first training."""
    paths = sorted((HERE / "results").glob(f"{kind}_*.json"))
    return {path.stem.removeprefix(f"{kind}_"): json.loads(path.read_text()) for path in paths}


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def shown(settings: Result) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "-"


def half_width(rows: Iterable[Result]) -> float:
    """Half the 95 % interval of a mean accuracy. Problems are a sample; the set of tasks is fixed."""
    shares = [(row["right"] / row["problems"], row["problems"]) for row in rows]
    return Z * math.sqrt(sum(share * (1 - share) / count for share, count in shares)) / len(shares)


def difference(ours: Mapping[str, Result], theirs: Mapping[str, Result]) -> tuple[float, float, float]:
    """(difference of two mean accuracies over the same problems, the ends of its 95 % interval), in percent.

    The interval is that of the paired bootstrap: the problems of each task are drawn again with replacement,
    each with both of its verdicts, and the ends are percentiles of the differences. The tasks are fixed.
    """
    random = np.random.default_rng(0)
    found, drawn = [], np.zeros(RESAMPLES)
    for task, row in ours.items():
        changes = [int(a) - int(b) for a, b in zip(row["verdicts"], theirs[task]["verdicts"], strict=True)]
        found.append(statistics.mean(changes))
        # What matters of the drawn problems is how many were lost, left and gained.
        shares = [changes.count(change) / len(changes) for change in (-1, 0, 1)]
        lost, _, gained = random.multinomial(len(changes), shares, RESAMPLES).T
        drawn += (gained - lost) / len(changes) / len(ours)
    return 100 * statistics.mean(found), *(100 * float(end) for end in np.quantile(drawn, (0.025, 0.975)))


def aup(points: Sequence[tuple[float, float]], highest: float) -> float:
    """Accuracy under parallelism (d3LLM): the area under accuracy against tokens per pass.

    Accuracies y below the highest count less, by min(exp(-3 (1 - y / y_max)), 1), and those more than 5
    points below the accuracy at the fewest tokens per pass do not count. Of one point it is y times r.

    Args:
      points: (tokens per pass r, accuracy in percent y) of the settings of one model.
      highest: y_max, of all models compared.
    """

    def weighted(y: float) -> float:
        return y * min(math.exp(-3 * (1 - y / highest)), 1)

    slowest, first = min(points)
    counted = sorted((r, y) for r, y in points if y >= first - 5)
    steps = itertools.pairwise(counted)
    return slowest * first + sum((r - q) * (weighted(y) + weighted(x)) / 2 for (q, x), (r, y) in steps)


def with_interval(rows: Iterable[Result]) -> str:
    """Mean accuracy in percent."""
    rows = list(rows)
    return f"{100 * accuracy(rows):.1f} ± {100 * half_width(rows):.1f} %"


def speeds(kind: str = "speed") -> list[Result]:
    """Accuracy and decoding times of every method and setting that was timed."""
    rows = []
    for name, result in results(kind).items():
        for entry in result["found"]:
            tasks = list(entry["tasks"].values())
            seconds, problems = sum(r["seconds"] for r in tasks), sum(r["problems"] for r in tasks)
            useful = sum(r["answer_tokens"] for r in tasks)
            rows.append(
                {
                    "method": NAMES[name],
                    "settings": entry["settings"],
                    "batch_size": entry["batch_size"],
                    "tasks": tasks,
                    "tokens_per_second": useful / seconds,
                    "tokens_a_pass": tokens_a_pass(tasks),
                    "answer": useful / problems,
                    "latency": seconds * min(entry["batch_size"], problems) / problems,
                }
            )
    return rows


def request_costs(tasks: Iterable[Result]) -> tuple[float, float]:
    """(ms that a request takes besides its passes, ms of a pass): least squares over the tasks' means."""
    tasks = list(tasks)
    passes = [row["forwards"] / row["problems"] for row in tasks]
    ms = [1e3 * row["seconds"] / row["problems"] for row in tasks]
    each, besides = statistics.linear_regression(passes, ms)
    return besides, each


def varied(*keys: str) -> list[tuple[Result, list[Result]]]:
    """(settings, counts of tasks) of the ablations in which nothing but `keys` and the size of slots differs
    from the usual."""
    entries = results("ablations")["refusion"]["found"]
    return [
        (entry["settings"], list(entry["tasks"].values()))
        for entry in entries
        if all(entry["settings"][key] == value for key, value in USUAL.items() if key not in keys)
    ]
