"""AdamW with linear warm-up, cosine decay and gradient clipping."""

import dataclasses
from typing import Any

import jax
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, linear warm-up, cosine decay, clipping by the global norm of the gradients.

    Attributes:
      learning_rate: peak learning rate.
      warmup_steps: steps over which the learning rate rises linearly to its peak.
      final_fraction: learning rate at the end of the run, as a fraction of the peak.
      b1: decay rate per step of Adam's first moment, the mean of gradients.
      b2: decay rate per step of Adam's second moment, the mean of squared gradients.
      eps: added to the square root of the second moment.
      weight_decay: decay per step, times the learning rate, of matrices; norms and biases do not decay.
      clip_norm: gradients with a larger global norm are scaled down to it.
      mean_dtype: dtype of Adam's first moment: "float32", or "bfloat16" to save 2 bytes per parameter.
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
        """The learning rate as a function of the number of updates done, in a run of `steps`."""
        peak, warmup = self.learning_rate, self.warmup_steps
        # The first update already has a positive rate, and the last of the warm-up has the peak.
        rise = optax.linear_schedule(peak / max(warmup, 1), peak, warmup - 1)
        decay = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), self.final_fraction)
        return optax.join_schedules([rise, decay], [warmup])

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """The optimizer of a run of `steps` updates."""
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
    """A tree of bools: False for scales of norms and for biases, True for all other parameters.

    Decided by name, because the scales of stacked layers have two axes as well.
    """

    def matrix(path: tuple, _: Any) -> bool:
        names = [str(getattr(key, "key", "")) for key in path]
        return not any(name == "scale" or name.endswith("_bias") for name in names)

    return jax.tree_util.tree_map_with_path(matrix, params)
