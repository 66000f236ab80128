"""ReFusion in JAX: slot-level plan-and-infill masked diffusion language models."""
