"""int8 weights for decoding: symmetric, one scale per output channel; activations are not quantised.

Why not qwix (0.1.8): it quantises whole arrays, which it finds by tracing the model's matrix products. Here a
checkpoint is quantised while it is read, by each process for its own shards. And qwix multiplies with XLA,
which on GPUs reads int8 no faster than bfloat16; `model.kernels.triton_int8` does.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refusion_jax.weights.lazy import Index, LazyArray

LARGEST = 127
# Name of each quantised matrix -> number of leading axes that its product contracts.
MATRICES = {"q": 1, "k": 1, "v": 1, "qkv": 1, "o": 2, "gate": 1, "up": 1, "gate_up": 1, "down": 1, "head": 1}


def quantize(params: Mapping[str, Any], rest: Any = None) -> dict[str, Any]:
    """Converts the parameters of a Transformer without `int8` to those of one with it.

    Args:
      params: arrays or LazyArrays of an unrolled model, fused or not. A tied head is not quantised, since it
        is the embedding.
      rest: dtype of all other parameters, such as norms; None keeps theirs.

    Returns:
      the same tree in which each matrix [inputs ..., outputs ...] is int8 `name` [outputs ..., inputs ...]
      and float32 `name_scale` [outputs ...].
    """
    found = {}
    for name, leaf in params.items():
        if isinstance(leaf, Mapping):
            found[name] = quantize(leaf, rest)
        elif name in MATRICES:
            split = _of_lazy if isinstance(leaf, LazyArray) else _of_array
            found[name], found[f"{name}_scale"] = split(leaf, MATRICES[name])
        else:
            found[name] = leaf if rest is None else leaf.astype(rest)
    return found


def _of_array(matrix: Any, num_in: int) -> tuple[jax.Array, jax.Array]:
    matrix = _outputs_first(jnp.asarray(matrix, jnp.float32), num_in)
    scale = _scale(matrix, num_in, jnp)
    return jnp.round(matrix / _expanded(scale, num_in)).astype(jnp.int8), scale


def _of_lazy(matrix: LazyArray, num_in: int) -> tuple[LazyArray, LazyArray]:
    """The quantised matrix and its scales as LazyArrays; only the requested outputs are read."""
    num_out = len(matrix.shape) - num_in
    turned = matrix.transpose((*range(num_in, len(matrix.shape)), *range(num_in)))
    everything = (slice(None),) * num_in
    scales: dict[str, np.ndarray] = {}  # kept from reading the matrix, for reading the scales

    def scale(outputs: Index) -> np.ndarray:
        key = repr(outputs)
        if key not in scales:
            scales[key] = _scale(turned.read((*outputs, *everything)).astype(np.float32), num_in, np)
        return scales[key]

    def numbers(index: Index) -> np.ndarray:
        part = turned.read(index).astype(np.float32)
        return np.round(part / _expanded(scale(index[:num_out]), num_in)).astype(np.int8)

    return (
        LazyArray(turned.shape, np.dtype(np.int8), numbers, matrix.where),
        LazyArray(turned.shape[:num_out], np.dtype(np.float32), scale, matrix.where),
    )


def _outputs_first(matrix: jax.Array, num_in: int) -> jax.Array:
    return jnp.moveaxis(matrix, range(num_in), range(-num_in, 0))


def _scale(matrix: Any, num_in: int, numpy: Any) -> Any:
    """The value of one int8 step per output, [outputs ...], for a matrix [outputs ..., inputs ...]."""
    largest = numpy.max(numpy.abs(matrix), axis=tuple(range(-num_in, 0)))
    return (numpy.where(largest > 0, largest, 1) / LARGEST).astype(numpy.float32)


def _expanded(scale: Any, num_in: int) -> Any:
    return scale.reshape(*scale.shape, *(1,) * num_in)
