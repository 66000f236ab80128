"""Rows with examples in order and noised ones, and what plain Python makes of them."""

import functools

import jax
import numpy as np

from refusion_jax.diffusion import slot_diffusion as diffusion
from refusion_jax.diffusion.slot_diffusion import DiffusionConfig, Draw, Noised

MASK, VOCAB, WIDTH = 98, 100, 48
KEY = jax.random.key(3)
CONFIGS = {
    name: DiffusionConfig((3, 4, 8), normalisation=name, ar_share=0.4) for name in diffusion.NORMALISATIONS
}
# Rows of (prompt, response) lengths, some of them 0; one row is full.
GROUPS = [
    [(5, 20)],
    [(0, 1), (3, 9), (2, 14)],
    [(4, 0), (0, 13), (6, 1)],
    [],
    [(10, 38)],
    [(1, 2), (1, 3), (1, 4), (0, 17)],
] * 6


def packed_batch() -> dict[str, np.ndarray]:
    dice = np.random.default_rng(0)
    shape = len(GROUPS), max(map(len, GROUPS))
    batch = {name: np.zeros(shape, np.int32) for name in ("prompt_len", "total_len", "example_id")}
    batch["tokens"] = np.full((len(GROUPS), WIDTH), 7, np.int32)
    for row, group in enumerate(GROUPS):
        lengths = np.reshape(group, (-1, 2)).astype(int)
        used = lengths.sum()
        batch["tokens"][row, :used] = dice.integers(0, MASK, used)
        batch["prompt_len"][row, : len(group)] = lengths[:, 0]
        batch["total_len"][row, : len(group)] = lengths.sum(1)
        batch["example_id"][row, : len(group)] = 100 * row + np.arange(len(group))
    return batch


def alone_batch(batch) -> dict[str, np.ndarray]:
    """The same examples, one per row, in the order of the packed rows."""
    alone = {name: [] for name in batch}
    for row, totals in enumerate(batch["total_len"]):
        starts = np.cumsum(totals) - totals
        for place, (start, total) in enumerate(zip(starts, totals, strict=True)):
            if total:
                tokens = batch["tokens"][row, start : start + total]
                alone["tokens"].append(np.pad(tokens, (0, WIDTH - total), constant_values=7))
                for name in ("prompt_len", "total_len", "example_id"):
                    alone[name].append(batch[name][row, place])
    return {name: np.asarray(rows, np.int32) for name, rows in alone.items()}


PACKED = packed_batch()
BATCHES = {"packed": PACKED, "alone": alone_batch(PACKED)}


@functools.partial(jax.jit, static_argnames="config")
def noise(batch, config: DiffusionConfig) -> tuple[Draw, Noised]:
    lengths = batch["prompt_len"], batch["total_len"]
    most = config.max_slots(WIDTH, lengths[0][0].size)
    drawn = diffusion.draw(KEY, batch["example_id"], lengths[1] - lengths[0], most, config)
    return drawn, diffusion.rearrange(batch["tokens"], *lengths, drawn, MASK, config)


def plain_example(tokens: list[int], prompt: int, size: int, masked, rank, in_order: bool):
    """One example as (token fed, position, label or None, kind of label or None), in fed order."""
    total = len(tokens)
    if in_order:
        labels = [tokens[i + 1] if i + 1 < total and i + 1 >= max(prompt, 1) else None for i in range(total)]
        return [(tokens[i], i, label, label is not None and "ar") for i, label in enumerate(labels)]
    slots = [list(range(begin, min(begin + size, total))) for begin in range(prompt, total, size)]
    rows = [(tokens[i], i, None, False) for i in range(prompt)]
    for m in sorted((m for m in range(len(slots)) if not masked[m]), key=lambda m: rank[m]):
        *body, last = slots[m]
        rows += [(tokens[i], i, tokens[i + 1], "ar") for i in body] + [(tokens[last], last, None, False)]
    for m in (m for m in range(len(slots)) if masked[m]):
        rows += [(MASK, i, tokens[i], "diffusion") for i in slots[m]]
    return rows


def plain_rows(batch, drawn: Draw):
    """Per row, its examples as (plain_example, response length, p, whether it is in order)."""
    count = len(batch["tokens"])
    prompts, totals, sizes, p, in_order = (
        np.reshape(x, (count, -1))
        for x in (
            batch["prompt_len"],
            batch["total_len"],
            drawn.slot_size,
            drawn.mask_probability,
            drawn.in_order,
        )
    )
    rows = []
    for row in range(count):
        start = slot = 0
        examples = []
        for place, total in enumerate(totals[row]):
            prompt, size = prompts[row, place], sizes[row, place]
            example = plain_example(
                batch["tokens"][row, start : start + total].tolist(),
                prompt,
                size,
                drawn.slot_masked[row, slot:],
                drawn.slot_rank[row, slot:],
                in_order[row, place],
            )
            examples.append((example, total - prompt, p[row, place], in_order[row, place]))
            start, slot = start + total, slot + -(-(total - prompt) // size)
        rows.append(examples)
    return rows
