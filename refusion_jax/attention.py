"""Attention: the dense reference, and the kernels that training uses instead.

Einsum letters as in model.py. Everything is causal in the order in which tokens are fed.
"""

import jax
import jax.numpy as jnp

Array = jax.Array
LayerKV = tuple[Array, Array]  # keys (after norm and RoPE) and values, each [B, S, K, H]

KERNELS = ("dense",)


def attend(q: Array, fresh: LayerKV, cache: LayerKV | None, mask: Array | None) -> Array:
    """Grouped-query attention to the cache and to the tokens fed along.

    Args:
      q: [B, T, N, H].
      fresh: keys and values of the same T tokens, [B, T, K, H].
      cache: keys and values [B, S, K, H], or None. It is read in place: scores over it and over the
        fresh tokens are computed apart and joined, so that the cache is never copied.
      mask: bool, broadcastable to [B, T, S + T], True where attention is allowed. None without a cache
        means causal in the order fed.

    Returns:
      [B, T, N, H]. Softmax in float32. A query that may see nothing gives a finite value of no meaning.
    """
    B, T, N, H = q.shape
    k, v = fresh
    q = q.reshape(B, T, k.shape[2], -1, H)
    if mask is None:
        if cache is not None:
            raise ValueError("attention to a cache needs a mask")
        mask = jnp.tril(jnp.ones((T, T), bool))[None]
    parts = [fresh] if cache is None else [cache, fresh]
    scores = [jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) for k, _ in parts]
    borders = [k.shape[1] for k, _ in parts[:-1]]
    scores = jnp.concatenate(scores, axis=-1) * H**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = jnp.split(weights, borders, axis=-1)
    out = sum(jnp.einsum("BKGTS,BSKH->BTKGH", w, v) for w, (_, v) in zip(weights, parts, strict=True))
    return out.reshape(B, T, N, H)


def attend_fed(q: Array, fresh: LayerKV, segments: Array | None, kernel: str) -> Array:
    """Causal attention among the tokens fed.

    Args:
      q: [B, T, N, H].
      fresh: keys and values of the same T tokens, [B, T, K, H].
      segments: int32 [B, T], ascending: a token sees those of its own segment alone. None is one segment.
      kernel: one of KERNELS.

    Returns:
      [B, T, N, H].
    """
    assert kernel in KERNELS, kernel
    if segments is None:
        return attend(q, fresh, None, None)
    T = q.shape[1]
    causal = jnp.tril(jnp.ones((T, T), bool))
    return attend(q, fresh, None, causal & (segments[:, :, None] == segments[:, None, :]))
