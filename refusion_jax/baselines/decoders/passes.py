"""One forward pass over what the rows of a batch feed, and the states of their blocks.

Like forward.py, for methods that read their blocks' tokens alone. B, Q, S, T as there.
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
    """What each row feeds, from its first place on without gaps.

    Attributes:
      tokens, positions: int32 [B, Q].
      active: bool [B, Q], the places that are fed.
      mask: bool [B, Q or 1, S + Q], what each may see of the cache and of the tokens fed; without a cache
        [B, Q or 1, Q].
      block: int32 [B, T], the places of the current block's tokens; any for a token that is none.
    """

    tokens: Array
    positions: Array
    active: Array
    mask: Array
    block: Array


class Passed(NamedTuple):
    """What a pass gives.

    Attributes:
      states: [B, T, D], final states of the current block's tokens.
      fresh: keys and values of the tokens fed, as in forward.Forwarded; None where they were not asked for.
      ragged: how the tokens were laid out, if not by row.
    """

    states: Array
    fresh: LayerKV | None
    ragged: Ragged | None

    def commit(self, cache: KVCache, positions: Array, keep: Array) -> KVCache:
        """The cache with some of the fresh keys and values to be seen; positions and keep [B, Q]."""
        return write_fed(cache, self.fresh, self.ragged, positions, keep).fill(positions, keep)


def padded_pass(model, params, fed: BlockInputs) -> Passed:
    """A pass over all Q places of every row, without a cache: the first of a batch."""
    x, fresh = model.apply({"params": params}, fed.tokens, fed.positions, None, fed.mask, method="hidden")
    return Passed(jnp.take_along_axis(x, fed.block[:, :, None], axis=1, mode="clip"), fresh, None)


def sized_pass(
    model, params, cache: KVCache | None, fed: BlockInputs, sizes: Sequence[int], *, keep: bool
) -> Passed:
    """A pass no larger than it has to be; of several rows what is fed is laid out one after the other.

    Args:
      cache: what `fed.mask` begins with, or None.
      sizes: numbers of tokens to compile for, ascending, the last B x Q.
      keep: whether keys and values are asked for.
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

    number = jnp.sum(jnp.sum(fed.active) > jnp.asarray(sizes[:-1], jnp.int32))
    states, fresh = jax.lax.switch(number, [pass_of(size) for size in sizes])
    return Passed(states, fresh, ragged)


def quarters(most: int) -> list[int]:
    """A quarter, a half, three quarters and all of `most` tokens, rounded up."""
    return sorted({-(-most * part // 4) for part in (1, 2, 3, 4)})


def read_block(model, params, state: BlockState, states: Array, mask_id: Array, eos_id: Array) -> BlockState:
    """Every row after a pass that gave its block the final states [B, T, D]."""
    return commit(state, model.apply({"params": params}, states, method="unembed"), mask_id, eos_id)
