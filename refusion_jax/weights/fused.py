"""Parameters with the projections that read the same input as one matrix: what decoding computes with.

Of each key/value head its G queries, its key and its value stand together, so that splitting the heads
over devices splits all three; a gate stands beside its up projection for the same reason.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from refusion_jax.weights import lazy
from refusion_jax.weights.lazy import LazyArray


def fuse_projections(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a model with `fused` from those of one without, unrolled or scanned.

    Args:
      params: arrays, or LazyArray yet to be read; of the layers q, k and v [D, heads, H] with or without
        biases, gate and up [D, F].

    Returns:
      the same, with qkv [D, K, G + 2, H] and gate_up [D, 2, F] instead; nothing is read of LazyArray.
    """
    return {name: _join_layer(leaf) if name.startswith("layers") else leaf for name, leaf in params.items()}


def _join_layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    attention, mlp = dict(layer["attention"]), dict(layer["mlp"])
    for end in ("", "_bias"):
        if f"q{end}" in attention:
            attention[f"qkv{end}"] = _join_heads(*(attention.pop(f"{name}{end}") for name in "qkv"))
    mlp["gate_up"] = _concatenate([_with_axis(mlp.pop(name)) for name in ("gate", "up")])
    return {**layer, "attention": attention, "mlp": mlp}


def _join_heads(q: Any, k: Any, v: Any) -> Any:
    """[..., K, G + 2, H] of q [..., N, H], k and v [..., K, H]."""
    *leading, heads, size = q.shape
    num_kv = k.shape[-2]
    grouped = _reshape(q, (*leading, num_kv, heads // num_kv, size))
    return _concatenate([grouped, _with_axis(k), _with_axis(v)])


def _with_axis(x: Any) -> Any:
    """[..., 1, H] of [..., H]."""
    return _reshape(x, (*x.shape[:-1], 1, x.shape[-1]))


def _reshape(x: Any, shape: Sequence[int]) -> Any:
    assert math.prod(x.shape) == math.prod(shape), (x.shape, shape)
    return x.split(shape) if isinstance(x, LazyArray) else jnp.reshape(x, shape)


def _concatenate(parts: Sequence[Any]) -> Any:
    """Along the last but one axis."""
    if isinstance(parts[0], LazyArray):
        return lazy.concatenate(parts, axis=len(parts[0].shape) - 2)
    return jnp.concatenate(parts, axis=-2)
