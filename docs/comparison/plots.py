"""The plots of docs/comparison.md, SVG files beside its text."""

from collections.abc import Callable
from typing import Any

from figures import HERE, NAMES, half_width, results, speeds, varied
from matplotlib.figure import Figure
from settings import accuracy, tokens_a_pass


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
        for method in NAMES.values():
            rows = [r for r in speeds() if r["method"] == method and r["batch_size"] == batch_size]
            if rows:
                axes.errorbar(
                    [r["tokens_per_second"] for r in rows],
                    [100 * accuracy(r["tasks"]) for r in rows],
                    yerr=[100 * half_width(r["tasks"]) for r in rows],
                    fmt="o",
                    capsize=2,
                    label=method,
                )
        axes.set(xscale="log", xlabel=f"tokens/s, {batch_size} at a time", ylabel="mean accuracy, %")
    single.legend()


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
    slot.legend()


def curves(axes: Any) -> None:
    for run, result in results("train").items():
        if run in NAMES:
            curve = result["curve"]
            tokens = [step * result["tokens"] / result["steps"] / 1e6 for step in curve["step"]]
            axes.plot(tokens, curve["loss"], label=NAMES[run], linewidth=1)
    axes.set(xlabel="million tokens", ylabel="training loss, each method's own", yscale="log")
    axes.legend()
