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
"""

import jax
import jax.numpy as jnp

from refusion_jax.model.transformer import ModelConfig

Array = jax.Array


def num_parameters(config: ModelConfig) -> int:
    """Number of parameters of the model; a tied embedding counts once."""
    c = config
    projections = 2 * c.embed_dim * (c.num_heads + c.num_kv_heads) * c.head_dim
    norms = 2 * c.embed_dim + 2 * c.head_dim * c.qk_norm
    biases = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim * c.qkv_bias
    layer = projections + 3 * c.embed_dim * c.mlp_dim + norms + biases
    tables = c.vocab_size * c.embed_dim * (1 if c.tie_embeddings else 2)
    return tables + c.num_layers * layer + c.embed_dim


def train_flops(config: ModelConfig, lengths: Array, pairs: Array) -> Array:
    """FLOPs of one training step, float32 []; the formula is in the module's docstring.

    Args:
      config: the model's shape.
      lengths: [B] or [B, E], l: number of input tokens of each example; 0 for unused entries.
      pairs: of the same shape, a: number of (query, key) pairs of each example.
    """
    return _flops(config, lengths, pairs, 3)


def forward_flops(config: ModelConfig, lengths: Array, pairs: Array) -> Array:
    """FLOPs of a forward pass over the same examples, as a teacher takes it, float32 []."""
    return _flops(config, lengths, pairs, 1)


def _flops(config: ModelConfig, lengths: Array, pairs: Array, passes: int) -> Array:
    """FLOPs of `passes` passes, each as much work as the forward pass; the backward pass is two."""
    attention = 4 * passes * config.num_layers * config.num_heads * config.head_dim
    return 2.0 * passes * num_parameters(config) * jnp.sum(lengths) + attention * jnp.sum(pairs)
