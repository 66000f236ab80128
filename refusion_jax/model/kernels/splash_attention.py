"""Attention of a training pass on TPUs: JAX's splash attention, called on the rows and heads of a device."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

Array = jax.Array

# Tiles of the kernel: the largest that divides the length is used.
BLOCKS = (512, 256, 128)


def attend(q: Array, fresh: tuple[Array, Array], segments: Array | None, causal: bool) -> Array:
    """`attention.attend_fed` by a kernel that forms no T x T scores and skips tiles that no token attends to.

    T must be a multiple of the smallest of BLOCKS.
    """
    B, T, N, H = q.shape
    k, v = fresh
    # The compiler cannot split a kernel by itself: each device calls it on the rows and heads it holds, as
    # the rules in scope have it. Without rules there is one device.
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
        kernel = _kernel(q.shape[2], T, causal)
        q, k, v = (x.swapaxes(1, 2) for x in (q * H**-0.5, k, v))
        return jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments)).swapaxes(1, 2)

    if not rules:
        return local(q, k, v, segments)
    specs = (split, split, split, PartitionSpec(*split[:2]))
    return jax.shard_map(local, in_specs=specs, out_specs=split, check_vma=False)(q, k, v, segments)


def _kernel(heads: int, length: int, causal: bool):
    """The kernel for queries [heads, length, H]."""
    block = next(block for block in BLOCKS if length % block == 0)
    names = [field.name for field in dataclasses.fields(splash.BlockSizes) if field.name.startswith("block_")]
    of_head = splash.CausalMask if causal else splash.FullMask
    mask = splash.MultiHeadMask([of_head((length, length))] * heads)
    blocks = splash.BlockSizes(**dict.fromkeys(names, block))
    return splash.make_splash_mha_single_device(mask, block_sizes=blocks)
