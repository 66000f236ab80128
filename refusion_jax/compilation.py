"""Compiled programs are kept between runs, so that what is started again starts faster."""

import os
from pathlib import Path

import jax


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs.

    They are stored in JAX_COMPILATION_CACHE_DIR if that is set, otherwise in XDG_CACHE_HOME/refusion_jax or
    ~/.cache/refusion_jax.
    """
    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "refusion_jax"))
