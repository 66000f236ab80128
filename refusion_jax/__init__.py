"""ReFusion in JAX: slot-level plan-and-infill masked diffusion language models."""

from typing import TYPE_CHECKING

from refusion_jax.deferred import deferred

if TYPE_CHECKING:
    from refusion_jax import diffusion
    from refusion_jax.loader import load

__version__ = "0.1.0"

__all__ = ["__version__", "diffusion", "load"]

__getattr__ = deferred(__name__, {"diffusion": "refusion_jax.diffusion", "load": "refusion_jax.loader"})
