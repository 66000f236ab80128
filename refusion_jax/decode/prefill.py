"""Feeds prompts: whole, or in chunks where they are long, so that a pass needs memory for a chunk alone.

Letters as in model/transformer.py; P is the padded prompt length, S the cache length.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from refusion_jax.decode.kv_cache import KVCache
from refusion_jax.model.attention import LayerKV

Array = jax.Array


class Prefilled(NamedTuple):
    """The result of feeding prompts.

    Attributes:
      cache: with the keys and values of the prompts.
      last: final states of the last prompt tokens, [B, D].
      x: final states of the tokens after the prompts, [B, T, D].
      fresh: keys and values of the tokens after the prompts, each [L, B, T, K, H].
    """

    cache: KVCache
    last: Array
    x: Array
    fresh: LayerKV


def feed_prompts(
    model,
    params,
    cache: KVCache,
    prompts: Array,
    lengths: Array,
    tokens: Array,
    positions: Array,
    mask: Array,
    chunk: int,
) -> Prefilled:
    """Feeds the prompts and, in the pass over their last tokens, T tokens that follow them.

    Prompts padded to more than `chunk` tokens take several passes; those before the last are left out where
    no row has a token for them.

    Args:
      cache: empty.
      prompts: int32 [B, P].
      lengths: int32 [B], the tokens of each prompt.
      tokens, positions: int32 [B, T], the tokens after the prompts. Each sees the whole prompt of its row.
      mask: bool [B, T, T], what they see of each other.
      chunk: the most prompt tokens per pass and row.
    """
    B, P = prompts.shape
    in_chunks = max(P - 1, 0) // chunk * chunk
    last = jnp.zeros((B, model.config.embed_dim), model.dtype)
    if in_chunks:
        cache, last = _feed_chunks(model, params, cache, prompts[:, :in_chunks], lengths, last, chunk)
    places = jnp.broadcast_to(jnp.arange(in_chunks, P), (B, P - in_chunks))
    real = places < lengths[:, None]
    rest, T = places.shape[1], tokens.shape[1]
    causal = jnp.tril(jnp.ones((rest, rest), bool)) & real[:, None]
    to_prompt = jnp.concatenate([causal, jnp.broadcast_to(real[:, None], (B, T, rest))], axis=1)
    to_tokens = jnp.concatenate([jnp.zeros((B, rest, T), bool), mask], axis=1)
    seen = [to_prompt, to_tokens]
    if in_chunks:
        seen.insert(0, _to_cache(cache, rest + T))
    x, fresh = model.apply(
        {"params": params},
        jnp.concatenate([prompts[:, in_chunks:], tokens], axis=1),
        jnp.concatenate([places, positions], axis=1),
        cache.layers if in_chunks else None,
        jnp.concatenate(seen, axis=2),
        method="hidden",
    )
    of_prompt = jax.tree.map(lambda kv: kv[:, :, :rest], fresh)
    return Prefilled(
        cache.commit(of_prompt, places, real),
        _last_states(last, x[:, :rest], lengths, in_chunks),
        x[:, rest:],
        jax.tree.map(lambda kv: kv[:, :, rest:], fresh),
    )


def _feed_chunks(
    model, params, cache: KVCache, prompts: Array, lengths: Array, last: Array, chunk: int
) -> tuple[KVCache, Array]:
    """`cache` and `last` after the prompts, whose padded length is a multiple of `chunk`, were fed."""
    B, in_chunks = prompts.shape
    causal = jnp.tril(jnp.ones((chunk, chunk), bool))

    def feed(number: Array, carry: tuple[KVCache, Array]) -> tuple[KVCache, Array]:
        cache, last = carry
        start = number * chunk
        places = jnp.broadcast_to(start + jnp.arange(chunk), (B, chunk))
        real = places < lengths[:, None]
        x, fresh = model.apply(
            {"params": params},
            jax.lax.dynamic_slice_in_dim(prompts, start, chunk, axis=1),
            places,
            cache.layers,
            jnp.concatenate([_to_cache(cache, chunk), causal & real[:, None]], axis=2),
            method="hidden",
        )
        return cache.commit(fresh, places, real), _last_states(last, x, lengths, start)

    chunks = jnp.minimum(-(-jnp.max(lengths) // chunk), in_chunks // chunk)
    return jax.lax.fori_loop(0, chunks, feed, (cache, last))


def _to_cache(cache: KVCache, queries: int) -> Array:
    """bool [B, queries, S]: each query sees every filled entry of its row."""
    B, S = cache.filled.shape
    return jnp.broadcast_to(cache.filled[:, None], (B, queries, S))


def _last_states(last: Array, x: Array, lengths: Array, start: Any) -> Array:
    """`last` with the states of the prompts' last tokens, where these are among the tokens from `start` on.

    Args:
      x: the final states of those tokens, [B, T, D].
    """
    if x.shape[1] == 0:
        return last
    place = lengths - 1 - start
    found = jnp.take_along_axis(x, jnp.clip(place, 0, x.shape[1] - 1)[:, None, None], axis=1)[:, 0]
    return jnp.where(((place >= 0) & (place < x.shape[1]))[:, None], found, last)
