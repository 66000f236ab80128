"""Low-rank adaptation (LoRA, arXiv 2106.09685): parameter trees of a frozen model and its adapters.

The kernels of the model are frozen. For each target kernel W, two thin matrices are trained, whose product is
added to it:

  W + alpha / rank * A B,   A uniform in +- 1 / sqrt(inputs), B zero at first, as in the PEFT library

At step 0 the adapted model therefore equals the original. The parameters of an adapted model are trained and
stored as

  {"base": the original parameters, "lora": {... {"q": {"a", "b"}} ...}, "scale": alpha / rank}

`beside` gives the parameters of a Transformer with `adapter`, which computes x W + scale * (x A) B;
`merge_lazy` those of a plain Transformer, which computes x (W + scale * A B). Adapters for mask tokens only
(`LoraConfig.only_masks`) have "mask_embedding" [D] in "lora" and cannot be merged.

A tree without the key "lora" is a plain model; every function here returns it unchanged, so callers need not
check. The axes of a kernel are its input axes, then its output axes: A has the former, B the latter. In the
scanned model all three begin with L.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from refusion_jax.weights import lazy
from refusion_jax.weights.lazy import Index, LazyArray

Array = jax.Array
Params = Mapping[str, Any]

# Kernel -> number of its input axes. Hugging Face's names are q_proj, k_proj and so on.
TARGETS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}
MASK_EMBEDDING = "mask_embedding"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation of the model in train.init_from, instead of training all its parameters.

    Attributes:
      rank: rank of the adapters A B; 0 trains all parameters and no adapters.
      alpha: scale of the adapters; alpha / rank times A B is added to a kernel.
      targets: names of the adapted kernels of every layer, among q, k, v, o, gate, up and down.
      only_masks: the adapters act at mask tokens only, and the mask token's embedding is trained with them.
        Left to right the model stays the model in train.init_from. For the objective refusion only.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = tuple(TARGETS)
    only_masks: bool = False

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 0:
            raise ValueError(f"rank must be at least 0, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}")
        if not self.targets or not set(self.targets) <= TARGETS.keys():
            raise ValueError(f"targets must be some of {', '.join(TARGETS)}, got {self.targets}")


def init(config: LoraConfig, key: Array, base: Params, dtype: Any, mask_id: int | None = None) -> Params:
    """The parameters of an adapted model that computes the same as `base`.

    Args:
      config: the adapters; with rank 0, `base` is returned unchanged.
      key: random key of A.
      base: parameters of the scanned or the unrolled model, with or without Linen's partitioning boxes.
      dtype: dtype in which the base is stored; A, B, the mask token's embedding and the scale are float32.
      mask_id: id of the mask token, for `only_masks`.

    Returns:
      the tree described in the module's docstring; A and B are boxed if their kernel is.
    """
    if not config.rank:
        return base
    pairs = {}
    for number, (path, kernel) in enumerate(sorted(flatten_dict(base).items())):
        if path[-1] in config.targets:
            pairs[path] = _pair(jax.random.fold_in(key, number), path, kernel, config.rank)
    trained = unflatten_dict(pairs)
    if config.only_masks:
        trained[MASK_EMBEDDING] = _row(base["embedding"], mask_id)
    return {
        "base": jax.tree.map(lambda leaf: leaf.astype(dtype), base),
        "lora": trained,
        "scale": jnp.float32(config.alpha / config.rank),
    }


def split(params: Params) -> tuple[Params, Params]:
    """(trained, frozen) parameters; of a plain model, all parameters and an empty dict."""
    if "lora" not in params:
        return params, {}
    return params["lora"], {name: part for name, part in params.items() if name != "lora"}


def combine(trained: Params, frozen: Params) -> Params:
    """The inverse of `split`."""
    return {"lora": trained, **frozen} if frozen else trained


def base_of(params: Params) -> Params:
    """The parameters of the model that is adapted."""
    return params["base"] if "lora" in params else params


def only_masks(params: Params) -> bool:
    """Whether `params` have adapters for mask tokens only."""
    return MASK_EMBEDDING in params.get("lora", {})


def rank_and_targets(params: Params) -> tuple[int, tuple[str, ...]]:
    """The rank of the adapters in `params`, and the names of the adapted kernels."""
    found = {path[-1]: a.shape[-1] for path, a, _ in _pairs(params)}
    return max(found.values()), tuple(name for name in TARGETS if name in found)


def beside(params: Params) -> Params:
    """The parameters of a Transformer with `adapter`; arrays or LazyArrays."""
    if "lora" not in params:
        return params
    leaves = flatten_dict(params["base"])
    for path, a, b in _pairs(params):
        *layer, name = path
        leaves[*layer, f"{name}_lora_a"], leaves[*layer, f"{name}_lora_b"] = a, b
    if only_masks(params):
        leaves[MASK_EMBEDDING,] = params["lora"][MASK_EMBEDDING]
    return unflatten_dict(leaves)


def unstack(params: Params) -> Params:
    """`lazy.unstack` of a plain or an adapted model."""
    if "lora" not in params:
        return lazy.unstack(params)
    return params | {name: lazy.unstack(params[name]) for name in ("base", "lora")}


def merge_lazy(params: Params, dtype: Any = None) -> Params:
    """The plain parameters of an adapted model of LazyArrays.

    Args:
      params: parameters that have not been read yet, with adapters that act at all tokens, or without.
      dtype: dtype of the merged kernels, which are computed in float32; None for those of the base.
    """
    if "lora" not in params:
        return params
    assert not only_masks(params), "adapters of mask tokens cannot be merged"
    kernels = flatten_dict(params["base"])
    for path, a, b in _pairs(params):
        kernels[path] = _merged(kernels[path], a, b, params["scale"], path, dtype)
    return unflatten_dict(kernels)


def _pair(key: Array, path: tuple[str, ...], kernel: Any, rank: int) -> dict[str, Any]:
    """A and B of one kernel."""
    boxed = isinstance(kernel, nn.LogicallyPartitioned)
    shape = kernel.value.shape if boxed else kernel.shape
    names = kernel.names if boxed else (None,) * len(shape)
    stacked = _stacked(path)
    middle = stacked + TARGETS[path[-1]]
    bound = 1 / math.sqrt(math.prod(shape[stacked:middle]))
    a = jax.random.uniform(key, (*shape[:middle], rank), jnp.float32, -bound, bound)
    b = jnp.zeros((*shape[:stacked], rank, *shape[middle:]), jnp.float32)
    if boxed:
        a = nn.LogicallyPartitioned(a, (*names[:middle], None))
        b = nn.LogicallyPartitioned(b, (*names[:stacked], None, *names[middle:]))
    return {"a": a, "b": b}


def _row(table: Any, index: int) -> Any:
    """Row `index` of a table, in float32."""
    if isinstance(table, nn.LogicallyPartitioned):
        return nn.LogicallyPartitioned(_row(table.value, index), table.names[1:])
    return table[index].astype(jnp.float32)


def _pairs(params: Params) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """(path of the kernel, A, B) of each target."""
    halves = flatten_dict(params["lora"])
    for path in sorted({path[:-1] for path in halves if path != (MASK_EMBEDDING,)}):
        yield path, halves[*path, "a"], halves[*path, "b"]


def _stacked(path: tuple[str, ...]) -> int:
    """Number of leading layer axes of a kernel: 1 in the scanned model, otherwise 0."""
    return int(path[0] == "layers")


def _product(a: np.ndarray, b: np.ndarray, stacked: int) -> np.ndarray:
    """A B in the shape of the kernel."""
    layers, rank = a.shape[:stacked], a.shape[-1]
    shape = (*a.shape[:-1], *b.shape[stacked + 1 :])
    return (a.reshape(*layers, -1, rank) @ b.reshape(*layers, rank, -1)).reshape(shape)


def _merged(
    kernel: LazyArray, a: LazyArray, b: LazyArray, scale: LazyArray, path: tuple[str, ...], dtype: Any
) -> LazyArray:
    stacked, middle = _stacked(path), len(a.shape) - 1
    dtype = kernel.dtype if dtype is None else np.dtype(dtype)

    def read(index: Index) -> np.ndarray:
        whole = slice(None)
        a_part = a.read((*index[:middle], whole)).astype(np.float32)
        b_part = b.read((*index[:stacked], whole, *index[middle:])).astype(np.float32)
        delta = scale.whole() * _product(a_part, b_part, stacked)
        return (kernel.read(index).astype(np.float32) + delta).astype(dtype)

    return dataclasses.replace(kernel, dtype=dtype, read=read)
