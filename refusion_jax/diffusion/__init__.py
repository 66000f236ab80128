"""The training objective of ReFusion (arXiv 2512.13586, section 3.2).

Draw the noise, rearrange the tokens, weigh the loss: pure functions of arrays. `draw` is the only one that
uses randomness. Imports nothing of this package outside this folder.
"""

from typing import TYPE_CHECKING

from refusion_jax.deferred import deferred

if TYPE_CHECKING:
    from refusion_jax.diffusion.slot_diffusion import DiffusionConfig, Draw, Noised, draw, loss, rearrange

__all__ = ["DiffusionConfig", "Draw", "Noised", "draw", "loss", "rearrange"]

__getattr__ = deferred(
    __name__,
    {
        "DiffusionConfig": "refusion_jax.diffusion.slot_diffusion",
        "Draw": "refusion_jax.diffusion.slot_diffusion",
        "Noised": "refusion_jax.diffusion.slot_diffusion",
        "draw": "refusion_jax.diffusion.slot_diffusion",
        "loss": "refusion_jax.diffusion.slot_diffusion",
        "rearrange": "refusion_jax.diffusion.slot_diffusion",
    },
)
