"""The transformer: its configuration, layers, attention and GPU kernels.

A pure function of parameters, tokens, position ids, an optional KV cache and an attention mask. It knows
nothing of slots, meshes, tokenizers or sampling, and imports nothing of this package outside this folder.
"""

from typing import TYPE_CHECKING

from refusion_jax.deferred import deferred

if TYPE_CHECKING:
    from refusion_jax.model.config import ModelConfig
    from refusion_jax.model.transformer import Transformer, exact_matmuls

__all__ = ["ModelConfig", "Transformer", "exact_matmuls"]

__getattr__ = deferred(
    __name__,
    {
        "ModelConfig": "refusion_jax.model.config",
        "Transformer": "refusion_jax.model.transformer",
        "exact_matmuls": "refusion_jax.model.transformer",
    },
)
