"""What a run can be trained to do, and what each of these objectives asks of the training step."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from refusion_jax.baselines.objectives import ar as ar_objective
from refusion_jax.baselines.objectives import bd3 as bd3_objective
from refusion_jax.baselines.objectives import mdm as mdm_objective
from refusion_jax.diffusion import slot_diffusion as diffusion
from refusion_jax.diffusion.slot_diffusion import DiffusionConfig, Noised

Array = jax.Array
# tokens [B, T], prompt_len, total_len and index [B], or [B, E] of rows that hold up to E examples; int32
Batch = Mapping[str, Array]

OBJECTIVES = ("refusion", "ar", "mdm", "bd3")


class Objective(NamedTuple):
    """An objective as the training step uses it.

    Attributes:
      noise: (key of the step, batch) -> what is fed and asked.
      seen: what is fed -> the model's keyword arguments that say which tokens see which.
      work: prompt_len and total_len, of any shape -> float32, how many tokens are fed of each example, and
        how many pairs of a query and a key it may see; for `flops.train_flops`.
      causal: as in Transformer.
    """

    noise: Callable[[Array, Batch], Noised]
    seen: Callable[[Noised], dict[str, Any]]
    work: Callable[[Array, Array], tuple[Array, Array]]
    causal: bool = True


def make_objective(
    name: str, config: DiffusionConfig, max_examples_per_row: int, mask_id: int | None
) -> Objective:
    """The one of OBJECTIVES that has the name.

    Args:
      name: of it.
      config: the noise.
      max_examples_per_row: E, the most examples of a row.
      mask_id: the mask token; "ar" needs none.
    """

    def segments(noised: Noised) -> dict[str, Any]:
        # Where attention is causal one example a row does not see the padding after it anyway.
        return {"segments": noised.segments if max_examples_per_row > 1 or name == "mdm" else None}

    def refusion(key: Array, batch: Batch) -> Noised:
        tokens, *lengths = _rows(batch)
        max_slots = config.max_slots(tokens.shape[1], max_examples_per_row)
        draw = diffusion.draw(key, batch["example_id"], lengths[1] - lengths[0], max_slots, config)
        return diffusion.rearrange(tokens, *lengths, draw, mask_id, config)

    def mdm(key: Array, batch: Batch) -> Noised:
        tokens, *lengths = _rows(batch)
        draw = mdm_objective.draw(key, batch["example_id"], *lengths, tokens.shape[1], config.eps)
        return mdm_objective.corrupt(tokens, *lengths, draw, mask_id)

    def bd3(key: Array, batch: Batch) -> Noised:
        tokens, *lengths = _rows(batch)
        size = tokens.shape[1], config.eps, config.block_len
        draw = mdm_objective.draw(key, batch["example_id"], *lengths, *size)
        return bd3_objective.twice(tokens, *lengths, draw, mask_id, config.block_len)

    match name:
        case "refusion":
            return Objective(refusion, segments, _causal_work)
        case "ar":
            return Objective(lambda _, batch: ar_objective.labelled(*_rows(batch)), segments, _causal_work)
        case "mdm":
            return Objective(mdm, segments, mdm_objective.work, causal=False)
        case "bd3":
            mask = lambda noised: {"mask": bd3_objective.visible(noised)}  # noqa: E731
            return Objective(bd3, mask, lambda *lengths: bd3_objective.work(*lengths, config.block_len))
    raise ValueError(f"no objective {name!r}")


def _rows(batch: Batch) -> tuple[Array, Array, Array]:
    return batch["tokens"], batch["prompt_len"], batch["total_len"]


def _causal_work(prompt_len: Array, total_len: Array) -> tuple[Array, Array]:
    length = jnp.asarray(total_len, jnp.float32)
    return length, jnp.square(length) / 2
