"""The tables of docs/comparison.md."""

import phase_tables
from figures import NAMES, Result, request_costs, results, shown, speeds, table, varied, with_interval
from settings import accuracy, slot_sizes, tokens_a_pass

from refusion_jax.serving.score import wilson


def share(row: Result) -> str:
    """Accuracy in percent, with its 95 % interval."""
    low, high = wilson(row["right"] / row["problems"], row["problems"])
    return f"{100 * row['right'] / row['problems']:.1f} % ({100 * low:.0f} to {100 * high:.0f})"


def counted(result: Result) -> dict[str, Result]:
    """The counts of every task, each decoded by one setting."""
    return {task: row for entry in result["found"] for task, row in entry["tasks"].items()}


def tested() -> dict[str, dict[str, Result]]:
    """The counts of every task in the test split, by method."""
    return {name: counted(result) for name, result in results("test").items()}


def first_speeds(kind: str = "speed") -> dict[tuple[str, int], Result]:
    """Speeds by method and batch size, with the first of `settings.timed`: the setting with most right
    answers; for methods that unmask, of one token per pass without a cache."""
    first: dict[tuple[str, int], Result] = {}
    for row in speeds(kind):
        first.setdefault((row["method"], row["batch_size"]), row)
    return first


def tokens_per_second() -> dict[tuple[str, int], float]:
    return {at: row["tokens_per_second"] for at, row in first_speeds().items()}


def summary() -> str:
    """One line per method, for README.md."""
    speed, right = tokens_per_second(), tested()
    rows = [
        [name, with_interval(right[key].values()), *(f"{speed[name, size]:,.0f}" for size in (1, 32))]
        for key, name in NAMES.items()
        if (name, 1) in speed
    ]
    return table(["method", "right answers", "tokens/s, 1 at a time", "32 at a time"], rows)


def claims() -> str:
    speed, right = tokens_per_second(), tested()

    def against(method: str, batch_size: int) -> str:
        return f"{speed['ReFusion', batch_size] / speed[method, batch_size]:.2f}x"

    refusion, ar, mdm = (100 * accuracy(right[name].values()) for name in ("refusion", "ar", "mdm"))
    rows = [
        ["right answers, against MDM's", "34 % more", f"{100 * (refusion / mdm - 1):.0f} % more"],
        ["right answers, against AR's", "5.8 points fewer", f"{ar - refusion:.1f} points fewer"],
        ["tokens/s against AR, 1 at a time", "2.33x", against("AR", 1)],
        ["tokens/s against AR, 32 at a time", "-", against("AR", 32)],
        ["tokens/s against MDM without a cache, 1 at a time", "18x", against("MDM", 1)],
        ["tokens/s against MDM without a cache, 32 at a time", "-", against("MDM", 32)],
    ]
    return table(["ReFusion", "paper", "here"], rows)


def trained() -> str:
    """The amount of data and computation of every run."""
    rows = [
        [
            f"`{run}`",
            f"{r['steps']:,}",
            f"{r['tokens'] / 1e6:.1f}",
            f"{r['flops'] / 1e15:.1f}",
            f"{r['seconds'] * r.get('gpus', 1):.0f}",
        ]
        for run, r in results("train").items()
        if "_rate_" not in run
    ]
    return table(["run", "steps", "million tokens", "PFLOP", "GPU seconds"], rows)


def search() -> str:
    """Mean accuracy in validation of the runs that chose the learning rates."""
    found: dict[str, dict[tuple[int, str], str]] = {}
    steps = {run: result["steps"] for run, result in results("train").items()}
    for run, result in results("search").items():
        objective, rate = run.split("_rate_")
        at = steps[run], rate.split("_")[0]
        found.setdefault(objective, {})[at] = with_interval(result["found"][0]["tasks"].values())
    tried = sorted({at for of in found.values() for at in of}, key=lambda at: (at[0], float(at[1])))
    rows = [[NAMES[name], *(of.get(at, "") for at in tried)] for name, of in found.items()]
    return table(["method", *(f"{rate}, {count} steps" for count, rate in tried)], rows)


def right_answers() -> str:
    """Accuracy on held-out problems, each task with the setting that validation chose for it."""
    found = tested()
    methods = [name for name in NAMES if name in found]
    tasks = sorted({task for of in found.values() for task in of})
    rows = [[f"`{task}`", *(share(found[name][task]) for name in methods)] for task in tasks]
    means = [with_interval(found[name].values()) for name in methods]
    return table(["task", *map(NAMES.get, methods)], [*rows, ["mean", *means]])


