"""The transformer's layers: norm, attention, MLP, and the block that combines them.

Einsum letters as in model/transformer.py.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from refusion_jax.model.attention import LayerKV, attend, attend_fed, attend_visible
from refusion_jax.model.config import ModelConfig
from refusion_jax.model.kernels.visible import Visible
from refusion_jax.model.products import Weights
from refusion_jax.model.rope import apply_rope

Array = jax.Array


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
      adapted: bool in the layout of the tokens fed, the tokens that adapters act on; None for all.
    """

    cache: LayerKV | None = None
    mask: Array | Visible | None = None
    segments: Array | None = None
    ragged: Ragged | None = None
    adapted: Array | None = None

    def by_row(self, x: Array) -> Array:
        """[1, N, ...] laid out as [B, T, ...]; the padding of a row is finite and otherwise arbitrary."""
        return x if self.ragged is None else jnp.take(x[0], self.ragged.flat, axis=0, mode="clip")

    def as_fed(self, y: Array) -> Array:
        """[B, T, ...] laid out as the tokens are fed, the inverse of `by_row`."""
        if self.ragged is None:
            return y
        return y.at[self.ragged.row, self.ragged.place].get(mode="clip")[None]


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
            qkv = self._fused(x, rope, context.adapted)
            q = qkv[..., :-2, :].reshape(*x.shape[:2], c.num_heads, c.head_dim)
            k, v = qkv[..., -2, :], qkv[..., -1, :]
        else:
            q, k, v = self._separate(x, rope, context.adapted)
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
        return w.product(self, "BTNH,NHD->BTD", y, "o", shape, axes, 2, context.adapted), (k, v)

    def _separate(self, x: Array, rope, adapted: Array | None) -> tuple[Array, Array, Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], after norm and RoPE."""
        c, w = self.config, self.weights

        def project(name: str, heads: int, axis: str) -> Array:
            shape = (c.embed_dim, heads, c.head_dim)
            y = w.product(self, "BTD,DNH->BTNH", x, name, shape, ("embed", axis, "head_dim"), adapted=adapted)
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

    def _fused(self, x: Array, rope, adapted: Array | None) -> Array:
        """The results of `_separate` as one array, [B, T, K, G + 2, H]: G queries, key, value per head of K.

        Norm and RoPE act on the whole array and `where` restores the values, so that they compile to as few
        kernels as possible.
        """
        c, w = self.config, self.weights
        groups = c.num_heads // c.num_kv_heads
        shape = (c.embed_dim, c.num_kv_heads, groups + 2, c.head_dim)
        axes = ("embed", "kv_heads", None, "head_dim")
        y = w.product(self, "BTD,DKJH->BTKJH", x, "qkv", shape, axes)
        if w.adapter is not None:
            y = y + self._low_rank_qkv(x, adapted)
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

    def _low_rank_qkv(self, x: Array, adapted: Array | None) -> Array:
        """The adapters' products of q, k and v in the order of `_fused`, [B, T, K, G + 2, H]."""
        c = self.config

        def of(name: str, heads: int, axis: str) -> Array:
            shape, axes = (c.embed_dim, heads, c.head_dim), ("embed", axis, "head_dim")
            y = self.weights.low_rank(self, x, name, shape, axes, 1, adapted)
            return y.reshape(*x.shape[:2], c.num_kv_heads, -1, c.head_dim)

        parts = of("q", c.num_heads, "heads"), of("k", c.num_kv_heads, "kv_heads")
        return jnp.concatenate([*parts, of("v", c.num_kv_heads, "kv_heads")], axis=-2)

    def _bias(self, name: str, shape, axes) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
        return self.param(name, init, shape, self.weights.param_dtype).astype(self.weights.dtype)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: ModelConfig
    weights: Weights

    @nn.compact
    def __call__(self, x: Array, context: Context) -> Array:
        (D, F), w, adapted = (self.config.embed_dim, self.config.mlp_dim), self.weights, context.adapted
        shape, axes = (D, F), ("embed", "mlp")
        if w.fused:
            y = w.product(self, "BTD,DJF->BTJF", x, "gate_up", (D, 2, F), ("embed", None, "mlp"))
            if w.adapter is not None:
                parts = [w.low_rank(self, x, name, shape, axes, 1, adapted) for name in ("gate", "up")]
                y = y + jnp.stack(parts, axis=2)
            gate, up = y[:, :, 0], y[:, :, 1]
        else:
            gate = w.product(self, "BTD,DF->BTF", x, "gate", shape, axes, adapted=adapted)
            up = w.product(self, "BTD,DF->BTF", x, "up", shape, axes, adapted=adapted)
        y = nn.with_logical_constraint(nn.silu(gate) * up, ("act_batch", "act_length", "act_mlp"))
        return w.product(self, "BTF,FD->BTD", y, "down", (F, D), ("mlp", "embed"), adapted=adapted)


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
        y = MLP(c, w, name="mlp")(y, context)
        return nn.with_logical_constraint(x + y, ("act_batch", "act_length", "act_embed")), kv
