"""The training objectives: how each corrupts a batch, which tokens attend to which, and its FLOPs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from refusion_jax.baselines.objectives import ar, bd3, mdm
from refusion_jax.diffusion import slot_diffusion
from refusion_jax.diffusion.segments import Batch
from refusion_jax.diffusion.slot_diffusion import DiffusionConfig, Noised

Array = jax.Array


class Objective(NamedTuple):
    """The functions of an objective that the training step calls.

    Attributes:
      corrupt: (key of the step, batch, config, mask id) -> inputs, targets and weights.
      attention_kwargs: (noised batch, whether rows hold several examples) -> the keyword arguments of the
        model that say which tokens attend to which.
      flop_counts: (prompt_len, total_len, config) of any one shape -> float32 of that shape: number of input
        tokens of each example, and number of its (query, key) pairs that attention computes; the arguments
        of `flops.train_flops`.
      causal: as in Transformer.
    """

    corrupt: Callable[[Array, Batch, DiffusionConfig, int | None], Noised]
    attention_kwargs: Callable[[Noised, bool], dict[str, Any]]
    flop_counts: Callable[[Array, Array, DiffusionConfig], tuple[Array, Array]]
    causal: bool = True


def _segments_if_packed(noised: Noised, packed: bool) -> dict[str, Any]:
    # In a causal pass the one example of a row does not see the padding after it anyway.
    return {"segments": noised.segments if packed else None}


def _segments(noised: Noised, packed: bool) -> dict[str, Any]:
    return {"segments": noised.segments}


def _causal_flop_counts(prompt_len: Array, total_len: Array, config: DiffusionConfig) -> tuple[Array, Array]:
    length = jnp.asarray(total_len, jnp.float32)
    return length, jnp.square(length) / 2


OBJECTIVES = {
    "refusion": Objective(slot_diffusion.corrupt, _segments_if_packed, _causal_flop_counts),
    "ar": Objective(ar.corrupt, _segments_if_packed, _causal_flop_counts),
    "mdm": Objective(mdm.corrupt, _segments, mdm.flop_counts, causal=False),
    "bd3": Objective(bd3.corrupt, bd3.attention_kwargs, bd3.flop_counts),
}
