"""The plots of docs/comparison.md, SVG files beside its text."""

from collections.abc import Callable
from typing import Any

from figures import HERE, NAMES, half_width, results, speeds, varied
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from settings import accuracy, tokens_a_pass

COLOURS = {name: f"C{i}" for i, name in enumerate(NAMES)}


def plot(name: str, draw: Callable[..., None], panels: int = 1) -> str:
    """Draws on so many panels side by side; gives the page's line."""
    figure = Figure(figsize=(7 if panels == 1 else 10, 4.2), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    draw(*axes)
    for each in axes:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    path = HERE / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})  # the same file from the same results
    return f"![{name.replace('_', ' ')}]({path.relative_to(HERE.parent)})"


def accuracy_against_speed(single: Any, many: Any) -> None:
    for axes, batch_size in ((single, 1), (many, 32)):
        for name, method in NAMES.items():
            rows = [r for r in speeds() if r["method"] == method and r["batch_size"] == batch_size]
            if rows:
                axes.errorbar(
                    [r["tokens_per_second"] for r in rows],
                    [100 * accuracy(r["tasks"]) for r in rows],
                    yerr=[100 * half_width(r["tasks"]) for r in rows],
                    fmt="o",
                    capsize=2,
                    color=COLOURS[name],
                    label=method,
                )
        axes.set(xscale="log", xlabel=f"tokens/s, {batch_size} at a time", ylabel="mean accuracy, %")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    single.legend(loc="lower right")


def accuracy_against_passes(axes: Any) -> None:
    """Every setting of validation."""
    for name, result in results("validation").items():
        of = [list(entry["tasks"].values()) for entry in result["found"]]
        axes.plot(
            [tokens_a_pass(rows) for rows in of],
            [100 * accuracy(rows) for rows in of],
            "o",
            markersize=4,
            color=COLOURS[name],
            label=NAMES[name],
        )
    axes.set(xlabel="tokens a pass", ylabel="mean accuracy in validation, %")
    axes.legend(loc="upper right")


def thresholds(slot: Any, token: Any) -> None:
    """Accuracy (line, left) and tokens a pass (dashed, right) by one threshold, the other as the paper's."""
    for axes, key in ((slot, "slot_threshold"), (token, "token_threshold")):
        right = axes.twinx()
        right.spines["top"].set_visible(False)
        right.set_ylabel("tokens a pass (dashed)")
        for size, colour in ((8, "C0"), (32, "C1")):
            rows = sorted((s[key], of) for s, of in varied(key) if s["slot_size"] == size)
            at = [value for value, _ in rows]
            axes.plot(
                at, [100 * accuracy(of) for _, of in rows], "o-", color=colour, label=f"slots of {size}"
            )
            right.plot(at, [tokens_a_pass(of) for _, of in rows], ".--", color=colour, alpha=0.6)
        axes.set(xlabel=key, ylabel="mean accuracy in validation, %")
    token.legend(loc="lower center")


def curves(axes: Any) -> None:
    for run, result in results("train").items():
        if run in NAMES:
            curve = result["curve"]
            tokens = [step * result["tokens"] / result["steps"] / 1e6 for step in curve["step"]]
            axes.plot(tokens, curve["loss"], color=COLOURS[run], label=NAMES[run], linewidth=1)
    axes.set(xlabel="million tokens", ylabel="training loss, each method's own", yscale="log")
    axes.legend()
