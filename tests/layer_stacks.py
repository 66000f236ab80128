"""Parameters with layers stacked, for tests of the scanned model."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the scanned model from those of the unrolled one: leaves of `layers` gain axis L."""
    depth = sum(name.startswith("layers_") for name in params)
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("layers_")}
    layers = [params[f"layers_{i}"] for i in range(depth)]
    return rest | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}
