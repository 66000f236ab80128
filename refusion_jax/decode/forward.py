"""One forward pass over the tokens that the rows of a batch feed, at the smallest compiled size that fits.

A pass is compiled for a few numbers of tokens; `lax.switch` picks the smallest that holds the tokens fed.

Letters as in model/transformer.py; Q is the padded number of tokens fed per row, S the cache length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from refusion_jax.decode.batch import Shape
from refusion_jax.decode.inputs import SMALLEST_PASS
from refusion_jax.decode.kv_cache import KVCache
from refusion_jax.decode.scores import DraftSampling, Scores, score
from refusion_jax.decode.tokens_fed import TokensFed
from refusion_jax.model.attention import LayerKV
from refusion_jax.model.layers import Ragged

Array = jax.Array


class Forwarded(NamedTuple):
    """The result of a pass.

    Attributes:
      scores: arrays [B, Q].
      fresh: keys and values of the tokens fed: each [L, B, Q, K, H], or [L, 1, B * Q, K, H] if `ragged`.
      ragged: the layout of tokens one row after the other, or None for the layout [B, Q].
    """

    scores: Scores
    fresh: LayerKV
    ragged: Ragged | None

    def write(self, cache: KVCache, positions: Array, keep: Array) -> KVCache:
        """The cache with the fresh keys and values where `keep` bool [B, Q] is set, at positions [B, Q]."""
        return write_fed(cache, self.fresh, self.ragged, positions, keep)


def write_fed(
    cache: KVCache, fresh: LayerKV, ragged: Ragged | None, positions: Array, keep: Array
) -> KVCache:
    """The cache with the keys and values of some of the tokens fed.

    Args:
      fresh, ragged: as in Forwarded.
      positions: int32 [B, Q], the position of each token in the text.
      keep: bool [B, Q], the tokens whose keys and values are written.
    """
    if ragged is None:
        return cache.write(fresh, positions, keep)
    positions, keep = (x.at[ragged.row, ragged.place].get(mode="clip")[None] for x in (positions, keep))
    return cache.write(fresh, positions, keep, ragged.row[None])


def forward(model, params, cache: KVCache, fed: TokensFed, shape: Shape) -> Forwarded:
    """Feeds tokens [B, Q] after the cache.

    The tokens of several rows are laid out one after the other (Ragged), so that the padding of a row to Q
    costs nothing.

    Args:
      shape: the padded sizes; says whether to compute `Scores.entropy`.
    """
    B = fed.tokens.shape[0]
    ragged, fed_flat = None, (fed.tokens, fed.positions, fed.target, fed.sampling)
    if B > 1:
        ragged = ragged_layout(fed.active)
        fed_flat = jax.tree.map(lambda x: x.at[ragged.row, ragged.place].get(mode="clip")[None], fed_flat)
    capacity, length = fed_flat[0].shape[1], cache.filled.shape[1]

    def pass_of(size: int):
        """A pass over the first `size` tokens, its results padded to `capacity`."""

        def run() -> tuple[Scores, LayerKV]:
            tokens, positions, target, samplings = jax.tree.map(lambda x: x[:, :size], fed_flat)
            part = None if ragged is None else Ragged(ragged.flat, ragged.row[:size], ragged.place[:size])
            mask = fed.mask if ragged is not None else fed.mask[:, :size, : length + size]
            logits, fresh = model.apply(
                {"params": params}, tokens, positions, cache.layers, mask, ragged=part
            )
            scores = score_rows(logits, target, samplings, shape.entropy, model.dtype)
            return (
                jax.tree.map(lambda x: padded_to(x, 1, capacity), scores),
                jax.tree.map(lambda x: padded_to(x, 2, capacity), fresh),
            )

        return run

    # The more rows, the less the total number of tokens varies, so few sizes are enough, unless rows choose
    # how many tokens they feed.
    fewest = capacity // (8 if shape.frugal else 4)
    sizes = pass_sizes(capacity, SMALLEST_PASS if B == 1 else max(SMALLEST_PASS, fewest))
    size_index = jnp.sum(jnp.sum(fed.active) > jnp.asarray(sizes[:-1]))
    scores, fresh = jax.lax.switch(size_index, [pass_of(size) for size in sizes])
    if ragged is not None:
        scores = jax.tree.map(lambda x: x[0].at[ragged.flat].get(mode="fill", fill_value=0), scores)
    return Forwarded(scores, fresh, ragged)


def ragged_layout(active: Array) -> Ragged:
    """The layout of the active tokens, bool [B, Q], one row after the other; N = B * Q.

    Entries of `Ragged.row` behind the last token are B. That row does not exist, so writes to it are dropped.
    """
    (B, Q), flags = active.shape, active.reshape(-1)
    flat = jnp.where(flags, jnp.cumsum(flags) - 1, flags.size)
    source = jnp.full(flags.size, flags.size, jnp.int32).at[flat].set(jnp.arange(flags.size), mode="drop")
    return Ragged(flat.reshape(B, Q), *jnp.divmod(source, Q))


def padded_to(x: Array, axis: int, size: int) -> Array:
    """x padded with zeros at the end of `axis` to `size` entries."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def pass_sizes(most: int, least: int) -> list[int]:
    """The numbers of tokens that a pass is compiled for, ascending: `most`, halved down to `least`."""
    sizes = [most]
    while sizes[0] % 2 == 0 and sizes[0] // 2 >= least:
        sizes.insert(0, sizes[0] // 2)
    return sizes


def score_rows(logits: Array, target: Array, samplings: DraftSampling, entropy: bool, dtype) -> Scores:
    """`score` for a batch: logits [B, Q, V], target and samplings [B, Q] -> Scores [B, Q]."""
    flat = jax.tree.map(lambda x: x.reshape(-1), (target, samplings))
    scores = score(logits.reshape(-1, logits.shape[-1]), *flat, entropy, dtype)
    return jax.tree.map(lambda x: x.reshape(target.shape), scores)
