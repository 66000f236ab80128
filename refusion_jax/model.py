"""The causal transformer: one Linen block with switches for Qwen3, Qwen2.5 and Llama.

The model knows no slots, mesh, tokenizer or sampling. It is a pure function of parameters, tokens,
their position ids, an optional cache and an attention mask. Attention is causal in the order in which
tokens are fed, whatever their positions are: positions enter through RoPE alone, which is what lets
ReFusion permute slots (arXiv 2512.13586, section 3).

Einsum letters, everywhere in this package:
  B batch, T query tokens, S cache length, L layers, N query heads, K key/value heads, G = N / K,
  H head dim, D width, F MLP width, V vocabulary, M slots, W slot width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from refusion_jax.attention import LayerKV, attend, attend_fed
from refusion_jax.rope import RopeScaling, apply_rope, rope_tables

Array = jax.Array


def _is_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name.startswith("dot_product_attention_fwd")  # cuDNN's; the dense one is made of dots


# What a layer may keep for the backward pass, by the name a config uses.
REMAT_POLICIES = {
    "none": None,  # keep everything
    "full": jax.checkpoint_policies.nothing_saveable,
    # Keep what matrix products give and compute the rest, which costs little, again.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _is_attention
    ),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and switches of the transformer; hashable, no runtime choices in it.

    Attributes:
      vocab_size: V, rows of the embedding and columns of the head.
      num_layers: L.
      embed_dim: D, the width.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads; each serves N / K query heads.
      head_dim: H; N x H need not be D.
      mlp_dim: F, the width inside the MLP.
      rope_theta: base of the RoPE frequencies.
      norm_eps: added to the mean square in every RMSNorm.
      qk_norm: RMSNorm on each head's q and k before RoPE (Qwen3).
      qkv_bias: bias on the q, k and v projections (Qwen2.5).
      tie_embeddings: the head is the embedding, transposed.
      rope_scaling: how RoPE reaches further than first trained, a RopeScaling or a mapping of its fields;
        None leaves the frequencies as they are.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    qk_norm: bool = True
    qkv_bias: bool = False
    tie_embeddings: bool = False
    rope_scaling: RopeScaling | Mapping[str, Any] | None = None

    def __post_init__(self):
        if isinstance(self.rope_scaling, Mapping):  # as a configuration file gives it
            object.__setattr__(self, "rope_scaling", RopeScaling.from_fields(self.rope_scaling))
        sizes = (
            "vocab_size",
            "num_layers",
            "embed_dim",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_dim",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta must be above 0, got {self.rope_theta}")
        if not self.norm_eps >= 0:
            raise ValueError(f"norm_eps must be 0 or above, got {self.norm_eps}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (RoPE rotates halves), got {self.head_dim}")

    @classmethod
    def tiny(cls, vocab_size: int = 260) -> "ModelConfig":
        """140 thousand parameters: tests and the demo."""
        return cls(vocab_size, 2, 64, 4, 4, 16, 192, rope_theta=1e4)

    @classmethod
    def smollm2_135m(cls) -> "ModelConfig":
        return cls(
            49152,
            30,
            576,
            9,
            3,
            64,
            1536,
            rope_theta=1e5,
            norm_eps=1e-5,
            qk_norm=False,
            tie_embeddings=True,
        )

    @classmethod
    def qwen3_0p6b(cls) -> "ModelConfig":
        return cls(151936, 28, 1024, 16, 8, 128, 3072, tie_embeddings=True)

    @classmethod
    def qwen3_1p7b(cls) -> "ModelConfig":
        return cls(151936, 28, 2048, 16, 8, 128, 6144, tie_embeddings=True)

    @classmethod
    def qwen3_4b(cls) -> "ModelConfig":
        return cls(151936, 36, 2560, 32, 8, 128, 9728, tie_embeddings=True)

    @classmethod
    def qwen3_8b(cls) -> "ModelConfig":
        return cls(151936, 36, 4096, 32, 8, 128, 12288)

    @classmethod
    def qwen2p5_7b(cls) -> "ModelConfig":
        return cls(152064, 28, 3584, 28, 4, 128, 18944, qk_norm=False, qkv_bias=True)

    @classmethod
    def refusion_8b(cls) -> "ModelConfig":
        """Qwen3-8B with the vocabulary resized for <|beginoftext|> and <|mask|>."""
        return dataclasses.replace(cls.qwen3_8b(), vocab_size=151671)


def _matrix(num_in: int, num_out: int):
    """LeCun normal for a kernel whose first `num_in` axes are contracted."""
    return nn.initializers.variance_scaling(
        1.0, "fan_in", "normal", tuple(range(num_in)), tuple(range(num_in, num_in + num_out))
    )


class RMSNorm(nn.Module):
    """RMS normalisation over the last axis, statistics in float32."""

    eps: float
    axis_name: str
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis_name,))
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * scale.astype(x.dtype)


class Attention(nn.Module):
    """Self-attention of one layer; returns its output and the fresh keys and values."""

    config: ModelConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    kernel: str
    max_segments: int

    @nn.compact
    def __call__(self, x: Array, rope, cache: LayerKV | None, mask: Array | None, segments: Array | None):
        c = self.config

        def project(name: str, heads: int, axis: str) -> Array:
            init = nn.with_logical_partitioning(_matrix(1, 2), ("embed", axis, "head_dim"))
            kernel = self.param(name, init, (c.embed_dim, heads, c.head_dim), self.param_dtype)
            y = jnp.einsum("BTD,DNH->BTNH", x, kernel.astype(self.dtype))
            if c.qkv_bias:
                init = nn.with_logical_partitioning(nn.initializers.zeros, (axis, "head_dim"))
                bias = self.param(f"{name}_bias", init, (heads, c.head_dim), self.param_dtype)
                y = y + bias.astype(self.dtype)
            return nn.with_logical_constraint(y, ("act_batch", "act_length", f"act_{axis}", None))

        q = project("q", c.num_heads, "heads")
        k = project("k", c.num_kv_heads, "kv_heads")
        v = project("v", c.num_kv_heads, "kv_heads")
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, "head_dim", self.param_dtype, name="q_norm")(q)
            k = RMSNorm(c.norm_eps, "head_dim", self.param_dtype, name="k_norm")(k)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        with jax.named_scope("attend"):
            if cache is None and mask is None:
                y = attend_fed(q, (k, v), segments, self.kernel, self.max_segments)
            else:
                y = attend(q, (k, v), cache, mask)
        init = nn.with_logical_partitioning(_matrix(2, 1), ("heads", "head_dim", "embed"))
        kernel = self.param("o", init, (c.num_heads, c.head_dim, c.embed_dim), self.param_dtype)
        return jnp.einsum("BTNH,NHD->BTD", y, kernel.astype(self.dtype)), (k, v)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: ModelConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        D, F = self.config.embed_dim, self.config.mlp_dim

        def kernel(name: str, shape: tuple[int, int], axes: tuple[str, str]) -> Array:
            init = nn.with_logical_partitioning(_matrix(1, 1), axes)
            return self.param(name, init, shape, self.param_dtype).astype(self.dtype)

        gate = jnp.einsum("BTD,DF->BTF", x, kernel("gate", (D, F), ("embed", "mlp")))
        up = jnp.einsum("BTD,DF->BTF", x, kernel("up", (D, F), ("embed", "mlp")))
        y = nn.with_logical_constraint(nn.silu(gate) * up, ("act_batch", "act_length", "act_mlp"))
        return jnp.einsum("BTF,FD->BTD", y, kernel("down", (F, D), ("mlp", "embed")))


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ModelConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    kernel: str
    max_segments: int

    @nn.compact
    def __call__(self, x: Array, rope, cache: LayerKV | None, mask: Array | None, segments: Array | None):
        c, types = self.config, (self.dtype, self.param_dtype)
        y = RMSNorm(c.norm_eps, "embed", self.param_dtype, name="attention_norm")(x)
        attention = Attention(c, *types, self.kernel, self.max_segments, name="attention")
        y, kv = attention(y, rope, cache, mask, segments)
        x = nn.with_logical_constraint(x + y, ("act_batch", "act_length", "act_embed"))
        y = RMSNorm(c.norm_eps, "embed", self.param_dtype, name="mlp_norm")(x)
        y = MLP(c, *types, name="mlp")(y)
        return nn.with_logical_constraint(x + y, ("act_batch", "act_length", "act_embed")), kv


class Transformer(nn.Module):
    """Decoder-only transformer.

    Attributes:
      config: shape and switches.
      dtype: of activations and matrix products; parameters are cast to it as they are used.
      param_dtype: of the parameters themselves (float32 master weights when training).
      scan_layers: one scanned layer with parameters and cache stacked on a leading L axis (fast to
        compile), or L separate layers `layers_0` … (fast to run). The same function either way;
        `stack_layers` and `unstack_layers` turn the parameters of one into those of the other.
      remat: what a layer keeps for the backward pass, a key of REMAT_POLICIES.
      kernel: how a pass without a cache and a mask computes attention, one of attention.KERNELS.
      max_segments: most segments of a row.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    scan_layers: bool = False
    remat: str = "none"
    kernel: str = "dense"
    max_segments: int = 1

    def setup(self):
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (c.vocab_size, c.embed_dim), self.param_dtype)
        block, arguments = Block, (c, self.dtype, self.param_dtype, self.kernel, self.max_segments)
        if REMAT_POLICIES[self.remat] is not None:
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan_layers)
        if self.scan_layers:
            block = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0, nn.broadcast, nn.broadcast),
                length=c.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            self.layers = block(*arguments)
        else:
            self.layers = [block(*arguments) for _ in range(c.num_layers)]
        self.final_norm = RMSNorm(c.norm_eps, "embed", self.param_dtype)
        if not c.tie_embeddings:
            init = nn.with_logical_partitioning(_matrix(1, 1), ("embed", "vocab"))
            self.head = self.param("head", init, (c.embed_dim, c.vocab_size), self.param_dtype)

    def hidden(
        self,
        tokens: Array,
        positions: Array,
        cache=None,
        mask: Array | None = None,
        segments: Array | None = None,
    ):
        """Final normalised states [B, T, D] and the fresh keys and values; see `__call__`."""
        # Gathered over fsdp before the lookup: looked up in pieces, the activations would be moved instead.
        table = nn.with_logical_constraint(self.embedding, ("vocab", "act_embed"))
        x = jnp.take(table, tokens, axis=0).astype(self.dtype)
        x = nn.with_logical_constraint(x, ("act_batch", "act_length", "act_embed"))
        c = self.config
        rope = rope_tables(positions, c.head_dim, c.rope_theta, c.rope_scaling)
        if self.scan_layers:
            x, kv = self.layers(x, rope, cache, mask, segments)
        else:
            fresh = []
            for i, layer in enumerate(self.layers):
                x, layer_kv = layer(x, rope, None if cache is None else cache[i], mask, segments)
                fresh.append(layer_kv)
            kv = tuple(fresh)
        return self.final_norm(x), kv

    def unembedding(self) -> Array:
        """The head, [D, V] in `dtype`."""
        return (self.embedding.T if self.config.tie_embeddings else self.head).astype(self.dtype)

    def unembed(self, x: Array) -> Array:
        """Logits [..., V] in `dtype` of final states [..., D]."""
        return jnp.einsum("...D,DV->...V", x, self.unembedding())

    def __call__(
        self,
        tokens: Array,
        positions: Array,
        cache=None,
        mask: Array | None = None,
        segments: Array | None = None,
    ):
        """Logits of the tokens fed, and their keys and values.

        The cache is only read: what to keep of the fresh keys and values is the caller's choice, so a
        rejected draft leaves no trace.

        Args:
          tokens: int32 [B, T], in the order fed.
          positions: int32 [B, T], the RoPE position of each token, in any order.
          cache: None, or per layer (k, v), each [B, S, K, H]; with scan_layers one (k, v) pair with a
            leading L axis.
          mask: bool, broadcastable to [B, T, S + T]; None, only without a cache, is causal.
          segments: int32 [B, T], without cache and mask: a token sees those of its own segment alone;
            segments stand one after the other in ascending order. None is one segment.

        Returns:
          logits [B, T, V] in `dtype`, and the fresh keys and values in the cache's layout, S = T.
        """
        x, kv = self.hidden(tokens, positions, cache, mask, segments)
        return self.unembed(x), kv


def exact_matmuls(model: Transformer):
    """A context in which a float32 model multiplies in float32 on every backend (GPUs default to TF32)."""
    return jax.default_matmul_precision("highest" if model.dtype == jnp.float32 else None)


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the unrolled model as those of the scanned one (leaves of `layers` gain axis L)."""
    depth = sum(name.startswith("layers_") for name in params)
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("layers_")}
    layers = [params[f"layers_{i}"] for i in range(depth)]
    return rest | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the scanned model as those of the unrolled one."""
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    depth = jax.tree.leaves(params["layers"])[0].shape[0]
    return rest | {
        f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(depth)
    }
