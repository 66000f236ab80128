"""Whole parameters as arrays, for comparison; the package itself reads them shard by shard."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

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


def merge_adapters(params: Mapping[str, Any]) -> dict[str, Any]:
    """W + scale * A B of an adapted model, in float32, written out with the model's own einsum letters."""
    sums = dict.fromkeys(("q", "k", "v"), "Dr,rNH->DNH") | dict.fromkeys(("gate", "up"), "Dr,rF->DF")
    sums |= {"o": "NHr,rD->NHD", "down": "Fr,rD->FD"}
    kernels, halves = flatten_dict(params["base"]), flatten_dict(params["lora"])
    for *path, half in halves:
        if half != "a":
            continue
        letters = sums[path[-1]]
        if path[0] == "layers":
            letters = "L" + letters.replace(",", ",L").replace("->", "->L")
        delta = np.einsum(letters, halves[*path, "a"], halves[*path, "b"])
        kernels[tuple(path)] = np.asarray(kernels[tuple(path)], "f4") + np.asarray(params["scale"]) * delta
    return unflatten_dict(kernels)
