"""What a run can be trained to do, and what each objective asks of the training step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from refusion_jax.baselines.objectives import ar, bd3, mdm
from refusion_jax.diffusion import slot_diffusion
from refusion_jax.diffusion.slot_diffusion import Batch, DiffusionConfig, Noised

Array = jax.Array

OBJECTIVES = ("refusion", "ar", "mdm", "bd3")


class Objective(NamedTuple):
    """An objective as the training step uses it.

    Attributes:
      corrupt: (key of the step, batch) -> what the model is fed and what is asked of it.
      attention_kwargs: what is fed -> the model's keyword arguments that say which tokens attend to which.
      flop_counts: prompt_len and total_len, of any shape -> float32, the tokens fed of each example and the
        pairs of a query and a key that attention covers; for `flops.train_flops`.
      causal: as in Transformer.
    """

    corrupt: Callable[[Array, Batch], Noised]
    attention_kwargs: Callable[[Noised], dict[str, Any]]
    flop_counts: Callable[[Array, Array], tuple[Array, Array]]
    causal: bool = True


def make_objective(
    name: str, config: DiffusionConfig, max_examples_per_row: int, mask_id: int | None
) -> Objective:
    """The objective of OBJECTIVES that has the name.

    Args:
      name: of the objective.
      config: the noise.
      max_examples_per_row: E.
      mask_id: the mask token; "ar" needs none.
    """
    given = {"config": config, "mask_id": mask_id}
    # Where attention is causal, one example per row does not see the padding after it anyway.
    segments = _segments if max_examples_per_row > 1 else _no_segments
    match name:
        case "refusion":
            corrupt = functools.partial(
                slot_diffusion.corrupt, **given, max_examples_per_row=max_examples_per_row
            )
            return Objective(corrupt, segments, _causal_counts)
        case "ar":
            return Objective(ar.corrupt, segments, _causal_counts)
        case "mdm":
            return Objective(
                functools.partial(mdm.corrupt, **given), _segments, mdm.flop_counts, causal=False
            )
        case "bd3":
            counts = functools.partial(bd3.flop_counts, block_len=config.block_len)
            return Objective(functools.partial(bd3.corrupt, **given), _block_mask, counts)
    raise ValueError(f"no objective {name!r}")


def _segments(noised: Noised) -> dict[str, Any]:
    return {"segments": noised.segments}


def _no_segments(noised: Noised) -> dict[str, Any]:
    del noised
    return {"segments": None}


def _block_mask(noised: Noised) -> dict[str, Any]:
    return {"mask": bd3.visible(noised)}


def _causal_counts(prompt_len: Array, total_len: Array) -> tuple[Array, Array]:
    length = jnp.asarray(total_len, jnp.float32)
    return length, jnp.square(length) / 2
