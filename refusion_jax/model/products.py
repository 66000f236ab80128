"""Products of activations with the layers' matrices, in the forms in which matrices are stored.

Einsum letters as in model/transformer.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from refusion_jax.model.adapter import Adapter

Array = jax.Array


def lecun(num_in: int, num_out: int):
    """LeCun normal initializer of a matrix whose first `num_in` axes are contracted."""
    return nn.initializers.variance_scaling(
        1.0, "fan_in", "normal", tuple(range(num_in)), tuple(range(num_in, num_in + num_out))
    )


@dataclasses.dataclass(frozen=True)
class Weights:
    """How the layers store and multiply their matrices; other fields as in Transformer.

    Attributes:
      int8_kernel: whether products of a few tokens with an int8 matrix use `triton_int8.product`.
      adapter: low-rank adapters beside the matrices, or None.
    """

    dtype: jnp.dtype
    param_dtype: jnp.dtype
    fused: bool = False
    int8: bool = False
    int8_kernel: bool = False
    adapter: Adapter | None = None

    def product(
        self,
        module: nn.Module,
        equation: str,
        x: Array,
        name: str,
        shape,
        axes,
        num_in: int = 1,
        adapted: Array | None = None,
    ) -> Array:
        """x times the parameter `name`, a matrix that `module` declares, plus the product with its adapter.

        Args:
          module: the layer that owns the parameter.
          equation: einsum of x and the matrix.
          x: activations, the contracted axes last.
          name: name of the parameter.
          shape: shape of the matrix, contracted axes first.
          axes: logical axis names of `shape`.
          num_in: number of contracted axes.
          adapted: as in Context.
        """
        y = self._without_adapter(module, equation, x, name, shape, axes, num_in)
        if self.adapter is None or name not in self.adapter.targets:
            return y
        return y + self.low_rank(module, x, name, shape, axes, num_in, adapted)

    def low_rank(
        self, module: nn.Module, x: Array, name: str, shape, axes, num_in: int, adapted: Array | None
    ) -> Array:
        """`Adapter.product` of the matrix `name`, with arguments as in `product`."""
        return self.adapter.product(module, x, name, shape, axes, num_in, self.param_dtype, adapted)

    def _without_adapter(self, module, equation: str, x: Array, name: str, shape, axes, num_in: int) -> Array:
        if not self.int8:
            init = nn.with_logical_partitioning(lecun(num_in, len(shape) - num_in), axes)
            matrix = module.param(name, init, shape, self.param_dtype)
            return jnp.einsum(equation, x, matrix.astype(self.dtype))
        outputs, summed = shape[num_in:], shape[:num_in]
        init = nn.with_logical_partitioning(nn.initializers.zeros, (*axes[num_in:], *axes[:num_in]))
        matrix = module.param(name, init, (*outputs, *summed), jnp.int8)
        init = nn.with_logical_partitioning(nn.initializers.ones, axes[num_in:])
        scale = module.param(f"{name}_scale", init, outputs, jnp.float32)
        return self.int8_product(x, matrix, scale, num_in)

    def int8_product(
        self, x: Array, matrix: Array, scale: Array, num_in: int = 1, dtype: Any = None
    ) -> Array:
        """x [..., contracted] times the int8 matrix [outputs, contracted] and its scale [outputs].

        The result is in `dtype`; None is that of the activations.
        """
        leading, outputs = x.shape[: x.ndim - num_in], scale.shape
        flat = x.reshape(math.prod(leading), -1), matrix.reshape(math.prod(outputs), -1)
        # On a mesh the compiler partitions the product; it cannot partition a kernel.
        kernel = _int8_kernel(*flat) if self.int8_kernel and not nn.get_logical_axis_rules() else None
        if kernel is not None:
            y = kernel(*flat).reshape(*leading, *outputs)
        else:
            summed = tuple(range(x.ndim - num_in, x.ndim)), tuple(range(matrix.ndim - num_in, matrix.ndim))
            y = jax.lax.dot_general(
                x, matrix.astype(self.dtype), (summed, ((), ())), preferred_element_type=jnp.float32
            )
        return (y * scale).astype(dtype or self.dtype)


def _int8_kernel(x: Array, matrix: Array) -> Callable[[Array, Array], Array] | None:
    """The Triton kernel for x [N, D] and matrix [F, D], None if it does not handle them."""
    from refusion_jax.model.kernels import triton_int8  # loads Pallas's Triton backend

    if not triton_int8.fits(x, matrix):
        return None
    return functools.partial(triton_int8.product, interpret=jax.default_backend() != "gpu")
