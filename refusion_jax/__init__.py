"""ReFusion in JAX: slot-level plan-and-infill masked diffusion language models.

Importing the package imports no JAX; its public names are loaded when they are first used.
"""

from typing import TYPE_CHECKING

from refusion_jax import interrupt
from refusion_jax.deferred import deferred
from refusion_jax.version import __version__

if TYPE_CHECKING:
    from refusion_jax import diffusion
    from refusion_jax.loader import load
    from refusion_jax.serving.generate import generate

if interrupt.is_command():  # before the slow imports of the command
    interrupt.install()

__all__ = ["__version__", "diffusion", "generate", "load"]

__getattr__ = deferred(
    __name__,
    {
        "diffusion": "refusion_jax.diffusion",
        "generate": "refusion_jax.serving.generate",
        "load": "refusion_jax.loader",
    },
)
