"""One forward pass over what the rows of a batch feed, no larger than it has to be.

A pass is compiled for a few sizes, and each takes the smallest that holds the tokens fed (`lax.switch`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from refusion_jax.decode.batch import Requests
from refusion_jax.decode.inputs import SMALLEST_PASS, PassInputs
from refusion_jax.decode.kv_cache import KVCache
from refusion_jax.decode.row_state import Phase, RowState
from refusion_jax.decode.scores import DraftSampling, Scores, score
from refusion_jax.model.attention import LayerKV
from refusion_jax.model.layers import Ragged

Array = jax.Array


class Forwarded(NamedTuple):
    """What a pass gives.

    Attributes:
      scores: [B, Q].
      fresh: keys and values of the tokens fed, [L, B, Q, K, H], or as `ragged` lays them out.
      ragged: how the tokens were laid out, if not by row.
    """

    scores: Scores
    fresh: LayerKV
    ragged: Ragged | None

    def write(self, cache: KVCache, positions: Array, keep: Array) -> KVCache:
        """The cache with some of the fresh keys and values; positions and keep [B, Q]."""
        return write_fed(cache, self.fresh, self.ragged, positions, keep)


def write_fed(
    cache: KVCache, fresh: LayerKV, ragged: Ragged | None, positions: Array, keep: Array
) -> KVCache:
    """The cache with some of the keys and values of the tokens fed.

    `fresh` and `ragged` as in Forwarded; positions and keep are [B, Q].
    """
    if ragged is None:
        return cache.write(fresh, positions, keep)
    positions, keep = (x.at[ragged.row, ragged.place].get(mode="clip")[None] for x in (positions, keep))
    return cache.write(fresh, positions, keep, ragged.row[None])


def forward(
    model, params, cache: KVCache, inputs: PassInputs, row: RowState, requests: Requests, entropy: bool
) -> Forwarded:
    """Feeds what the rows feed, [B, Q], after the cache; `entropy`: whether scores have that.

    The tokens of several rows are laid out one after the other (Ragged), so that what one row leaves out
    of its Q costs nothing.
    """
    B = inputs.tokens.shape[0]
    ragged, fed_flat = (
        None,
        (inputs.tokens, inputs.positions, inputs.target, jax.vmap(draft_sampling)(row, requests, inputs)),
    )
    if B > 1:
        ragged = ragged_layout(inputs.active)
        fed_flat = jax.tree.map(lambda x: x.at[ragged.row, ragged.place].get(mode="clip")[None], fed_flat)
    most, length = fed_flat[0].shape[1], cache.filled.shape[1]

    def pass_of(size: int):
        """A pass over the first `size` tokens, whose results are padded to `most`."""

        def run() -> tuple[Scores, LayerKV]:
            tokens, positions, target, samplings = jax.tree.map(lambda x: x[:, :size], fed_flat)
            part = None if ragged is None else Ragged(ragged.flat, ragged.row[:size], ragged.place[:size])
            mask = inputs.mask if ragged is not None else inputs.mask[:, :size, : length + size]
            logits, fresh = model.apply(
                {"params": params}, tokens, positions, cache.layers, mask, ragged=part
            )
            scores = score_rows(logits, target, samplings, entropy)
            return (
                jax.tree.map(lambda x: widened(x, 1, most), scores),
                jax.tree.map(lambda x: widened(x, 2, most), fresh),
            )

        return run

    # The more rows the less their sum varies.
    sizes = pass_sizes(most, SMALLEST_PASS if B == 1 else max(SMALLEST_PASS, most // 4))
    number = jnp.sum(jnp.sum(inputs.active) > jnp.asarray(sizes[:-1]))
    scores, fresh = jax.lax.switch(number, [pass_of(size) for size in sizes])
    if ragged is not None:
        scores = jax.tree.map(lambda x: x[0].at[ragged.flat].get(mode="fill", fill_value=0), scores)
    return Forwarded(scores, fresh, ragged)


def ragged_layout(active: Array) -> Ragged:
    """The layout of rows of which bool [B, Q] feed something, first those of the first row; N is B x Q.

    What lies behind the last token is of no row: B, which nothing is written to.
    """
    (B, Q), flags = active.shape, active.reshape(-1)
    flat = jnp.where(flags, jnp.cumsum(flags) - 1, flags.size)
    source = jnp.full(flags.size, flags.size, jnp.int32).at[flat].set(jnp.arange(flags.size), mode="drop")
    return Ragged(flat.reshape(B, Q), *jnp.divmod(source, Q))


def widened(x: Array, axis: int, size: int) -> Array:
    """x with zeros at the end of an axis, up to `size` entries."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def pass_sizes(most: int, least: int) -> list[int]:
    """The numbers of tokens that a pass is compiled for, ascending: `most` and its halves down to `least`."""
    sizes = [most]
    while sizes[0] % 2 == 0 and sizes[0] // 2 >= least:
        sizes.insert(0, sizes[0] // 2)
    return sizes


def draft_sampling(row: RowState, request: Requests, inputs: PassInputs) -> DraftSampling:
    """How a row drafts what it fed [Q]: plans at its temperature, all else greedily."""
    # A plan fed ahead is that of the next iteration.
    iteration = row.iterations + (row.phase != Phase.PLAN)
    return DraftSampling(
        temperature=jnp.where(inputs.plan, request.temperature, 0.0),
        seed=jnp.broadcast_to(request.seed, inputs.tokens.shape),
        iteration=jnp.broadcast_to(iteration, inputs.tokens.shape),
        place=inputs.positions - request.prompt_len,
    )


def score_rows(logits: Array, target: Array, samplings: DraftSampling, entropy: bool) -> Scores:
    """`score` of logits [B, Q, V], target and samplings [B, Q]: [B, Q]."""
    flat = jax.tree.map(lambda x: x.reshape(-1), (target, samplings))
    scores = score(logits.reshape(-1, logits.shape[-1]), *flat, entropy)
    return jax.tree.map(lambda x: x.reshape(target.shape), scores)
