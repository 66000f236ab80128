"""Low-rank adapters beside the layers' matrices: x W + scale * (x A) B (LoRA, arXiv 2106.09685).

A B is never formed. So with W frozen a training step computes no gradient of W's shape, and an update of A or
B that is small beside W is not lost in W's dtype.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The adapters of a Transformer: those of the matrix `q` are its parameters `q_lora_a` and `q_lora_b`.

    Attributes:
      rank: number of columns of A and of rows of B.
      scale: factor of the product, alpha / rank.
      targets: names of the adapted matrices of every layer.
      mask_id: id of the mask token if the adapters act at mask tokens only, otherwise None. The embedding of
        mask tokens is then the parameter `mask_embedding` [D]; tokens that attend to no mask are computed as
        without adapters.
    """

    rank: int
    scale: float
    targets: tuple[str, ...]
    mask_id: int | None = None

    def adapted(self, tokens: Array) -> Array | None:
        """The tokens that the adapters act on, bool in the shape of `tokens`; None for all of them."""
        return None if self.mask_id is None else tokens == self.mask_id

    def product(
        self,
        module: nn.Module,
        x: Array,
        name: str,
        shape,
        axes,
        num_in: int,
        param_dtype: jnp.dtype,
        adapted: Array | None,
    ) -> Array:
        """scale * (x A) B of the matrix `name`, in the dtype of x; 0 if it is no target.

        Where `adapted` is False it is exactly 0. Only x A, of `rank` numbers a token, is masked for that and
        kept in float32; what has the size of the layer's own products is a product alone, which the compiler
        can add to them.

        Args:
          module: the layer that owns the matrix and declares A and B.
          x: activations, the contracted axes last; A and B are cast to their dtype.
          name: name of the matrix.
          shape: shape of the matrix, contracted axes first.
          axes: logical axis names of `shape`.
          num_in: number of contracted axes.
          param_dtype: dtype of A and B.
          adapted: bool [B, T], the tokens to adapt, or None for all.
        """
        if name not in self.targets:
            return jnp.zeros((*x.shape[: x.ndim - num_in], *shape[num_in:]), x.dtype)
        # `weights.lora.init` and checkpoints give the values.
        zeros = nn.initializers.zeros
        init = nn.with_logical_partitioning(zeros, (*axes[:num_in], None))
        a = module.param(f"{name}_lora_a", init, (*shape[:num_in], self.rank), param_dtype)
        init = nn.with_logical_partitioning(zeros, (None, *axes[num_in:]))
        b = module.param(f"{name}_lora_b", init, (self.rank, *shape[num_in:]), param_dtype)
        inner = self.scale * jnp.tensordot(x, a.astype(x.dtype), num_in, preferred_element_type=jnp.float32)
        if adapted is not None:
            inner = jnp.where(adapted[..., None], inner, 0)
        return jnp.tensordot(inner.astype(x.dtype), b.astype(x.dtype), 1)
