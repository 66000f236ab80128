"""Fused projections for decoding: q, k and v as one matrix, and the MLP's gate and up as one.

The fused axes are grouped by key/value head: its G query heads, its key, its value. So sharding the K heads
shards all three. A gate column is paired with its up column for the same reason.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from refusion_jax.weights import lazy
from refusion_jax.weights.lazy import LazyArray


def fuse_projections(params: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the parameters of a Transformer without `fused`, unrolled or scanned, to those of one with it.

    Args:
      params: arrays or LazyArrays; in each layer q, k and v [D, heads, H], with or without biases, and
        gate and up [D, F].

    Returns:
      the same tree with qkv [D, K, G + 2, H] and gate_up [D, 2, F] in their place. LazyArrays are not read.
    """
    return {name: _fuse_layer(leaf) if name.startswith("layers") else leaf for name, leaf in params.items()}


def _fuse_layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    attention, mlp = dict(layer["attention"]), dict(layer["mlp"])
    for end in ("", "_bias"):
        if f"q{end}" in attention:
            attention[f"qkv{end}"] = _fuse_heads(*(attention.pop(f"{name}{end}") for name in "qkv"))
    mlp["gate_up"] = _concatenate([_with_axis(mlp.pop(name)) for name in ("gate", "up")])
    return {**layer, "attention": attention, "mlp": mlp}


def _fuse_heads(q: Any, k: Any, v: Any) -> Any:
    """Fuses q [..., N, H] with k and v [..., K, H] into [..., K, G + 2, H]."""
    *leading, heads, size = q.shape
    num_kv = k.shape[-2]
    grouped = _reshape(q, (*leading, num_kv, heads // num_kv, size))
    return _concatenate([grouped, _with_axis(k), _with_axis(v)])


def _with_axis(x: Any) -> Any:
    """Inserts an axis of size 1 before the last: [..., H] -> [..., 1, H]."""
    return _reshape(x, (*x.shape[:-1], 1, x.shape[-1]))


def _reshape(x: Any, shape: Sequence[int]) -> Any:
    assert math.prod(x.shape) == math.prod(shape), (x.shape, shape)
    return x.split(shape) if isinstance(x, LazyArray) else jnp.reshape(x, shape)


def _concatenate(parts: Sequence[Any]) -> Any:
    """Concatenates along the second to last axis."""
    if isinstance(parts[0], LazyArray):
        return lazy.concatenate(parts, axis=len(parts[0].shape) - 2)
    return jnp.concatenate(parts, axis=-2)
