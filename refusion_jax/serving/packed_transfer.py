"""Packs small arrays into one, to move them between host and device in one transfer.

A transfer takes tens of microseconds however small the array is, and a request has a dozen arrays.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


class Packed(struct.PyTreeNode):
    """A tree of arrays packed into one array; either all NumPy arrays or all device arrays.

    Attributes:
      words: int32 [N], the bits of all entries in order; a bool entry takes one word, 0 or 1.
      layout: the tree structure, and the shape and dtype of each of its arrays.
    """

    words: np.ndarray | jax.Array
    layout: tuple[Any, tuple[tuple[tuple[int, ...], np.dtype], ...]] = struct.field(pytree_node=False)

    @classmethod
    def pack(cls, tree: Any) -> "Packed":
        """Packs a tree of arrays whose dtypes are bool or 32 bits wide."""
        leaves, structure = jax.tree.flatten(tree)
        concatenate = jnp.concatenate if isinstance(leaves[0], jax.Array) else np.concatenate
        words = [leaf.astype(np.int32) if leaf.dtype.kind == "b" else leaf.view(np.int32) for leaf in leaves]
        layout = structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        return cls(concatenate([part.reshape(-1) for part in words]), layout)

    def unpack(self) -> Any:
        """The tree of arrays that was packed."""
        structure, arrays = self.layout
        leaves, start = [], 0
        for shape, dtype in arrays:
            end = start + math.prod(shape)
            part = self.words[start:end].reshape(shape)
            leaves.append(part != 0 if dtype.kind == "b" else part.view(dtype))
            start = end
        return jax.tree.unflatten(structure, leaves)
