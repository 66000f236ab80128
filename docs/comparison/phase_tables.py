"""The section of docs/comparison.md about the runs of phases.py, and its tables. Empty without results."""

import re
from pathlib import Path

import figures
from figures import Result, aup, difference, results, shown, table, with_interval
from phases import RUNS, SHARES, STAGES, TARGETS, WAYS, of_stage, read
from settings import accuracy, front, tokens_a_pass

TEXT = Path(__file__).parent / "phases_text.md"
LABELS = {
    "ar": "AR",
    "ar_half": "AR, half of the steps",
    "refusion": "ReFusion",
    "ar_refusion": "AR, then ReFusion",
    "anchored": "AR, then anchored",
    "taught": "the better of these with a teacher",
    "adapter": "AR, then a lossless adapter",
}
WORDS = {"ar": "left to right", "lookup": "looked-up drafts", "threshold": "thresholds", "exact": "exact"}
MEASURED = {"mdm": "MDM", "bd3": "BD3"}  # before; rows of the same table


def found() -> dict[str, list[Result]]:
    """The figures of each run that has some."""
    of = {name: read(figures.HERE / "results", name) for name in TARGETS}
    return {name: lines for name, lines in of.items() if lines}


def tested() -> dict[tuple[str, str], list[Result]]:
    """The figures in the test split by run and way, the setting that was best in validation first."""
    of = {
        (name, way): of_stage(lines, "test", way)
        for name, lines in found().items()
        for way in RUNS[name].ways
    }
    return {at: tests for at, tests in of.items() if tests}


def point(tasks: dict[str, Result]) -> tuple[float, float]:
    """(tokens per pass, mean accuracy in percent)."""
    return tokens_a_pass(tasks.values()), 100 * accuracy(tasks.values())


def speed_cells(timed: list[Result]) -> list[str]:
    """Tokens/s and tokens per pass, 1 and 32 at a time, each by its fastest setting."""
    cells = []
    for at_a_time in (1, 32):
        rates = [
            (
                sum(row["answer_tokens"] for row in figure["tasks"].values())
                / sum(row["seconds"] for row in figure["tasks"].values()),
                tokens_a_pass(figure["tasks"].values()),
            )
            for figure in timed
            if figure["at_a_time"] == at_a_time
        ]
        cells += [f"{max(rates)[0]:,.0f}", f"{max(rates)[1]:.2f}"] if rates else ["", ""]
    return cells


def measured(name: str) -> dict[str, Result]:
    """The counts of every task in the test split, of a method that was not trained again."""
    return {task: row for e in results("test")[name]["found"] for task, row in e["tasks"].items()}


def measured_rows(highest: float) -> list[list[str]]:
    """The rows of methods that were not trained again; their AUP is of validation."""
    rows = []
    for name, label in MEASURED.items():
        tasks, validated = measured(name), results("validation")[name]["found"]
        best = front(validated)
        area = aup([point(entry["tasks"]) for entry in validated if entry["settings"] in best], highest)
        timed = [figure | {"at_a_time": figure["batch_size"]} for figure in results("speed")[name]["found"]]
        # The first setting of either number at a time, as in the table of speeds.
        first = [next(figure for figure in timed if figure["at_a_time"] == size) for size in (1, 32)]
        passes = tokens_a_pass(first[0]["tasks"].values())
        cells = [with_interval(tasks.values()), "", f"{area:.0f}", f"{passes:.2f}", *speed_cells(first)]
        rows.append([label, "as above", *cells])
    return rows


def compared() -> str:
    tests = tested()
    models = [figure["tasks"] for of in tests.values() for figure in of] + [
        measured(name) for name in MEASURED
    ]
    highest = max(point(tasks)[1] for tasks in models)
    base = tests.get(("ar", "ar"))
    rows = []
    for (name, way), of in sorted(tests.items(), key=lambda item: list(LABELS).index(item[0][0])):
        tasks = of[0]["tasks"]
        against = ""
        if base is not None and of is not base:
            against = "{:+.1f} ({:+.1f} to {:+.1f})".format(*difference(tasks, base[0]["tasks"]))
        area = aup([point(figure["tasks"]) for figure in of], highest)
        timed = of_stage(found()[name], "speed", way)
        cells = [with_interval(tasks.values()), against, f"{area:.0f}", f"{point(tasks)[0]:.2f}"]
        rows.append([LABELS[name], WORDS[way], *cells, *speed_cells(timed)])
    header = ["training", "decoding", "right answers", "points against AR", "AUP", "tokens per pass"]
    header += ["tokens/s, 1 at a time", "per pass", "tokens/s, 32 at a time", "per pass"]
    return table(header, [*rows, *measured_rows(highest)])


