"""Small arrays as one, to cross between host and device at once.

However small an array is, to bring it over takes tens of microseconds, and a request has a dozen.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


class Packed(struct.PyTreeNode):
    """A tree of arrays, of NumPy or all on the device.

    Attributes:
      words: int32 [N], the bits of all entries, one after the other; of bool 0 and 1.
      layout: the tree's structure, and the shape and dtype of each of its arrays.
    """

    words: np.ndarray | jax.Array
    layout: tuple[Any, tuple[tuple[tuple[int, ...], np.dtype], ...]] = struct.field(pytree_node=False)

    @classmethod
    def pack(cls, tree: Any) -> "Packed":
        """From arrays whose entries are bool or take 32 bits."""
        leaves, structure = jax.tree.flatten(tree)
        concatenate = jnp.concatenate if isinstance(leaves[0], jax.Array) else np.concatenate
        words = [leaf.astype(np.int32) if leaf.dtype.kind == "b" else leaf.view(np.int32) for leaf in leaves]
        layout = structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        return cls(concatenate([part.reshape(-1) for part in words]), layout)

    def unpack(self) -> Any:
        """The arrays again."""
        structure, arrays = self.layout
        leaves, start = [], 0
        for shape, dtype in arrays:
            end = start + math.prod(shape)
            part = self.words[start:end].reshape(shape)
            leaves.append(part != 0 if dtype.kind == "b" else part.view(dtype))
            start = end
        return jax.tree.unflatten(structure, leaves)
