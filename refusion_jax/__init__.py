"""ReFusion in JAX: slot-level plan-and-infill masked diffusion language models."""

from refusion_jax.loader import load

__all__ = ["load"]
