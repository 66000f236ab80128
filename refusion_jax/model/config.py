"""ModelConfig, the shape of a model, and the shapes of published models."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from refusion_jax.model.rope import RopeScaling

# Sizes beyond every model, which only a damaged file has. Code walks over layers, and sizes are int32.
MOST_LAYERS, MOST_ELEMENTS = 10_000, 2**31 - 1


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and switches of the transformer. Hashable; holds no runtime choices such as dtype or kernel.

    Attributes:
      vocab_size: V, rows of the embedding and columns of the head.
      num_layers: L.
      embed_dim: D, the width.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads; N / K query heads share each.
      head_dim: H; N x H need not be D.
      mlp_dim: F, the hidden width of the MLP.
      rope_theta: base of the RoPE frequencies.
      norm_eps: added to the mean square in every RMSNorm.
      qk_norm: whether each head's q and k pass through RMSNorm before RoPE (Qwen3).
      qkv_bias: whether the q, k and v projections have a bias (Qwen2.5).
      tie_embeddings: whether the head is the transposed embedding.
      rope_scaling: scaling of the RoPE frequencies for longer contexts, a RopeScaling or a mapping of its
        fields; None for no scaling.

    Raises:
      ValueError: a size is below 1, or fields do not fit together.
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
        if isinstance(self.rope_scaling, Mapping):  # from a configuration file
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
            most = MOST_LAYERS if name == "num_layers" else MOST_ELEMENTS
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most}, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if not 0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta must be above 0 and finite, got {self.rope_theta}")
        if not 0 <= self.norm_eps < math.inf:
            raise ValueError(f"norm_eps must be 0 or above and finite, got {self.norm_eps}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (RoPE rotates halves), got {self.head_dim}")

    @classmethod
    def tiny(cls, vocab_size: int = 260) -> "ModelConfig":
        """140 thousand parameters, for tests and the demo."""
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
