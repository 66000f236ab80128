"""The decoding settings that docs/comparison.md compares, by method."""

import itertools
from typing import Any

Settings = dict[str, Any]

GEN_LENGTH = 256


def crossed(**choices: list[Any]) -> list[Settings]:
    """Every combination, the last choice varying fastest."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def grid(method: str) -> list[Settings]:
    """What validation chooses from; its first is what the search for learning rates decodes by."""
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
    thresholds = [1.0, 0.95, 0.9, 0.7]  # 1: one token a pass
    if method == "bd3":
        return crossed(token_threshold=thresholds)
    longer = crossed(cache=["none"], num_blocks=[4], token_threshold=thresholds[:2])
    return crossed(cache=["dual", "prefix", "none"], num_blocks=[8], token_threshold=thresholds) + longer
