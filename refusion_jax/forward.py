"""One forward pass over what the rows of a batch feed, no larger than it has to be.

A pass is compiled for a few sizes, and each takes the smallest that holds the tokens fed (`lax.switch`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from refusion_jax.feed import SMALLEST_PASS, Fed
from refusion_jax.kv_cache import KVCache
from refusion_jax.requests import Requests
from refusion_jax.rows import Phase, Row
from refusion_jax.scores import Heat, Scores, score

Array = jax.Array
MOST_SIZES = 4


class Forwarded(NamedTuple):
    """What a pass gives: scores [B, Q], and the keys and values of the tokens fed."""

    scores: Scores
    fresh: tuple


def forward(model, params, cache: KVCache, fed: Fed, row: Row, requests: Requests) -> Forwarded:
    """Feeds what the rows feed, [B, Q], after the cache."""
    Q, length = fed.tokens.shape[1], cache.filled.shape[1]
    heats = jax.vmap(heat)(row, requests, fed)

    def widen(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, Q - x.shape[1]), *((0, 0),) * (x.ndim - 2)))

    def pass_of(size: int):
        def run() -> Forwarded:
            part = jax.tree.map(lambda x: x[:, :size], (fed.tokens, fed.positions, fed.target, heats))
            tokens, positions, target, hot = part
            mask = fed.mask[:, :size, : length + size]
            logits, fresh = model.apply({"params": params}, tokens, positions, cache.layers, mask)
            scores = score_rows(logits, target, hot)
            return Forwarded(*jax.tree.map(widen, (scores, fresh)))

        return run

    sizes = pass_sizes(Q)
    if len(sizes) == 1:
        return pass_of(Q)()
    needed = jnp.max(jnp.sum(fed.active, axis=1))
    return jax.lax.switch(jnp.sum(needed > jnp.asarray(sizes[:-1])), [pass_of(size) for size in sizes])


def pass_sizes(most: int) -> list[int]:
    """The numbers of tokens that a pass is compiled for, ascending."""
    sizes = [most]
    while len(sizes) < MOST_SIZES and sizes[0] % 2 == 0 and sizes[0] // 2 >= SMALLEST_PASS:
        sizes.insert(0, sizes[0] // 2)
    return sizes


def heat(row: Row, request: Requests, fed: Fed) -> Heat:
    """How a row drafts what it fed [Q]: plans at its temperature, all else greedily."""
    # A plan fed ahead is that of the next iteration.
    iteration = row.iterations + (row.phase != Phase.PLAN)
    return Heat(
        temperature=jnp.where(fed.plan, request.temperature, 0.0),
        seed=jnp.broadcast_to(request.seed, fed.tokens.shape),
        iteration=jnp.broadcast_to(iteration, fed.tokens.shape),
        place=fed.positions - request.prompt_len,
    )


def score_rows(logits: Array, target: Array, heats: Heat) -> Scores:
    """`score` of logits [B, Q, V], target and heats [B, Q]: [B, Q]."""
    flat = jax.tree.map(lambda x: x.reshape(-1), (target, heats))
    scores = score(logits.reshape(-1, logits.shape[-1]), *flat)
    return jax.tree.map(lambda x: x.reshape(target.shape), scores)
