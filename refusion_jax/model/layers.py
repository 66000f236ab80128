"""The transformer's layers: norm, attention, MLP, and the block that combines them.

Einsum letters as in model/transformer.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from refusion_jax.model.attention import LayerKV, attend, attend_fed, attend_visible
from refusion_jax.model.config import ModelConfig
from refusion_jax.model.kernels.visible import Visible
from refusion_jax.model.rope import apply_rope

Array = jax.Array


def lecun(num_in: int, num_out: int):
    """LeCun normal initializer of a matrix whose first `num_in` axes are contracted."""
    return nn.initializers.variance_scaling(
        1.0, "fan_in", "normal", tuple(range(num_in)), tuple(range(num_in, num_in + num_out))
    )


class Ragged(NamedTuple):
    """Layout of rows of different lengths as one sequence of N tokens; int32 throughout.

    Matrix products then work on the N tokens without padding; only attention is laid out by row.

    Attributes:
      flat: [B, T], index among the N tokens of a row's t-th token; N where the row has no such token.
      row: [N], the row of each token.
      place: [N], the index t of each token in its row.
    """

    flat: Array
    row: Array
    place: Array


class Context(NamedTuple):
    """What the tokens fed attend to, the same for all layers; see `Transformer.__call__`.

    Attributes:
      cache: keys and values of all layers, or None.
      mask: bool mask, or Visible for the kernel "triton"; None as in `Transformer.__call__`.
      segments: segment of each token, in a pass with neither cache nor mask; or None.
      ragged: layout of the tokens fed, or None where they are laid out by row.
    """

    cache: LayerKV | None = None
    mask: Array | Visible | None = None
    segments: Array | None = None
    ragged: Ragged | None = None

    def by_row(self, x: Array) -> Array:
        """[1, N, ...] laid out as [B, T, ...]; the padding of a row is finite and otherwise arbitrary."""
        return x if self.ragged is None else jnp.take(x[0], self.ragged.flat, axis=0, mode="clip")

    def as_fed(self, y: Array) -> Array:
        """[B, T, ...] laid out as the tokens are fed, the inverse of `by_row`."""
        if self.ragged is None:
            return y
        return y.at[self.ragged.row, self.ragged.place].get(mode="clip")[None]


@dataclasses.dataclass(frozen=True)
class Weights:
    """How the layers store and multiply their matrices; other fields as in Transformer.

    Attributes:
      int8_kernel: whether products of a few tokens with an int8 matrix use `triton_int8.product`.
    """

    dtype: jnp.dtype
    param_dtype: jnp.dtype
    fused: bool = False
    int8: bool = False
    int8_kernel: bool = False

    def product(self, module: nn.Module, equation: str, x: Array, name: str, shape, axes, num_in=1) -> Array:
        """x times the parameter `name`, a matrix that `module` declares.

        Args:
          module: the layer that owns the parameter.
          equation: einsum of x and the matrix.
          x: activations, the contracted axes last.
          name: name of the parameter.
          shape: shape of the matrix, contracted axes first.
          axes: logical axis names of `shape`.
          num_in: number of contracted axes.
        """
        if not self.int8:
            init = nn.with_logical_partitioning(lecun(num_in, len(shape) - num_in), axes)
            matrix = module.param(name, init, shape, self.param_dtype)
            return jnp.einsum(equation, x, matrix.astype(self.dtype))
        outputs, summed = shape[num_in:], shape[:num_in]
        init = nn.with_logical_partitioning(nn.initializers.zeros, (*axes[num_in:], *axes[:num_in]))
        matrix = module.param(name, init, (*outputs, *summed), jnp.int8)
        init = nn.with_logical_partitioning(nn.initializers.ones, axes[num_in:])
        scale = module.param(f"{name}_scale", init, outputs, jnp.float32)
        return self.int8_product(x, matrix, scale, num_in)

    def int8_product(
        self, x: Array, matrix: Array, scale: Array, num_in: int = 1, dtype: Any = None
    ) -> Array:
        """x [..., contracted] times the int8 matrix [outputs, contracted] and its scale [outputs].

        The result is in `dtype`; None is that of the activations.
        """
        leading, outputs = x.shape[: x.ndim - num_in], scale.shape
        flat = x.reshape(math.prod(leading), -1), matrix.reshape(math.prod(outputs), -1)
        # On a mesh the compiler partitions the product; it cannot partition a kernel.
        kernel = _int8_kernel(*flat) if self.int8_kernel and not nn.get_logical_axis_rules() else None
        if kernel is not None:
            y = kernel(*flat).reshape(*leading, *outputs)
        else:
            summed = tuple(range(x.ndim - num_in, x.ndim)), tuple(range(matrix.ndim - num_in, matrix.ndim))
            y = jax.lax.dot_general(
                x, matrix.astype(self.dtype), (summed, ((), ())), preferred_element_type=jnp.float32
            )
        return (y * scale).astype(dtype or self.dtype)


def _int8_kernel(x: Array, matrix: Array) -> Callable[[Array, Array], Array] | None:
    """The Triton kernel for x [N, D] and matrix [F, D], None if it does not handle them."""
    from refusion_jax.model.kernels import triton_int8  # loads Pallas's Triton backend

    if not triton_int8.fits(x, matrix):
        return None
    return functools.partial(triton_int8.product, interpret=jax.default_backend() != "gpu")


class RMSNorm(nn.Module):
    """RMS normalisation over the last axis; statistics in float32."""

    eps: float
    axis_name: str
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return _normalised(x, self.eps) * _norm_scale(self, x.shape[-1], self.axis_name).astype(x.dtype)


class NormScale(nn.Module):
    """The scale parameter of an RMSNorm without the normalisation, under the same parameter name."""

    size: int
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> Array:
        return _norm_scale(self, self.size, "head_dim")


def _norm_scale(module: nn.Module, size: int, axis_name: str) -> Array:
    init = nn.with_logical_partitioning(nn.initializers.ones, (axis_name,))
    return module.param("scale", init, (size,), module.param_dtype)


def _normalised(x: Array, eps: float) -> Array:
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)).astype(x.dtype)


class Attention(nn.Module):
    """Self-attention of one layer; returns its output [B, T, D] and the fresh keys and values."""

    config: ModelConfig
    weights: Weights
    kernel: str
    max_segments: int
    causal: bool

    @nn.compact
    def __call__(self, x: Array, rope, layer: Array | int | None, context: Context):
        c, w = self.config, self.weights
        if w.fused:
            qkv = self._fused(x, rope)
            q = qkv[..., :-2, :].reshape(*x.shape[:2], c.num_heads, c.head_dim)
            k, v = qkv[..., -2, :], qkv[..., -1, :]
        else:
            q, k, v = self._separate(x, rope)
        cache, mask = context.cache, context.mask
        with jax.named_scope("attend"):
            if isinstance(mask, Visible):
                if not w.fused:
                    parts = q.reshape(*k.shape[:3], -1, c.head_dim), k[..., None, :], v[..., None, :]
                    qkv = jnp.concatenate(parts, axis=-2)
                y = context.as_fed(attend_visible(context.by_row(qkv), cache, layer, mask))
                y = y.reshape(q.shape)
            elif cache is None and context.ragged is None:
                y = attend_fed(q, (k, v), context.segments, self.kernel, self.max_segments, self.causal, mask)
            else:
                of_layer = None if cache is None else (cache[0][layer], cache[1][layer])
                q, *fresh = (context.by_row(part) for part in (q, k, v))
                y = context.as_fed(attend(q, tuple(fresh), of_layer, mask))
        shape, axes = (c.num_heads, c.head_dim, c.embed_dim), ("heads", "head_dim", "embed")
        return w.product(self, "BTNH,NHD->BTD", y, "o", shape, axes, num_in=2), (k, v)

    def _separate(self, x: Array, rope) -> tuple[Array, Array, Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], after norm and RoPE."""
        c, w = self.config, self.weights

        def project(name: str, heads: int, axis: str) -> Array:
            shape = (c.embed_dim, heads, c.head_dim)
            y = w.product(self, "BTD,DNH->BTNH", x, name, shape, ("embed", axis, "head_dim"))
            if c.qkv_bias:
                y = y + self._bias(f"{name}_bias", shape[1:], (axis, "head_dim"))
            return nn.with_logical_constraint(y, ("act_batch", "act_length", f"act_{axis}", None))

        q = project("q", c.num_heads, "heads")
        k = project("k", c.num_kv_heads, "kv_heads")
        v = project("v", c.num_kv_heads, "kv_heads")
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, "head_dim", w.param_dtype, name="q_norm")(q)
            k = RMSNorm(c.norm_eps, "head_dim", w.param_dtype, name="k_norm")(k)
        return apply_rope(q, rope), apply_rope(k, rope), v

    def _fused(self, x: Array, rope) -> Array:
        """The results of `_separate` as one array, [B, T, K, G + 2, H]: G queries, key, value per head of K.

        Norm and RoPE act on the whole array and `where` restores the values, so that they compile to as few
        kernels as possible.
        """
        c, w = self.config, self.weights
        groups = c.num_heads // c.num_kv_heads
        shape = (c.embed_dim, c.num_kv_heads, groups + 2, c.head_dim)
        axes = ("embed", "kv_heads", None, "head_dim")
        y = w.product(self, "BTD,DKJH->BTKJH", x, "qkv", shape, axes)
        if c.qkv_bias:
            y = y + self._bias("qkv_bias", shape[1:], axes[1:])
        y = nn.with_logical_constraint(y, ("act_batch", "act_length", "act_kv_heads", None, None))
        is_key, is_value = (jnp.arange(groups + 2)[:, None] == i for i in (groups, groups + 1))
        z = y
        if c.qk_norm:
            q, k = (NormScale(c.head_dim, w.param_dtype, name=name)() for name in ("q_norm", "k_norm"))
            z = _normalised(z, c.norm_eps) * jnp.where(is_key, k, q).astype(w.dtype)
        z = apply_rope(z, tuple(table[..., None, :] for table in rope))
        return jnp.where(is_value, y, z)

    def _bias(self, name: str, shape, axes) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
        return self.param(name, init, shape, self.weights.param_dtype).astype(self.weights.dtype)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: ModelConfig
    weights: Weights

    @nn.compact
    def __call__(self, x: Array) -> Array:
        (D, F), w = (self.config.embed_dim, self.config.mlp_dim), self.weights
        if w.fused:
            y = w.product(self, "BTD,DJF->BTJF", x, "gate_up", (D, 2, F), ("embed", None, "mlp"))
            gate, up = y[:, :, 0], y[:, :, 1]
        else:
            gate = w.product(self, "BTD,DF->BTF", x, "gate", (D, F), ("embed", "mlp"))
            up = w.product(self, "BTD,DF->BTF", x, "up", (D, F), ("embed", "mlp"))
        y = nn.with_logical_constraint(nn.silu(gate) * up, ("act_batch", "act_length", "act_mlp"))
        return w.product(self, "BTF,FD->BTD", y, "down", (F, D), ("mlp", "embed"))


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ModelConfig
    weights: Weights
    kernel: str
    max_segments: int
    causal: bool

    @nn.compact
    def __call__(self, x: Array, rope, layer: Array | int | None, context: Context):
        c, w = self.config, self.weights
        y = RMSNorm(c.norm_eps, "embed", w.param_dtype, name="attention_norm")(x)
        attention = Attention(c, w, self.kernel, self.max_segments, self.causal, name="attention")
        y, kv = attention(y, rope, layer, context)
        x = nn.with_logical_constraint(x + y, ("act_batch", "act_length", "act_embed"))
        y = RMSNorm(c.norm_eps, "embed", w.param_dtype, name="mlp_norm")(x)
        y = MLP(c, w, name="mlp")(y)
        return nn.with_logical_constraint(x + y, ("act_batch", "act_length", "act_embed")), kv
