"""The transformer: one Linen block with switches for Qwen3, Qwen2.5 and Llama.

The model is a pure function of parameters, tokens, their position ids, an optional cache and an attention
mask. It knows no slots, mesh, tokenizer or sampling. Without a mask, attention is causal in the order in
which tokens are fed, whatever their positions: positions enter only through RoPE. This is why ReFusion can
permute slots (arXiv 2512.13586, section 3).

Einsum letters, everywhere in this package:
  B batch, T query tokens, S cache length, L layers, N query heads, K key/value heads, G = N / K,
  H head dim, D width, F MLP width, V vocabulary, M slots, W slot width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from refusion_jax.model.adapter import Adapter
from refusion_jax.model.attention import fed_mask
from refusion_jax.model.config import ModelConfig
from refusion_jax.model.kernels.visible import visible
from refusion_jax.model.layers import Block, Context, Ragged, RMSNorm
from refusion_jax.model.products import Weights, lecun
from refusion_jax.model.rope import rope_tables

Array = jax.Array


def _is_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name.startswith("dot_product_attention_fwd")  # cuDNN's; dense attention consists of dots


# What a layer keeps for the backward pass, by the name that a configuration uses.
REMAT_POLICIES = {
    "none": None,  # keep everything
    "full": jax.checkpoint_policies.nothing_saveable,
    # Keep the results of matrix products and recompute the rest, which is cheap.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _is_attention
    ),
}


def _without_adapters(policy: Any, rank: int) -> Any:
    """`policy`, except that products over the adapters' rank are recomputed: large results of little work."""

    def saved(primitive: Any, *inputs: Any, **params: Any) -> bool:
        if primitive.name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            if [inputs[0].shape[axis] for axis in contracted] == [rank]:
                return False
        return policy(primitive, *inputs, **params)

    return saved


