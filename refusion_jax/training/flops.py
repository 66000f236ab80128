"""What a training step has to compute, and what a device can: the two halves of MFU, and of decoding.

The convention is the usual one, so that figures compare with others':

  FLOPs of a step = sum over its examples, of l tokens each, of  6 P l + 12 L N H a

The first term is the matrix products, 2 P l forward and 4 P l backward. P is the number of parameters; it
includes norms and, in an untied model, the embedding, although a lookup multiplies nothing. The second term
is attention; a is the number of (query, key) pairs that may attend. Per layer, scores and their product with
the values take 2 x 2 a N H forward and twice that backward. Causal attention has a = l^2 / 2, bidirectional
attention (mdm) l^2. For bd3, l counts the response twice, because it is in the input twice, and a counts the
pairs that its mask allows. Neither padding nor rematerialisation counts: l is the length of the example, not
of its row. The figure is therefore the necessary work, independent of the implementation.
"""

import jax
import jax.numpy as jnp

from refusion_jax.model.transformer import ModelConfig

Array = jax.Array

# Dense bf16 matrix products a second of one JAX device, by device_kind; vendors' data sheets, sparsity
# not counted. The names of TPUs are those in jax/_src/pallas/mosaic/tpu_info.py.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # v6e
    "TPU v6e": 918e12,
    # A chip does 2307e12, but JAX sees it as two devices: https://docs.cloud.google.com/tpu/docs/tpu7x
    "TPU7x": 2307e12 / 2,
}

# Bytes a second between a JAX device and its memory; vendors' data sheets.
MEMORY_BANDWIDTH = {
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA A100-PCIE-40GB": 1.555e12,
    "NVIDIA A100 80GB PCIe": 1.935e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H100 NVL": 3.9e12,
    "NVIDIA H100 PCIe": 2.0e12,
    "NVIDIA H200": 4.8e12,
    "TPU v4": 1.228e12,
    "TPU v5 lite": 0.819e12,
    "TPU v5e": 0.819e12,
    "TPU v5": 2.765e12,
    "TPU v5p": 2.765e12,
    "TPU v6 lite": 1.64e12,
    "TPU v6e": 1.64e12,
    "TPU7x": 7.37e12 / 2,
}


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
    attention = 12 * config.num_layers * config.num_heads * config.head_dim
    return 6.0 * num_parameters(config) * jnp.sum(lengths) + attention * jnp.sum(pairs)


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOPs a second of a device, None for kinds not in the table."""
    return PEAK_FLOPS.get(device_kind)


def memory_bandwidth(device_kind: str) -> float | None:
    """Bytes a second from a device's memory, None for kinds not in the table."""
    return MEMORY_BANDWIDTH.get(device_kind)


def ridge_tokens(device_kind: str) -> float | None:
    """How many tokens a forward pass in bfloat16 may feed before computing takes longer than reading the
    weights (2 FLOPs a weight and token against 2 bytes a weight); None for kinds not in the tables."""
    peak, bandwidth = peak_flops(device_kind), memory_bandwidth(device_kind)
    return peak / bandwidth if peak and bandwidth else None
