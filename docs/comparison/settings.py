"""The decoding settings that docs/comparison.md compares, and the choice among them.

An entry is the result of decode_runs.py for one setting: {"settings", "tasks": {task: counts}}.
"""

import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Settings = dict[str, Any]
Entry = dict[str, Any]
Counts = dict[str, float]

GEN_LENGTH = 256
TOLERANCE = 0.02  # mean accuracy that the fastest setting may lose
WIDTH = 0.05  # mean accuracy below the best at which AUP stops counting
# The starting point of the ablations: the most frequent thresholds in arXiv 2512.13586.
USUAL = {
    "num_blocks": 4,
    "slot_threshold": 0.9,
    "token_threshold": 0.4,
    "slot_score": "first",
    "recompute": False,
}


def crossed(**choices: Iterable[Any]) -> list[Settings]:
    """Every combination, the last choice varying fastest."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def distinct(settings: Sequence[Settings]) -> list[Settings]:
    """The settings without repetitions, in order of first appearance."""
    return [setting for i, setting in enumerate(settings) if setting not in settings[:i]]


def grid(method: str) -> list[Settings]:
    """The settings that validation chooses from; the search for learning rates decodes with the first."""
    if method == "ar":
        return [{}]
    if method == "refusion":
        # (tokens of a slot, blocks of the 256 tokens): blocks of 32 and 64 tokens, the paper's thresholds.
        sizes = [(32, 4), (16, 4), (8, 4), (32, 8), (16, 8), (8, 8)]
        return [
            {"slot_size": size, "num_blocks": blocks} | thresholds
            for size, blocks in sizes
            for thresholds in crossed(slot_threshold=[0.9, 0.6], token_threshold=[0.6, 0.3, 0.9])
        ]
    thresholds = [1.0, 0.95, 0.9, 0.7]  # 1: one token per pass
    if method == "bd3":
        return crossed(token_threshold=thresholds)
    longer = crossed(cache=["none"], num_blocks=[4], token_threshold=thresholds[:2])
    return crossed(cache=["dual", "prefix", "none"], num_blocks=[8], token_threshold=thresholds) + longer


def slot_sizes() -> list[Settings]:
    """The settings for models trained on other slot sizes or less data."""
    return [size | USUAL for size in crossed(slot_size=[4, 8, 16, 32])]


def ablations() -> list[Settings]:
    """One or two of the usual settings varied at a time, for slots of 8 and 32; and the size of slots."""
    varied = [
        *crossed(num_blocks=[1, 2, 4, 8]),
        *crossed(slot_threshold=[0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99]),
        *crossed(token_threshold=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97]),
        *crossed(slot_score=["first", "mean", "entropy"], slot_threshold=[0.5, 0.7, 0.9]),
        *crossed(recompute=[False, True], slot_threshold=[0.5, 0.7, 0.9]),
    ]
    settings = [{"slot_size": size} | USUAL | change for size in (8, 32) for change in varied] + slot_sizes()
    return distinct(settings)


# The experiment of phases.py.


def blocks_of_32(gen_length: int) -> list[Settings]:
    """Thresholds that validation chooses from: blocks of 32 tokens, which were best before, of one slot or of
    four. With one slot there is no choice among slots, so `slot_threshold` does not matter."""
    blocks = {"num_blocks": gen_length // 32}
    one = crossed(slot_size=[32], slot_threshold=[0.9], token_threshold=[0.1, 0.3, 0.5, 0.7, 0.9, 0.97])
    four = crossed(slot_size=[8], slot_threshold=[0.9, 0.6], token_threshold=[0.3, 0.6, 0.9])
    return [blocks | setting for setting in one + four]


def front(entries: Sequence[Entry]) -> list[Settings]:
    """The settings that no other beats in both accuracy and tokens per pass, the most accurate first, within
    WIDTH of it. Their accuracies in the test split give the AUP."""
    points = [(accuracy(e["tasks"].values()), tokens_a_pass(e["tasks"].values()), e) for e in entries]
    points.sort(key=lambda point: point[:2], reverse=True)
    chosen: list[Settings] = []
    fastest_so_far = 0.0
    for share, passes, entry in points:
        if share >= points[0][0] - WIDTH and passes > fastest_so_far:
            chosen.append(entry["settings"])
            fastest_so_far = passes
    return chosen


def accuracy(rows: Iterable[Counts]) -> float:
    """The mean over tasks."""
    return statistics.mean(row["right"] / row["problems"] for row in rows)


def tokens_a_pass(rows: Iterable[Counts]) -> float:
    rows = list(rows)
    return sum(row["tokens"] for row in rows) / sum(row["forwards"] for row in rows)


def best(entries: Sequence[Entry], tasks: Iterable[str]) -> Settings:
    """The settings with the highest accuracy over the tasks; among equals, with most tokens per pass."""

    def merit(entry: Entry) -> tuple[float, float]:
        rows = [entry["tasks"][task] for task in tasks]
        return accuracy(rows), tokens_a_pass(rows)

    return max(entries, key=merit)["settings"]


def fastest(entries: Sequence[Entry]) -> Settings:
    """The settings with most tokens per pass whose accuracy is within TOLERANCE of the best."""
    least = max(accuracy(entry["tasks"].values()) for entry in entries) - TOLERANCE
    good = [entry for entry in entries if accuracy(entry["tasks"].values()) >= least]
    return max(good, key=lambda entry: tokens_a_pass(entry["tasks"].values()))["settings"]


def timed(entries: Sequence[Entry]) -> list[Settings]:
    """The settings whose speed is measured: the best and the fastest. Of methods that unmask: the best one of
    one token per pass without a cache, and the fastest one of every cache."""
    if all("slot_size" in entry["settings"] or not entry["settings"] for entry in entries):
        chosen = [best(entries, entries[0]["tasks"]), fastest(entries)]
    else:
        single = [entry for entry in entries if entry["settings"]["token_threshold"] == 1]
        uncached = [entry for entry in single if entry["settings"].get("cache") in (None, "none")]
        several = [entry for entry in entries if entry not in single]
        caches = sorted({entry["settings"].get("cache", "") for entry in several})
        alike = [[e for e in several if e["settings"].get("cache", "") == cache] for cache in caches]
        chosen = [best(uncached, uncached[0]["tasks"]), *map(fastest, alike)]
    return distinct(chosen)
