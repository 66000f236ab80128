"""The FLOPs of a training step, the numerator of MFU; `devices.peak_flops` is the denominator.

The convention is the usual one, so that figures compare with others':

  FLOPs of a step = sum over its examples, of l tokens each, of  6 P l + 12 L N H a

P is every parameter once, forward (2) and backward (4); it counts norms and, in an untied model, the
embedding, though a lookup multiplies nothing. The second term is attention, a being the pairs of a query and
a key it may see: forward, scores and their product with the values take 2 x 2 a N H a layer; backward twice
that. Causal attention has l^2 / 2 pairs, bidirectional (mdm) l^2. Of bd3 l counts the response twice, which
is fed twice, and a what its mask lets through. Padding is not computed for, and l is the example's length,
not the row's; what rematerialisation computes again does not count either. So it is work that had to be done,
whoever did it.
"""

import jax
import jax.numpy as jnp

from refusion_jax.model.transformer import ModelConfig

Array = jax.Array


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the model, a tied embedding counted once."""
    c = config
    projections = 2 * c.embed_dim * (c.num_heads + c.num_kv_heads) * c.head_dim
    norms = 2 * c.embed_dim + 2 * c.head_dim * c.qk_norm
    biases = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim * c.qkv_bias
    layer = projections + 3 * c.embed_dim * c.mlp_dim + norms + biases
    tables = c.vocab_size * c.embed_dim * (1 if c.tie_embeddings else 2)
    return tables + c.num_layers * layer + c.embed_dim


def train_flops(config: ModelConfig, lengths: Array, pairs: Array) -> Array:
    """FLOPs of one training step, float32 []; see the module's formula.

    Args:
      config: the model's shape.
      lengths: l, [B] or [B, places of a row], tokens fed of each example; 0 for none.
      pairs: a, likewise.
    """
    attention = 12 * config.num_layers * config.num_heads * config.head_dim
    return 6.0 * num_parameters(config) * jnp.sum(lengths) + attention * jnp.sum(pairs)
