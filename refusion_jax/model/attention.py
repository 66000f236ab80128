"""Attention: the dense reference, and the kernels that training and decoding use instead.

Einsum letters as in model.py. Without a mask attention is causal in the order in which tokens are fed, or
of all tokens with all.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from refusion_jax.model.kernels.visible import Visible

Array = jax.Array
LayerKV = tuple[Array, Array]  # keys (after norm and RoPE) and values, each [B, S, K, H]

KERNELS = ("dense", "cudnn", "splash", "triton")

SPLASH_TILE = 128  # the kernel for TPUs takes whole tiles of so many tokens


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
        mask = fed_mask(T, None, causal=True)
    parts = [fresh] if cache is None else [cache, fresh]
    scores = [jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) for k, _ in parts]
    borders = [k.shape[1] for k, _ in parts[:-1]]
    scores = jnp.concatenate(scores, axis=-1) * H**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = jnp.split(weights, borders, axis=-1)
    out = sum(jnp.einsum("BKGTS,BSKH->BTKGH", w, v) for w, (_, v) in zip(weights, parts, strict=True))
    return out.reshape(B, T, N, H)


def fitting_kernel(platform: str, dtype: jnp.dtype, head_dim: int, length: int) -> str:
    """The fastest of KERNELS for training, a pass without a cache.

    Args:
      platform: of the devices, "gpu", "tpu" or "cpu".
      dtype: of queries, keys and values.
      head_dim: H.
      length: T.
    """
    if platform == "gpu" and dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 256:
        return "cudnn"
    whole_tiles = head_dim % 64 == 0 and length % SPLASH_TILE == 0
    if platform == "tpu" and dtype == jnp.bfloat16 and whole_tiles:
        return "splash"
    return "dense"


def fitting_decode_kernel(platform: str, dtype: jnp.dtype, head_dim: int) -> str:
    """The fastest of KERNELS for decoding; arguments as for `fitting_kernel`."""
    whole_tiles = head_dim >= 16 and head_dim & (head_dim - 1) == 0
    if platform == "gpu" and dtype in (jnp.bfloat16, jnp.float16) and whole_tiles:
        return "triton"
    return "dense"


def attend_visible(qkv: Array, cache: LayerKV | None, layer: Array | int | None, seen: Visible) -> Array:
    """`attend` by the kernel for decoding, on the rows and key/value heads that each device holds.

    Args:
      qkv: [B, T, K, G + 2, H]; cache: [L, B, S, K, H] twice, or None; layer, seen: as there.

    Returns:
      [B, T, K, G, H].
    """
    from refusion_jax.model.kernels import triton_attention  # loads Pallas' Triton backend

    # Where there is no GPU the kernel is interpreted, as tests do.
    kernel = functools.partial(triton_attention.attend, interpret=jax.default_backend() != "gpu")
    rules = nn.get_logical_axis_rules()
    if not rules:
        return kernel(qkv, cache, layer, seen)
    rows, heads = nn.logical_to_mesh_axes(("act_batch", "act_kv_heads"), rules)
    mesh = jax.sharding.get_abstract_mesh()
    axes = (rows,) if isinstance(rows, str) else rows or ()
    if qkv.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        rows = None  # too few rows to share out: each device takes them all
    of_rows = PartitionSpec(rows)
    by_head = PartitionSpec(rows, None, heads)
    of_cache = None if cache is None else (PartitionSpec(None, rows, None, heads),) * 2
    specs = (by_head, of_cache, PartitionSpec(), Visible(*[of_rows] * 4))
    mapped = jax.shard_map(kernel, in_specs=specs, out_specs=by_head, check_vma=False)
    return mapped(qkv, cache, jnp.int32(0) if layer is None else jnp.asarray(layer, jnp.int32), seen)


def fed_mask(length: int, segments: Array | None, causal: bool) -> Array:
    """Who sees whom among the tokens fed, bool [1 or B, T, T]; arguments as of `attend_fed`."""
    mask = jnp.ones((1, length, length), bool)
    if causal:
        mask = jnp.tril(mask)
    return mask if segments is None else mask & (segments[:, :, None] == segments[:, None, :])


def attend_fed(
    q: Array,
    fresh: LayerKV,
    segments: Array | None,
    kernel: str,
    max_segments: int = 1,
    causal: bool = True,
    mask: Array | None = None,
) -> Array:
    """Attention among the tokens fed.

    Args:
      q: [B, T, N, H].
      fresh: keys and values of the same T tokens, [B, T, K, H].
      segments: int32 [B, T], ascending from 0: a token sees those of its own segment alone. None is one
        segment.
      kernel: one of KERNELS.
      max_segments: more than the largest entry of `segments`.
      causal: a token sees none that are fed after it.
      mask: bool, broadcastable to [B, T, T]: says what a token sees in place of `segments` and `causal`.
        "splash" leaves it to the dense reference.

    Returns:
      [B, T, N, H].
    """
    if mask is not None:
        if kernel == "cudnn":
            return jax.nn.dot_product_attention(q, *fresh, mask=mask[:, None], implementation="cudnn")
        return attend(q, fresh, None, mask)
    if kernel == "cudnn":
        return _cudnn(q, fresh, segments, max_segments, causal)
    if kernel == "splash":
        from refusion_jax.model.kernels import splash_attention  # loads Pallas' TPU backend

        return splash_attention.attend(q, fresh, segments, causal)
    assert kernel == "dense", kernel
    return attend(q, fresh, None, fed_mask(q.shape[1], segments, causal))


def _cudnn(q: Array, fresh: LayerKV, segments: Array | None, max_segments: int, causal: bool) -> Array:
    """cuDNN's flash attention. Segments are laid out one after the other, so none attends to another."""
    if segments is None:
        return jax.nn.dot_product_attention(q, *fresh, is_causal=causal, implementation="cudnn")
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
        mask_type=MaskType.PADDING_CAUSAL if causal else MaskType.PADDING,
    )
