"""AdamW with warm-up, cosine decay and clipping."""

import dataclasses
from typing import Any

import jax
import optax

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, linear warm-up, cosine decay, clipping of the gradients' global norm.

    Attributes:
      learning_rate: at its peak.
      warmup_steps: over which it rises to the peak.
      final_fraction: of the peak, at the last step.
      b1: decay of the mean of gradients, a step.
      b2: decay of the mean of squared gradients, a step.
      eps: added to the root of the latter.
      weight_decay: of matrices, times the learning rate, a step; norms and biases do not decay.
      clip_norm: largest global norm of the gradients.
      mean_dtype: the mean of gradients is kept in, "float32" or "bfloat16", which saves 2 bytes a parameter.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 0
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    mean_dtype: str = "float32"

    def __post_init__(self):
        for name in ("learning_rate", "warmup_steps", "final_fraction", "eps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: must be at least 0, found {getattr(self, name)}")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: must be in [0, 1), found {getattr(self, name)}")
        if self.mean_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"mean_dtype: must be float32 or bfloat16, found {self.mean_dtype!r}")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm: must be positive, found {self.clip_norm}")

    def schedule(self, steps: int) -> optax.Schedule:
        """The learning rate of the update that follows `step` updates, in a run of `steps`."""
        warmup = self.warmup_steps
        decay = optax.cosine_decay_schedule(self.learning_rate, max(steps - warmup, 1), self.final_fraction)
        if not warmup:
            return decay
        # The first update has a share of the peak already: (step + 1) / warmup.
        rise = optax.linear_schedule(self.learning_rate / warmup, self.learning_rate, warmup - 1)
        return optax.join_schedules([rise, decay], [warmup])

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """The optimiser of a run of `steps`."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(
                self.schedule(steps),
                b1=self.b1,
                b2=self.b2,
                eps=self.eps,
                weight_decay=self.weight_decay,
                mask=_is_matrix,
                mu_dtype=self.mean_dtype,
            ),
        )


def _is_matrix(params: Any) -> Any:
    """True for each parameter that is a matrix: not the norms' scales, not the biases.

    Told by name: stacked layers give a scale two axes as well.
    """

    def matrix(path: tuple, _: Any) -> bool:
        names = [str(getattr(key, "key", "")) for key in path]
        return not any(name == "scale" or name.endswith("_bias") for name in names)

    return jax.tree_util.tree_map_with_path(matrix, params)