def right_answers() -> str:
    tests = tested()
    tasks = sorted(next(iter(tests.values()))[0]["tasks"])
    rows = [
        [LABELS[name], WORDS[way], *(f"{100 * accuracy([of[0]['tasks'][task]]):.1f} %" for task in tasks)]
        for (name, way), of in sorted(tests.items(), key=lambda item: list(LABELS).index(item[0][0]))
    ]
    return table(["training", "decoding", *(f"`{task}`" for task in tasks)], rows)


def trained() -> str:
    """Data and computation of each row of the comparison, the run that it started from included."""
    runs = results("phases_train")
    rows = []
    for name, label in LABELS.items():
        if name not in runs or (RUNS[name].after and RUNS[name].after not in runs):
            continue
        parts = [runs[part] for part in (RUNS[name].after, name) if part]
        steps = " + ".join(f"{part['steps']:,}" for part in parts)
        taught = teachers_flops(name, runs)
        flops = sum(part["flops"] for part in parts) - (taught or 0)
        rows.append(
            [
                label,
                steps,
                f"{sum(part['tokens'] for part in parts) / 1e6:.1f}",
                f"{flops / 1e15:.1f}",
                f"{taught / 1e15:.1f}" if taught else "",
                f"{sum(part['seconds'] for part in parts):.0f}",
            ]
        )
    header = ["training", "steps", "million tokens", "PFLOP", "PFLOP of the teacher", "GPU seconds"]
    return table(header, rows)


def teachers_flops(name: str, runs: dict[str, Result]) -> float | None:
    """What a run takes more than the same steps without a teacher; None if either was not trained."""
    other = runs.get("anchored") or runs.get("ar_refusion")
    if name != "taught" or other is None:
        return None
    return runs[name]["flops"] - other["flops"] * runs[name]["steps"] / other["steps"]


def shares() -> str:
    """The search for ar_share, read exactly, in validation."""
    rows = []
    for share in SHARES:
        for figure in of_stage(found().get(f"anchored_{share}", []), "validation", "exact"):
            tasks = list(figure["tasks"].values())
            rows.append([share, with_interval(tasks), f"{tokens_a_pass(tasks):.2f}"])
    return table(["ar_share", "right answers", "tokens per pass"], rows)


def settings() -> str:
    """The thresholds that decoded the test split, those of the row first, then those that AUP counts too."""
    rows = [
        [LABELS[name], "; ".join(shown(figure["settings"]) for figure in of)]
        for (name, way), of in tested().items()
        if WAYS[way].timed is None
    ]
    return table(["training", "thresholds"], rows)


def device() -> str:
    lines = [line for of in found().values() for line in of if line["stage"] in STAGES]
    return "; ".join(sorted({f"{r['device']}, JAX {r['jax']}, Python {r['python']}" for r in lines}))


def commands() -> str:
    lines = [
        f"results/phases_train_{name}.json: {r['command']}" for name, r in results("phases_train").items()
    ]
    lines += [f"results/phases_{name}.jsonl: {of[0]['command']}" for name, of in found().items()]
    return "```\n" + "\n".join(lines) + "\n```"


PARTS = {
    "device": device,
    "compared": compared,
    "right answers": right_answers,
    "trained": trained,
    "shares": shares,
    "settings": settings,
    "commands": commands,
}


def section() -> str:
    """The section with its heading; empty as long as no test problems were decoded."""
    if not tested():
        return ""
    text = TEXT.read_text(encoding="utf-8")
    return re.sub(r"\{\{(.+?)\}\}", lambda match: PARTS[match[1]](), text) + "\n"
