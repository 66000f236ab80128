"""The training objective of ReFusion (arXiv 2512.13586, section 3.2).

`draw` chooses the noise, `rearrange` applies it, `loss` weighs the predictions: pure functions of arrays, of
which only `draw` uses randomness. Training computes the same loss without materialising all logits, by
`slot_diffusion.loss_of_states`. Imports nothing of this package outside this folder.
"""

from typing import TYPE_CHECKING

from refusion_jax.deferred import deferred

if TYPE_CHECKING:
    from refusion_jax.diffusion.slot_diffusion import (
        DiffusionConfig,
        Draw,
        Noised,
        corrupt,
        draw,
        loss,
        rearrange,
    )

__all__ = ["DiffusionConfig", "Draw", "Noised", "corrupt", "draw", "loss", "rearrange"]

__getattr__ = deferred(__name__, dict.fromkeys(__all__, "refusion_jax.diffusion.slot_diffusion"))
