"""Attention of a decoding pass as one GPU kernel a layer (Pallas, Triton backend).

The cache is read in place, and only as far as some query of a tile may see; scores never leave the chip.
Where rows and heads are too few to fill the chip the keys are split among programs, whose parts are then
joined (flash-decoding). `attention.attend` says what is computed.

Own code, because no library reads a cache and the tokens fed along as two arrays under any mask: tokamax
(0.0.17) wants one array of keys, which would copy the cache in every layer; cuDNN the same.

Pallas deprecates its Triton backend from JAX 0.11 on; without it `kernel="dense"` is the way.

Letters as in model.py. A tile is what a program holds at once: `rows` pairs of (token, query head of one
key/value head), or KEYS keys.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from refusion_jax.model.kernels.visible import KEYS, WORD, Visible, tile

Array = jax.Array

PROGRAMS = 128  # about as many as the chip has multiprocessors
HIDDEN = -1e30  # the score of a key that may not be seen


def attend(
    qkv: Array, cache: tuple[Array, Array] | None, layer: Array | int, seen: Visible, *, interpret: bool
) -> Array:
    """Attention of every query to the cache and to the tokens fed.

    Args:
      qkv: [B, T, K, G + 2, H], of each key/value head its G queries, its key and its value, ready for the
        product (after norm and RoPE). H is a power of two.
      cache: keys and values [L, B, S, K, H], or None.
      layer: int32 scalar, which of the L.
      seen: what may be seen.
      interpret: run on any backend, slowly.

    Returns:
      [B, T, K, G, H]. Softmax in float32. A query that may see nothing gives a finite value of no meaning.
    """
    B, T, K, J, H = qkv.shape
    G = J - 2
    tokens, rows = tile(T, G)
    tiles = pl.cdiv(T, tokens)
    S = cache[0].shape[2] if cache else 0
    splits = max(1, min(pl.cdiv(S, KEYS) + pl.cdiv(T, KEYS), PROGRAMS // (B * K * tiles)))
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
    return out[0] if splits == 1 else _join(*out).astype(qkv.dtype)


def _join(parts: Array, highest: Array, total: Array) -> Array:
    """The splits' weighted sums of values [splits, ..., H] as one, by their highest scores and weights."""
    weight = jnp.exp2(highest - jnp.max(highest, axis=0))
    total = jnp.sum(total * weight, axis=0)
    return jnp.sum(parts * weight[..., None], axis=0) / jnp.maximum(total, 1e-30)[..., None]


def _kernel(ends, fresh_bits, qkv, *refs, tokens: int, rows: int, splits: int, cached: bool):
    """One tile of queries of one row of the batch and key/value head, over every `splits`-th tile of keys."""
    split, tile = pl.program_id(0), pl.program_id(1)
    _, T, K, J, H = qkv.shape
    G = J - 2
    b, head = jax.lax.div(pl.program_id(2), K), jax.lax.rem(pl.program_id(2), K)
    # Idle rows and tokens past the end repeat the last one: what they write is written already.
    pair = jnp.minimum(jnp.arange(rows), tokens * G - 1)
    token = jnp.minimum(tile * tokens + jax.lax.div(pair, G), T - 1)
    group = jax.lax.rem(pair, G)
    q = qkv[b, token, head, group, :]
    key = jnp.arange(KEYS)

    def bit(words: list[Array]) -> Array:
        """The bits of KEYS keys as bool [..., KEYS], from their words [..., 1]."""
        word = words[0]
        for i in range(1, len(words)):
            word = jnp.where(jax.lax.div(key, WORD) == i, words[i], word)
        return ((word >> jax.lax.rem(key, WORD)) & 1) != 0

    def add(carry, k: Array, v: Array, bits, j: Array):
        """Adds tile j of keys to the softmax so far."""
        total, highest, mean = carry
        first = j * (KEYS // WORD)
        may_see = bit([bits[b, token, first + i][:, None] for i in range(KEYS // WORD)])
        scores = jnp.where(may_see, plgpu.dot(q, k.T) * (H**-0.5 * math.log2(math.e)), HIDDEN)
        higher = jnp.maximum(highest, jnp.max(scores, axis=1))
        weights, kept = jnp.exp2(scores - higher[:, None]), jnp.exp2(highest - higher)
        mean = mean * kept[:, None] + plgpu.dot(weights.astype(v.dtype), v)
        return total * kept + jnp.sum(weights, axis=1), higher, mean

    carry = jnp.zeros(rows), jnp.full(rows, HIDDEN), jnp.zeros((rows, H))
    first = split  # the tiles go round among the splits, those of the tokens fed after those of the cache
    if cached:
        layer, cache_bits, used, keys, values, *refs = refs
        at, count = layer[0], ends[b, tile, 0]

        def from_cache(i, carry):
            j = split + i * splits
            place = jnp.minimum(j * KEYS + key, keys.shape[2] - 1)
            good = bit([used[b, j * (KEYS // WORD) + i] for i in range(KEYS // WORD)])
            # A weight of 0 times what no one committed may be anything but 0.
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