def earlier() -> str:
    """Mean accuracy in the test split of the models of the first training, and of the page's models."""
    before, now = results("earlier_test"), tested()
    rows = [
        [name, with_interval(counted(before[key]).values()), with_interval(now[key].values())]
        for key, name in NAMES.items()
    ]
    return table(["method", "the first time", "the second time"], rows)


def chosen() -> str:
    """The settings that decoded the test split."""
    tasks: dict[tuple[str, str], list[str]] = {}
    for name, result in results("test").items():
        for entry in result["found"]:
            tasks.setdefault((NAMES[name], shown(entry["settings"])), []).extend(entry["tasks"])
    return table(["method", "setting", "tasks"], [[*key, ", ".join(of)] for key, of in tasks.items()])


def speed() -> str:
    header = ["method", "setting", "at a time", "accuracy"]
    header += ["tokens/s", "tokens per pass", "answer", "latency"]
    rows = [
        [
            row["method"],
            shown(row["settings"]),
            row["batch_size"],
            with_interval(row["tasks"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_a_pass']:.2f}",
            f"{row['answer']:.0f} tokens",
            f"{1e3 * row['latency']:.0f} ms",
        ]
        for row in sorted(speeds(), key=lambda row: (row["batch_size"], row["method"]))
    ]
    return table(header, rows)


def requests() -> str:
    """Time per request and per pass, of the page's models and of those of the first training."""
    header = ["method", "at a time"]
    for when in ("now", "before"):
        header += [f"ms besides passes, {when}", f"ms per pass, {when}", f"tokens/s, {when}"]
    before, rows = first_speeds("earlier_speed"), []
    for at, row in first_speeds().items():
        cells = []
        for timed in (row, before[at]):
            besides, each = request_costs(timed["tasks"])
            cells += [f"{besides:.1f}", f"{each:.3f}", f"{timed['tokens_per_second']:,.0f}"]
        rows.append([*at, *cells])
    return table(header, sorted(rows, key=lambda row: (row[1], row[0])))


def ablation(key: str, *others: str) -> str:
    """Accuracy and tokens per pass of runs in which only these settings and the slot size vary. Values of
    `others` at which `key` was not varied are left out."""
    rows: dict[tuple, list[list]] = {}
    for settings, of in varied(key, *others):
        at = (settings["slot_size"], *(settings[other] for other in others))
        rows.setdefault(at, []).append([*at, settings[key], with_interval(of), f"{tokens_a_pass(of):.2f}"])
    alike = [rows[at] for at in sorted(rows) if len(rows[at]) > 1]
    return table(
        ["slot_size", *others, key, "accuracy", "tokens per pass"], [row for of in alike for row in of]
    )


def sizes() -> str:
    """Accuracy and tokens per pass by the slot sizes of training and of decoding."""
    rows = []
    for run, result in results("sizes").items():
        cells = [
            f"{100 * accuracy(of):.1f} %, {tokens_a_pass(of):.2f}"
            for of in (list(entry["tasks"].values()) for entry in result["found"])
        ]
        rows.append([f"`{run}`", *cells])
    return table(["run", *(f"slots of {setting['slot_size']}" for setting in slot_sizes())], rows)


def commands() -> str:
    """The command that wrote each result file."""
    kinds = ("train", "search", "validation", "test", "speed", "ablations", "sizes")
    kinds += ("earlier_test", "earlier_speed")
    lines = [
        f"results/{kind}_{name}.json: {result['command']}"
        for kind in kinds
        for name, result in results(kind).items()
    ]
    return "```\n" + "\n".join(lines) + "\n```"


def device() -> str:
    """The device and the versions that decoded."""
    found = {
        f"{r['device']}, JAX {r['jax']}, Python {r['python']}"
        for kind in ("validation", "test", "speed")
        for r in results(kind).values()
    }
    return "; ".join(sorted(found))


# The names in the page's text.
TABLES = {
    "device": device,
    "summary": summary,
    "claims": claims,
    "trained": trained,
    "search": search,
    "right answers": right_answers,
    "chosen": chosen,
    "earlier": earlier,
    "speed": speed,
    "requests": requests,
    "blocks": lambda: ablation("num_blocks"),
    "scores": lambda: ablation("slot_score", "slot_threshold"),
    "recompute": lambda: ablation("recompute", "slot_threshold"),
    "sizes": sizes,
    "commands": commands,
    "phases": phase_tables.section,
}
