"""int8 weights for decoding: symmetric, one scale for each output channel, activations left as they are.

Own code, not qwix (0.1.8): that quantises arrays held whole, by names it finds by tracing the model's
products, where a checkpoint is to be quantised as it is read, each process its part; and its products are
those of XLA, which on GPUs read int8 no faster than bfloat16 (triton_int8.py does).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refusion_jax.weights.lazy import Index, LazyArray

LARGEST = 127
# The matrices, and how many of their first axes are summed over.
MATRICES = {"q": 1, "k": 1, "v": 1, "qkv": 1, "o": 2, "gate": 1, "up": 1, "gate_up": 1, "down": 1, "head": 1}


def quantize(params: Mapping[str, Any], rest: Any = None) -> dict[str, Any]:
    """Parameters of a model with `int8` from those of one without.

    Args:
      params: arrays, or LazyArray yet to be read, of an unrolled model, joined or not. Those of a tied head
        keep it: it is the embedding.
      rest: dtype of what is not quantised, the norms say; None leaves it as it is.

    Returns:
      the same, with each matrix [summed over ..., outputs ...] as int8 `name` [outputs ..., summed over ...]
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
    """As they are read, of no more outputs than are asked for."""
    num_out = len(matrix.shape) - num_in
    turned = matrix.transpose((*range(num_in, len(matrix.shape)), *range(num_in)))
    everything = (slice(None),) * num_in
    scales: dict[str, np.ndarray] = {}  # those of the matrix serve once more when they are asked for

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
    """What 1 stands for in each output [outputs ...] of a matrix [outputs ..., summed over ...]."""
    largest = numpy.max(numpy.abs(matrix), axis=tuple(range(-num_in, 0)))
    return (numpy.where(largest > 0, largest, 1) / LARGEST).astype(numpy.float32)


def _expanded(scale: Any, num_in: int) -> Any:
    return scale.reshape(*scale.shape, *(1,) * num_in)
