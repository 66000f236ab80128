"""The slot decoder (arXiv 2512.13586, section 3.3): plan, verify, infill and commit in one `lax.while_loop`.

Works on token ids and arrays. Text, files and user requests belong to `serving`. May import `model`, and the
device limits of `devices`.
"""

from typing import TYPE_CHECKING

from refusion_jax.deferred import deferred

if TYPE_CHECKING:
    from refusion_jax.decode.batch import Shape
    from refusion_jax.decode.config import DecodeConfig
    from refusion_jax.decode.loop import sample
    from refusion_jax.decode.samples import Samples

__all__ = ["DecodeConfig", "Samples", "Shape", "sample"]

__getattr__ = deferred(
    __name__,
    {
        "DecodeConfig": "refusion_jax.decode.config",
        "Samples": "refusion_jax.decode.samples",
        "Shape": "refusion_jax.decode.batch",
        "sample": "refusion_jax.decode.loop",
    },
)
