"""Rotary position embedding (RoPE), half-split layout, with the frequency scalings of `transformers`.

Values that depend only on the configuration are computed in numpy, with PyTorch's rounding. Without that, at
large positions one unit in the last place of a frequency would be the largest difference from PyTorch.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# Required fields of each type of scaling.
REQUIRED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of the RoPE frequencies for contexts longer than the original training length.

    Fields are named as in a Hugging Face config.json; a type ignores the fields that it does not use.

    Attributes:
      rope_type: "linear", "llama3" or "yarn".
      factor: ratio of the new to the original context length.
      original_max_position_embeddings: original context length in tokens; llama3 and yarn.
      low_freq_factor: wavelengths above the original length divided by this are stretched by `factor`;
        llama3.
      high_freq_factor: wavelengths below the original length divided by this are unchanged; llama3.
      attention_factor: factor of cosines and sines; None derives it from `factor` and the mscales; yarn.
      beta_fast: dimensions with more rotations than this over the original length are unchanged; yarn.
      beta_slow: dimensions with fewer rotations than this are stretched by `factor`; yarn.
      mscale: weight of log(factor) in the numerator of the attention factor, if both are given; yarn.
      mscale_all_dim: the same in the denominator; yarn.
      truncate: whether the two dimensions that the betas give are rounded outwards; yarn.

    Raises:
      ValueError: a field is missing or out of range for its type.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if not isinstance(self.rope_type, str) or self.rope_type not in REQUIRED:
            raise ValueError(f"rope_type must be one of {', '.join(REQUIRED)}, got {self.rope_type!r}")
        if type(self.truncate) is not bool:
            raise ValueError(f"truncate must be true or false, got {self.truncate!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.name in REQUIRED[self.rope_type]:
                raise ValueError(f"{field.name} is needed for rope_type {self.rope_type!r}")
            if value is None or field.name in ("rope_type", "truncate"):
                continue
            if type(value) not in (int, float) or not value > 0:
                raise ValueError(f"{field.name} must be a positive number, got {value!r}")
            if not 1e-9 < value < 1e12:  # further is no length or ratio
                raise ValueError(f"{field.name} must be a positive number, 1e-9 to 1e12, got {value!r}")
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor must be above low_freq_factor, got {self.high_freq_factor} and "
                f"{self.low_freq_factor}"
            )

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "RopeScaling":
        """A RopeScaling from a mapping; raises ValueError naming a missing, unknown or wrong field."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ValueError(f"{name} is no field of RoPE scaling, known are {', '.join(known)}")
        return cls(**{"rope_type": None, "factor": None} | dict(fields))

    def as_fields(self) -> dict[str, Any]:
        """The fields that are set, for config.json."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if given["truncate"]:
            del given["truncate"]  # the default; older readers do not know the field
        return given


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[np.ndarray, float]:
    """RoPE frequencies in radians per position, float32 [H/2], and the factor of cosines and sines."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # PyTorch rounds its float32 power correctly in nearly all cases, numpy does not; this does.
    periods = (theta ** exponents.astype(np.float64)).astype(np.float32)  # wavelengths divided by 2 pi
    if scaling is None:
        return 1 / periods, 1.0
    if scaling.rope_type == "linear":
        return 1 / periods / np.float32(scaling.factor), 1.0
    if scaling.rope_type == "llama3":
        return _llama3(1 / periods, scaling), 1.0
    return _yarn(periods, theta, scaling), _yarn_attention_factor(scaling)


def _llama3(base: np.ndarray, s: RopeScaling) -> np.ndarray:
    length = s.original_max_position_embeddings
    # PyTorch computes number / tensor as the number times the reciprocal, which rounds twice.
    wavelengths = np.float32(2 * math.pi) * (1 / base)
    smooth = np.float32(length) * (1 / wavelengths) - np.float32(s.low_freq_factor)
    smooth = smooth / np.float32(s.high_freq_factor - s.low_freq_factor)
    stretched = base / np.float32(s.factor)
    between = (1 - smooth) * base / np.float32(s.factor) + smooth * base
    scaled = np.where(wavelengths > length / s.low_freq_factor, stretched, between)
    return np.where(wavelengths < length / s.high_freq_factor, base, scaled)


def _yarn(periods: np.ndarray, theta: float, s: RopeScaling) -> np.ndarray:
    head_dim = 2 * periods.size

    def dimension(turns: float) -> float:
        """The (fractional) dimension with this many rotations over the original length."""
        length = s.original_max_position_embeddings
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(s.beta_fast or 32), dimension(s.beta_slow or 1)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(periods.size, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = 1 - np.clip(ramp, 0, 1)
    return 1 / (np.float32(s.factor) * periods) * (1 - kept) + 1 / periods * kept


def _yarn_attention_factor(s: RopeScaling) -> float:
    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(s.factor) + 1.0 if s.factor > 1 else 1.0

    if s.attention_factor is not None:
        return s.attention_factor
    if s.mscale and s.mscale_all_dim:
        return magnitude(s.mscale) / magnitude(s.mscale_all_dim)
    return magnitude(1)


def rope_tables(
    positions: Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Array, Array]:
    """Cosines and sines of the RoPE angles, float32 [B, T, 1, H/2], for int32 positions [B, T]."""
    per_position, magnitude = frequencies(head_dim, theta, scaling)
    angles = positions.astype(jnp.float32)[..., None, None] * per_position
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def apply_rope(x: Array, rope: tuple[Array, Array]) -> Array:
    """Rotates x [B, T, heads, H] in the half-split layout (channel i pairs with i + H/2)."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