class Transformer(nn.Module):
    """Decoder-only transformer.

    Attributes:
      config: shape and switches.
      dtype: dtype of activations and matrix products; parameters are cast to it when they are used.
      param_dtype: dtype of the parameters (float32 master weights in training).
      scan_layers: True makes one scanned layer, with parameters and cache stacked on a leading L axis (fast
        to compile); False makes L separate layers `layers_0` … (fast to run). Both compute the same
        function; `weights.lazy.stack` and `unstack` convert the parameters.
      remat: what a layer keeps for the backward pass, a key of REMAT_POLICIES.
      kernel: implementation of attention, one of attention.KERNELS. "triton" is for decoding and has no
        backward pass; "cudnn" and "splash" need a pass without a cache, "splash" also without a mask.
      max_segments: upper bound of the number of segments per row.
      fused: whether projections of the same input are one matrix, `qkv` and `gate_up`, as
        `fused.fuse_projections` makes them: fewer and larger products, for decoding.
      int8: whether the layers' matrices and the head are int8 with one scale per output channel, as
        `quantized.quantize` makes them. Activations, embedding, norms and biases keep their dtypes.
      causal: whether a pass without a mask is causal in the order fed; otherwise each token sees all.
      cache_by_layer: whether decoders pass the cache as one array per layer, as TPUs need; see KVCache.
      adapter: low-rank adapters beside the matrices of the layers, or None.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    scan_layers: bool = False
    remat: str = "none"
    kernel: str = "dense"
    max_segments: int = 1
    fused: bool = False
    int8: bool = False
    causal: bool = True
    cache_by_layer: bool = False
    adapter: Adapter | None = None

    def setup(self):
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (c.vocab_size, c.embed_dim), self.param_dtype)
        if self.adapter is not None and self.adapter.mask_id is not None:
            init = nn.with_logical_partitioning(nn.initializers.zeros, ("embed",))
            self.mask_embedding = self.param("mask_embedding", init, (c.embed_dim,), self.param_dtype)
        int8_kernel = self.kernel == "triton"
        self.weights = Weights(self.dtype, self.param_dtype, self.fused, self.int8, int8_kernel, self.adapter)
        block, arguments = Block, (c, self.weights, self.kernel, self.max_segments, self.causal)
        policy = REMAT_POLICIES[self.remat]
        if policy is not None:
            policy = policy if self.adapter is None else _without_adapters(policy, self.adapter.rank)
            block = nn.remat(Block, policy=policy, prevent_cse=not self.scan_layers)
        if self.scan_layers:
            block = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0, nn.broadcast),
                length=c.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            self.layers = block(*arguments)
        else:
            self.layers = [block(*arguments) for _ in range(c.num_layers)]
        self.final_norm = RMSNorm(c.norm_eps, "embed", self.param_dtype)
        if c.tie_embeddings:
            return
        if self.int8:
            init = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab", "embed"))
            self.head = self.param("head", init, (c.vocab_size, c.embed_dim), jnp.int8)
            init = nn.with_logical_partitioning(nn.initializers.ones, ("vocab",))
            self.head_scale = self.param("head_scale", init, (c.vocab_size,), jnp.float32)
        else:
            init = nn.with_logical_partitioning(lecun(1, 1), ("embed", "vocab"))
            self.head = self.param("head", init, (c.embed_dim, c.vocab_size), self.param_dtype)

    def hidden(
        self,
        tokens: Array,
        positions: Array,
        cache=None,
        mask: Array | None = None,
        segments: Array | None = None,
        ragged: Ragged | None = None,
    ):
        """Final normalised states [B, T, D] and the fresh keys and values; see `__call__`."""
        # Gather the table over fsdp before the lookup; otherwise the compiler moves the activations.
        table = nn.with_logical_constraint(self.embedding, ("vocab", "act_embed"))
        x = jnp.take(table, tokens, axis=0)
        adapted = None if self.adapter is None else self.adapter.adapted(tokens)
        if adapted is not None:
            row = nn.with_logical_constraint(self.mask_embedding, ("act_embed",))
            x = jnp.where(adapted[..., None], row, x)
        x = x.astype(self.dtype)
        x = nn.with_logical_constraint(x, ("act_batch", "act_length", "act_embed"))
        c = self.config
        rope = rope_tables(positions, c.head_dim, c.rope_theta, c.rope_scaling)
        mask = self._mask(tokens, cache, mask, segments, ragged)
        context = Context(cache, mask, segments, ragged, adapted)
        if self.scan_layers:
            layers = None if cache is None else jnp.arange(c.num_layers)
            x, kv = self.layers(x, rope, layers, context)
        else:
            fresh = []
            for i, layer in enumerate(self.layers):
                x, layer_kv = layer(x, rope, None if cache is None else i, context)
                fresh.append(layer_kv)
            kv = tuple(map(jnp.stack, zip(*fresh, strict=True)))
        return self.final_norm(x), kv

    def _mask(self, tokens: Array, cache, mask: Array | None, segments: Array | None, ragged: Ragged | None):
        """The mask in the form that the layers take: packed for the kernel "triton"."""
        if self.kernel != "triton":
            return mask
        B, T = tokens.shape if ragged is None else ragged.flat.shape
        if mask is None:
            if cache is not None:
                raise ValueError("attention to a cache needs a mask")
            mask = fed_mask(T, segments, self.causal)
        mask = jnp.broadcast_to(mask, (B, T, mask.shape[2]))
        return visible(mask, self.config.num_heads // self.config.num_kv_heads)

    def unembedding(self) -> Array:
        """The head, [D, V] in `dtype`."""
        return (self.embedding.T if self.config.tie_embeddings else self.head).astype(self.dtype)

    def unembed(self, x: Array) -> Array:
        """Logits float32 [..., V] of final states [..., D], as the product accumulates them.

        Rounded to bfloat16, logits of a large vocabulary tie often, and a choice between near ties would
        depend on the order of the sums.
        """
        if self.int8 and not self.config.tie_embeddings:
            return self.weights.int8_product(x, self.head, self.head_scale, dtype=jnp.float32)
        return jnp.einsum("...D,DV->...V", x, self.unembedding(), preferred_element_type=jnp.float32)

    def __call__(
        self,
        tokens: Array,
        positions: Array,
        cache=None,
        mask: Array | None = None,
        segments: Array | None = None,
        ragged: Ragged | None = None,
    ):
        """Logits of the tokens fed, and their keys and values.

        The cache is only read. The caller chooses which fresh keys and values to write to it, so a rejected
        draft leaves no trace.

        Args:
          tokens: int32 [B, T], in the order fed.
          positions: int32 [B, T], the RoPE position of each token, in any order.
          cache: None, or keys and values of all layers, each [L, B, S, K, H]; read in place. Unrolled
            layers also take L arrays [B, S, K, H].
          mask: bool, broadcastable to [B, T, S + T], True where attention is allowed. None, only without a
            cache, means causal or bidirectional, as the field `causal` says.
          segments: int32 [B, T], only without cache and mask: a token sees only tokens of its own segment;
            segments are contiguous and ascending. None means one segment.
          ragged: layout of rows of different lengths; then tokens and positions are [1, N], and B and T of
            cache and mask are those of `ragged`.

        Returns:
          logits float32 [B, T, V], and the fresh keys and values, each [L, B, T, K, H]; with `ragged`
          [1, N, V] and [L, 1, N, K, H].

        Raises:
          ValueError: there is a cache and no mask.
        """
        x, kv = self.hidden(tokens, positions, cache, mask, segments, ragged)
        return self.unembed(x), kv


def exact_matmuls(model: Transformer):
    """A context in which a float32 model multiplies in float32 on every backend; GPUs default to TF32."""
    return jax.default_matmul_precision("highest" if model.dtype == jnp.float32 else None)
