"""Attention: the dense reference, and the kernels that training uses instead.

Einsum letters as in model.py. Everything is causal in the order in which tokens are fed.
"""

import jax
import jax.numpy as jnp

Array = jax.Array
LayerKV = tuple[Array, Array]  # keys (after norm and RoPE) and values, each [B, S, K, H]

KERNELS = ("dense", "cudnn")


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


def fitting_kernel(platform: str, dtype: jnp.dtype, head_dim: int) -> str:
    """The fastest of KERNELS for a pass without a cache on devices of that platform ("gpu", "tpu", "cpu")."""
    if platform == "gpu" and dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 256:
        return "cudnn"
    return "dense"


def attend_fed(q: Array, fresh: LayerKV, segments: Array | None, kernel: str, max_segments: int = 1) -> Array:
    """Causal attention among the tokens fed.

    Args:
      q: [B, T, N, H].
      fresh: keys and values of the same T tokens, [B, T, K, H].
      segments: int32 [B, T], ascending from 0: a token sees those of its own segment alone. None is one
        segment.
      kernel: one of KERNELS.
      max_segments: more than the largest entry of `segments`.

    Returns:
      [B, T, N, H].
    """
    if kernel == "cudnn":
        return _cudnn(q, fresh, segments, max_segments)
    assert kernel == "dense", kernel
    if segments is None:
        return attend(q, fresh, None, None)
    T = q.shape[1]
    causal = jnp.tril(jnp.ones((T, T), bool))
    return attend(q, fresh, None, causal & (segments[:, :, None] == segments[:, None, :]))


def _cudnn(q: Array, fresh: LayerKV, segments: Array | None, max_segments: int) -> Array:
    """cuDNN's flash attention. Segments are laid out one after the other, so none attends to another."""
    if segments is None:
        return jax.nn.dot_product_attention(q, *fresh, is_causal=True, implementation="cudnn")
    # jax.nn has no argument for segments yet; the function below it does.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    lengths = jnp.sum(segments[:, None] == jnp.arange(max_segments)[:, None], axis=2, dtype=jnp.int32)
    begins = jnp.cumsum(lengths, axis=1, dtype=jnp.int32) - lengths
    there = lengths > 0
    lengths = jnp.where(there, lengths, -1)
    # One entry more than segments, never there: cuDNN takes it from the next row, or the end.
    offsets = jnp.pad(jnp.where(there, begins, -1), ((0, 0), (0, 1)), constant_values=-1)
    return dot_product_attention(
        q,
        *fresh,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=q.shape[-1] ** -0.5,
        mask_type=MaskType.PADDING_CAUSAL,
    )
