"""Whole parameters as arrays, for comparison; the package itself reads them shard by shard."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from refusion_jax.checkpoints import hugging_face, orbax_io
from refusion_jax.checkpoints.safetensors_io import read_folder
from refusion_jax.weights.lazy import load_to_devices


def load_params(folder, config, dtype=None) -> dict[str, Any]:
    """The unrolled model's parameters from a Hugging Face folder, cast to dtype if one is given."""
    params = hugging_face.from_tensors(config, read_folder(folder), folder)
    return load_to_devices(
        params, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), params)
    )


def restore_params(folder, abstract) -> Any:
    """The newest parameters of a run's folder, with the dtypes and shardings of `abstract`."""
    saved = orbax_io.saved_params(folder)
    orbax_io.check_shapes(folder, saved, abstract)
    return load_to_devices(saved, abstract)


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the scanned model from those of the unrolled one: leaves of `layers` gain axis L."""
    depth = sum(name.startswith("layers_") for name in params)
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("layers_")}
    layers = [params[f"layers_{i}"] for i in range(depth)]
    return rest | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the unrolled model from those of the scanned one."""
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    depth = jax.tree.leaves(params["layers"])[0].shape[0]
    return rest | {
        f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(depth)
    }
