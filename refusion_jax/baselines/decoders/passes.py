"""One forward pass over the tokens that the rows of a batch feed, and the hidden states of their blocks.

The counterpart of decode/forward.py for methods that need logits of the current block only. B rows, Q tokens
fed per row, S cache length, T block length, all padded; D is the model's width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from refusion_jax.baselines.decoders.blocks import BlockState, commit
from refusion_jax.decode.forward import padded_to, ragged_layout, write_fed
from refusion_jax.decode.kv_cache import KVCache
from refusion_jax.model.attention import LayerKV
from refusion_jax.model.layers import Ragged

Array = jax.Array


class BlockInputs(NamedTuple):
    """The tokens that each row feeds.

    Attributes:
      tokens, positions: int32 [B, Q].
      active: bool [B, Q], the entries that hold a token.
      mask: bool [B, Q or 1, S + Q], the cache entries and the fed tokens that each token sees; without a
        cache [B, Q or 1, Q].
      block: int32 [B, T], the entries of the current block's tokens; arbitrary for the padding of a block.
    """

    tokens: Array
    positions: Array
    active: Array
    mask: Array
    block: Array


class Passed(NamedTuple):
    """The result of a pass.

    Attributes:
      states: [B, T, D], the final hidden states of the current block's tokens.
      fresh: keys and values of the tokens fed, as in decode.forward.Forwarded; None if not asked for.
      ragged: the layout of tokens one row after the other, or None for the layout [B, Q].
    """

    states: Array
    fresh: LayerKV | None
    ragged: Ragged | None

    def commit(self, cache: KVCache, positions: Array, keep: Array) -> KVCache:
        """The cache with the fresh keys and values where `keep` bool [B, Q] is set, at positions [B, Q]."""
        return write_fed(cache, self.fresh, self.ragged, positions, keep).fill(positions, keep)


def padded_pass(model, params, fed: BlockInputs) -> Passed:
    """A pass over all Q entries of every row, without a cache: the first pass of a batch."""
    x, fresh = model.apply({"params": params}, fed.tokens, fed.positions, None, fed.mask, method="hidden")
    return Passed(jnp.take_along_axis(x, fed.block[:, :, None], axis=1, mode="clip"), fresh, None)


def sized_pass(
    model, params, cache: KVCache | None, fed: BlockInputs, sizes: Sequence[int], *, keep: bool
) -> Passed:
    """A pass at the smallest compiled size that holds the tokens fed.

    The tokens of several rows are laid out one after the other (Ragged).

    Args:
      cache: the cache that the first S columns of `fed.mask` refer to, or None.
      sizes: the numbers of tokens to compile for, ascending; the last is B * Q.
      keep: whether to return keys and values.
    """
    B = fed.tokens.shape[0]
    ragged, flat, layers = None, (fed.tokens, fed.positions), None if cache is None else cache.layers
    if B > 1:
        ragged = ragged_layout(fed.active)
        flat = jax.tree.map(lambda x: x.at[ragged.row, ragged.place].get(mode="clip")[None], flat)
    length = fed.mask.shape[2] - fed.tokens.shape[1]

    def pass_of(size: int):
        def run() -> tuple[Array, LayerKV | None]:
            tokens, positions = (x[:, :size] for x in flat)
            if ragged is None:
                part, mask = None, fed.mask[:, :size, : length + size]
            else:
                part, mask = Ragged(ragged.flat, ragged.row[:size], ragged.place[:size]), fed.mask
            x, fresh = model.apply(
                {"params": params}, tokens, positions, layers, mask, ragged=part, method="hidden"
            )
            at = (
                fed.block
                if ragged is None
                else jnp.take_along_axis(ragged.flat, fed.block, axis=1, mode="clip")
            )
            states = x[0].at[at].get(mode="clip")
            if not keep:
                return states, None
            return states, jax.tree.map(lambda x: padded_to(x, 2, sizes[-1]), fresh)

        return run

    size_index = jnp.sum(jnp.sum(fed.active) > jnp.asarray(sizes[:-1], jnp.int32))
    states, fresh = jax.lax.switch(size_index, [pass_of(size) for size in sizes])
    return Passed(states, fresh, ragged)


def quarters(most: int) -> list[int]:
    """Pass sizes, ascending: a quarter, a half, three quarters and all of `most` tokens, rounded up."""
    return sorted({-(-most * part // 4) for part in (1, 2, 3, 4)})


def read_block(model, params, state: BlockState, states: Array, mask_id: Array, eos_ids: Array) -> BlockState:
    """The state after a pass with the final hidden states [B, T, D]: unembeds them and commits tokens."""
    return commit(state, model.apply({"params": params}, states, method="unembed"), mask_id, eos_ids)
