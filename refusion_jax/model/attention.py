"""Attention: the dense reference, and the kernels that replace it in training and decoding.

Einsum letters as in model/transformer.py. Without a mask, attention is causal in the order in which tokens
are fed, or bidirectional. Each kernel's module is imported where the kernel is chosen, so a CPU loads no
Pallas.
"""

import dataclasses
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

# Tile sizes of the TPU kernel, in tokens: the largest that divides the length is used.
SPLASH_BLOCKS = (512, 256, 128)


def attend(q: Array, fresh: LayerKV, cache: LayerKV | None, mask: Array | None) -> Array:
    """Grouped-query attention to the cache and to the tokens fed in the same pass.

    Args:
      q: [B, T, N, H].
      fresh: keys and values of the same T tokens, each [B, T, K, H].
      cache: keys and values, each [B, S, K, H], or None. The cache is read in place: scores over it and
        over the fresh tokens are computed separately and concatenated, so the cache is never copied.
      mask: bool, broadcastable to [B, T, S + T], True where attention is allowed. None, only without a
        cache, means causal in the order fed.

    Returns:
      [B, T, N, H], softmax in float32. The output of a query that sees nothing is finite and meaningless.

    Raises:
      ValueError: there is a cache and no mask.
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
    """The fastest of KERNELS for training, where passes have no cache.

    Args:
      platform: platform of the devices, "gpu", "tpu" or "cpu".
      dtype: dtype of queries, keys and values.
      head_dim: H.
      length: T.
    """
    if platform == "gpu" and dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 256:
        return "cudnn"
    whole_tiles = head_dim % 64 == 0 and length % SPLASH_BLOCKS[-1] == 0
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
    """`attend` by the Triton kernel; each device runs it on the rows and key/value heads that it holds.

    Args:
      qkv: [B, T, K, G + 2, H], for each key/value head its G queries, its key and its value.
      cache: keys and values, each [L, B, S, K, H], or None.
      layer: int32 scalar, index into L; unused without a cache.
      seen: the packed mask.

    Returns:
      [B, T, K, G, H].
    """
    from refusion_jax.model.kernels import triton_attention  # loads Pallas's Triton backend

    # Without a GPU the kernel is interpreted, which tests use.
    kernel = functools.partial(triton_attention.attend, interpret=jax.default_backend() != "gpu")
    rules = nn.get_logical_axis_rules()
    if not rules:
        return kernel(qkv, cache, layer, seen)
    rows, heads = nn.logical_to_mesh_axes(("act_batch", "act_kv_heads"), rules)
    mesh = jax.sharding.get_abstract_mesh()
    axes = (rows,) if isinstance(rows, str) else rows or ()
    if qkv.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        rows = None  # the mesh does not divide the rows: each device takes them all
    of_rows = PartitionSpec(rows)
    by_head = PartitionSpec(rows, None, heads)
    of_cache = None if cache is None else (PartitionSpec(None, rows, None, heads),) * 2
    specs = (by_head, of_cache, PartitionSpec(), Visible(*[of_rows] * 4))
    mapped = jax.shard_map(kernel, in_specs=specs, out_specs=by_head, check_vma=False)
    return mapped(qkv, cache, jnp.int32(0) if layer is None else jnp.asarray(layer, jnp.int32), seen)


def fed_mask(length: int, segments: Array | None, causal: bool) -> Array:
    """Mask among the tokens fed, bool [1 or B, T, T], True where attention is allowed.

    Arguments as in `attend_fed`.
    """
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
      fresh: keys and values of the same T tokens, each [B, T, K, H].
      segments: int32 [B, T], ascending from 0: a token sees only tokens of its own segment. None means one
        segment.
      kernel: one of KERNELS except "triton".
      max_segments: upper bound of the number of segments per row.
      causal: whether a token sees no token that is fed after it.
      mask: bool, broadcastable to [B, T, T]; replaces `segments` and `causal`. With a mask "splash" falls
        back to the dense reference.

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
        return _splash(q, fresh, segments, causal)
    assert kernel == "dense", kernel
    return attend(q, fresh, None, fed_mask(q.shape[1], segments, causal))


def _cudnn(q: Array, fresh: LayerKV, segments: Array | None, max_segments: int, causal: bool) -> Array:
    """cuDNN's flash attention. Segments are contiguous; each is passed as a sequence of its own."""
    if segments is None:
        return jax.nn.dot_product_attention(q, *fresh, is_causal=causal, implementation="cudnn")
    # jax.nn has no argument for segments; the internal function that it calls has.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    lengths = jnp.sum(segments[:, None] == jnp.arange(max_segments)[:, None], axis=2, dtype=jnp.int32)
    begins = jnp.cumsum(lengths, axis=1, dtype=jnp.int32) - lengths
    present = lengths > 0
    lengths = jnp.where(present, lengths, -1)
    # One more offset than segments, marked absent: cuDNN reads it from the next row, or the end.
    offsets = jnp.pad(jnp.where(present, begins, -1), ((0, 0), (0, 1)), constant_values=-1)
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


def _splash(q: Array, fresh: LayerKV, segments: Array | None, causal: bool) -> Array:
    """`attend_fed` by the TPU kernel, which never forms T x T scores and skips fully masked tiles.

    T must be a multiple of the smallest of SPLASH_BLOCKS.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    B, T, N, H = q.shape
    k, v = fresh
    # The compiler cannot partition a kernel: each device calls it on the rows and heads that it holds under
    # the rules in scope. Without rules there is one device.
    rules = nn.get_logical_axis_rules()
    split, kv_split = (
        nn.logical_to_mesh_axes(("act_batch", "act_length", heads, None), rules)
        for heads in ("act_heads", "act_kv_heads")
    )
    if split != kv_split:  # too few key/value heads to split: one for each query head
        k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
    if segments is None:
        segments = jnp.zeros((B, T), jnp.int32)

    def local(q: Array, k: Array, v: Array, segments: Array) -> Array:
        kernel = _splash_kernel(q.shape[2], T, causal)
        q, k, v = (x.swapaxes(1, 2) for x in (q * H**-0.5, k, v))
        return jax.vmap(kernel)(q, k, v, SegmentIds(segments, segments)).swapaxes(1, 2)

    if not rules:
        return local(q, k, v, segments)
    specs = (split, split, split, PartitionSpec(*split[:2]))
    return jax.shard_map(local, in_specs=specs, out_specs=split, check_vma=False)(q, k, v, segments)


def _splash_kernel(heads: int, length: int, causal: bool):
    """The TPU kernel for queries [heads, length, H]."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(block for block in SPLASH_BLOCKS if length % block == 0)
    names = [field.name for field in dataclasses.fields(splash.BlockSizes) if field.name.startswith("block_")]
    of_head = splash.CausalMask if causal else splash.FullMask
    mask = splash.MultiHeadMask([of_head((length, length))] * heads)
    blocks = splash.BlockSizes(**dict.fromkeys(names, block))
    return splash.make_splash_mha_single_device(mask, block_sizes=blocks)
