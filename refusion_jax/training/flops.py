"""The work of a training step, in floating-point operations: the numerator of MFU; devices.py has the peaks.

The convention is the usual one, so that figures compare with others':

  FLOPs of a step = sum over its examples, of l tokens each, of  6 P l + 12 L N H a

The first term is the matrix products, 2 P l forward and 4 P l backward. P is the number of parameters; it
includes norms and, in an untied model, the embedding, although a lookup multiplies nothing. The second term
is attention; a is the number of (query, key) pairs that may attend. Per layer, scores and their product with
the values take 2 x 2 a N H forward and twice that backward. Causal attention has a = l^2 / 2, bidirectional
attention (mdm) l^2. For bd3, l counts the response twice, because it is in the input twice, and a counts the
pairs that its mask allows. A teacher reads each example once, forward only, which adds 2 P l + 4 L N H a with
its own P, L, N and H. Neither padding nor rematerialisation counts: l is the length of the example, not of
its row. The figure is therefore the necessary work, independent of the implementation.

In low-rank adaptation the P frozen parameters need no gradient, so their products take 4 P l instead of
6 P l: 2 P l forward and 2 P l for the gradients of their inputs. The Q parameters of A and B add 6 Q l.
"""

import jax
import jax.numpy as jnp

from refusion_jax.model.transformer import ModelConfig
from refusion_jax.weights.lora import LoraConfig

Array = jax.Array
NO_ADAPTERS = LoraConfig()


def num_parameters(config: ModelConfig) -> int:
    """Number of parameters of the model; a tied embedding counts once."""
    c = config
    projections = 2 * c.embed_dim * (c.num_heads + c.num_kv_heads) * c.head_dim
    norms = 2 * c.embed_dim + 2 * c.head_dim * c.qk_norm
    biases = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim * c.qkv_bias
    layer = projections + 3 * c.embed_dim * c.mlp_dim + norms + biases
    tables = c.vocab_size * c.embed_dim * (1 if c.tie_embeddings else 2)
    return tables + c.num_layers * layer + c.embed_dim


def num_adapter_parameters(config: ModelConfig, lora: LoraConfig) -> int:
    """Number of parameters of A and B in all layers."""
    c = config
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    # Of every kernel, the side that is not the model's width.
    sides = {"q": queries, "k": keys, "v": keys, "o": queries, "gate": c.mlp_dim, "up": c.mlp_dim}
    sides["down"] = c.mlp_dim
    return c.num_layers * lora.rank * sum(c.embed_dim + sides[name] for name in lora.targets)


def train_flops(config: ModelConfig, lengths: Array, pairs: Array, lora: LoraConfig = NO_ADAPTERS) -> Array:
    """FLOPs of one training step, float32 []; the formula is in the module's docstring.

    Args:
      config: the model's shape.
      lengths: [B] or [B, E], l: number of input tokens of each example; 0 for unused entries.
      pairs: of the same shape, a: number of (query, key) pairs of each example.
      lora: the adapters; with rank 0 all parameters are trained.
    """
    of_model = (4.0 if lora.rank else 6.0) * num_parameters(config)
    of_adapters = 6.0 * num_adapter_parameters(config, lora)
    return (of_model + of_adapters) * jnp.sum(lengths) + 3 * _forward_attention(config, pairs)


def forward_flops(config: ModelConfig, lengths: Array, pairs: Array) -> Array:
    """FLOPs of a forward pass over the same examples, as a teacher takes it, float32 []."""
    return 2.0 * num_parameters(config) * jnp.sum(lengths) + _forward_attention(config, pairs)


def _forward_attention(config: ModelConfig, pairs: Array) -> Array:
    return 4 * config.num_layers * config.num_heads * config.head_dim * jnp.sum(pairs)
