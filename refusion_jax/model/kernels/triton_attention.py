"""Attention of a decoding pass as one GPU kernel per layer (Pallas, Triton backend).

The kernel reads the cache in place, and only up to the last entry that some query of a tile sees. Scores
never leave the chip. Where rows and heads are too few to fill the chip, the keys are split among programs
and their partial results are combined afterwards (flash-decoding). The function is that of
`attention.attend`.

The project has its own kernel because no library reads a cache and the fresh tokens as two arrays under an
arbitrary mask: tokamax 0.0.17 and cuDNN take one array of keys, which would copy the cache in every layer.

JAX deprecates Pallas's Triton backend from 0.11 on; `kernel="dense"` is the alternative.

Letters as in model/transformer.py; visible.py explains tiles.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from refusion_jax.model.kernels.visible import KEYS, WORD, Visible, ceil_div, query_tile

Array = jax.Array

PROGRAMS = 128  # about the number of multiprocessors on the chip
HIDDEN = -1e30  # score of a masked key


def attend(
    qkv: Array, cache: tuple[Array, Array] | None, layer: Array | int, seen: Visible, *, interpret: bool
) -> Array:
    """Attention of every query to the cache and to the tokens fed.

    Args:
      qkv: [B, T, K, G + 2, H], for each key/value head its G queries, its key and its value, after norm and
        RoPE. H is a power of two.
      cache: keys and values, each [L, B, S, K, H], or None.
      layer: int32 scalar, index into L.
      seen: the packed mask.
      interpret: run the kernel in Pallas's interpreter, on any backend and slowly.

    Returns:
      [B, T, K, G, H], softmax in float32. The output of a query that sees nothing is finite and meaningless.
    """
    B, T, K, J, H = qkv.shape
    G = J - 2
    tokens, rows = query_tile(T, G)
    tiles = ceil_div(T, tokens)
    S = cache[0].shape[2] if cache else 0
    splits = max(1, min(ceil_div(S, KEYS) + ceil_div(T, KEYS), PROGRAMS // (B * K * tiles)))
    if splits == 1:
        out_shape = [jax.ShapeDtypeStruct((B, T, K, G, H), qkv.dtype)]
    else:
        parts = (splits, B, T, K, G)
        out_shape = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*parts, H), parts, parts)]
    operands = (seen.ends, seen.fresh, qkv)
    if cache:
        operands += (jnp.asarray(layer, jnp.int32)[None], seen.cache, seen.used, *cache)
    out = pl.pallas_call(
        functools.partial(_kernel, tokens=tokens, rows=rows, splits=splits, cached=cache is not None),
        grid=(splits, tiles, B * K),
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="attention",
    )(*operands)
    return out[0] if splits == 1 else _combine(*out).astype(qkv.dtype)


def _combine(parts: Array, highest: Array, total: Array) -> Array:
    """Combines the splits' partial softmax results.

    Args:
      parts: weighted sums of values, [splits, ..., H].
      highest: highest score of each split, [splits, ...].
      total: sum of weights of each split, [splits, ...].

    Returns:
      the softmax-weighted mean of the values, [..., H].
    """
    weight = jnp.exp2(highest - jnp.max(highest, axis=0))
    total = jnp.sum(total * weight, axis=0)
    return jnp.sum(parts * weight[..., None], axis=0) / jnp.maximum(total, 1e-30)[..., None]


def _kernel(ends, fresh_bits, qkv, *refs, tokens: int, rows: int, splits: int, cached: bool):
    """One tile of queries of one batch row and key/value head, over every `splits`-th tile of keys."""
    split, tile = pl.program_id(0), pl.program_id(1)
    _, T, K, J, H = qkv.shape
    G = J - 2
    b, head = jax.lax.div(pl.program_id(2), K), jax.lax.rem(pl.program_id(2), K)
    # Idle rows and tokens past the end repeat the last one, so they rewrite values that are already there.
    pair = jnp.minimum(jnp.arange(rows), tokens * G - 1)
    token = jnp.minimum(tile * tokens + jax.lax.div(pair, G), T - 1)
    group = jax.lax.rem(pair, G)
    q = qkv[b, token, head, group, :]
    key = jnp.arange(KEYS)

    def bit(words: list[Array]) -> Array:
        """The mask bits of KEYS keys, bool [..., KEYS], from their words [..., 1]."""
        word = words[0]
        for i in range(1, len(words)):
            word = jnp.where(jax.lax.div(key, WORD) == i, words[i], word)
        return ((word >> jax.lax.rem(key, WORD)) & 1) != 0

    def add(carry, k: Array, v: Array, bits, j: Array):
        """Adds tile j of keys to the running softmax."""
        total, highest, mean = carry
        first = j * (KEYS // WORD)
        may_see = bit([bits[b, token, first + i][:, None] for i in range(KEYS // WORD)])
        scores = jnp.where(may_see, plgpu.dot(q, k.T) * (H**-0.5 * math.log2(math.e)), HIDDEN)
        higher = jnp.maximum(highest, jnp.max(scores, axis=1))
        weights, kept = jnp.exp2(scores - higher[:, None]), jnp.exp2(highest - higher)
        mean = mean * kept[:, None] + plgpu.dot(weights.astype(v.dtype), v)
        return total * kept + jnp.sum(weights, axis=1), higher, mean

    carry = jnp.zeros(rows), jnp.full(rows, HIDDEN), jnp.zeros((rows, H))
    first = split  # splits take tiles in turn: tiles of the cache first, then tiles of the tokens fed
    if cached:
        layer, cache_bits, used, keys, values, *refs = refs
        at, count = layer[0], ends[b, tile, 0]

        def from_cache(i, carry):
            j = split + i * splits
            place = jnp.minimum(j * KEYS + key, keys.shape[2] - 1)
            good = bit([used[b, j * (KEYS // WORD) + i] for i in range(KEYS // WORD)])
            # Uncommitted entries may hold NaN, and 0 times NaN is NaN.
            v = jnp.where(good[:, None], values[at, b, place, head, :], 0).astype(values.dtype)
            return add(carry, keys[at, b, place, head, :], v, cache_bits, j)

        carry = jax.lax.fori_loop(0, jax.lax.div(count - split + splits - 1, splits), from_cache, carry)
        first = jax.lax.rem(split + splits - jax.lax.rem(count, splits), splits)

    def from_fresh(i, carry):
        j = first + i * splits
        place = jnp.minimum(j * KEYS + key, T - 1)
        return add(carry, qkv[b, place, head, G, :], qkv[b, place, head, G + 1, :], fresh_bits, j)

    rounds = jax.lax.div(ends[b, tile, 1] - first + splits - 1, splits)
    total, highest, mean = jax.lax.fori_loop(0, rounds, from_fresh, carry)
    if splits == 1:
        (out,) = refs
        out[b, token, head, group, :] = (mean / jnp.maximum(total, 1e-30)[:, None]).astype(out.dtype)
        return
    for out, part in zip(refs, (mean, highest, total), strict=True):
        at_rows = (split, b, token, head, group)
        out[(*at_rows, slice(None)) if part.ndim == 2 else at_rows] = part
