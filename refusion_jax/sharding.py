"""The device mesh and the shardings on it; the only file that names mesh axes.

Arrays have logical axes ("embed", "act_batch", ...). RULES maps each logical axis to the mesh axis that
shards it:

  data    data parallel: copies of the parameters, each with its own rows of the batch;
  fsdp    fully sharded data parallel: shards the rows of the batch, and the parameters along D, which are
          gathered layer by layer when they are needed;
  tensor  tensor parallel: shards heads, MLP and vocabulary, so that several devices share a matrix product.

An axis of the model that its mesh axis does not divide (3 key/value heads over tensor=2) is replicated over
that mesh axis, in parameters and activations alike. The results are the same; less memory is saved.
"""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from refusion_jax.errors import BadInput

BATCH_AXES = ("data", "fsdp")

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

# Logical axis -> mesh axis or axes that shard it; None replicates it. The first entries are axes of
# parameters, those with `act_` axes of activations; `act_x` is replicated where `x` is.
RULES: Rules = (
    ("layers", None),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("mlp", "tensor"),
    ("act_batch", BATCH_AXES),
    ("act_length", None),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_kv_heads", "tensor"),
    ("act_mlp", "tensor"),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes, in devices. One of them may be -1: all remaining devices.

    Attributes:
      data: number of copies of the parameters, each on fsdp x tensor devices; -1 takes all remaining devices.
      fsdp: number of devices over which the parameters are sharded along the model's width; -1 likewise.
      tensor: number of devices that share each matrix product; -1 likewise.

    Raises:
      ValueError: a size is neither positive nor -1, or more than one is -1.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"{name} must be at least 1, or -1 for the devices left, got {size}")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"only one of data, fsdp and tensor may be -1, got {sizes}")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over `devices`, all of them by default.

    Raises:
      BadInput: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = dataclasses.asdict(sizes(config, len(devices)))
    # Auto axes: the compiler propagates shardings. Linen's logical constraints fail with Explicit axes.
    types = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=types, devices=devices)


def tensor_mesh(count: int) -> Mesh:
    """The tensor-parallel mesh of the first `count` devices, for decoding on several devices.

    Raises:
      BadInput: there are fewer devices.
    """
    devices = jax.devices()
    if not 1 <= count <= len(devices):
        raise BadInput(f"--tensor must be 1 to the {len(devices)} available devices, found {count}")
    return make_mesh(MeshConfig(data=1, tensor=count), devices[:count])


def sizes(config: MeshConfig, count: int) -> MeshConfig:
    """`config` with the size -1 replaced by its value for `count` devices.

    Raises:
      BadInput: the sizes do not multiply to the number of devices.
    """
    given = dataclasses.asdict(config)
    product = math.prod(size for size in given.values() if size != -1)
    left = count // product if -1 in given.values() else 1
    if product * left != count:
        shape = ", ".join(f"{name}={size}" for name, size in given.items())
        raise BadInput(f"mesh: {shape} must multiply to the {count} available devices")
    return MeshConfig(**{name: left if size == -1 else size for name, size in given.items()})


class Layout(NamedTuple):
    """Shardings of the arrays of a model or of a training state on a mesh.

    Attributes:
      mesh: the devices.
      rules: RULES, with None for each axis of this model that its mesh axis does not divide.
      shardings: a NamedSharding per array, in the structure of the unboxed tree.
    """

    mesh: Mesh
    rules: Rules
    shardings: Any

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """A context in which the model's logical sharding constraints are resolved by `rules` on `mesh`.

        Enter it inside the function that jit traces, so that it holds wherever that function is called.
        """
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh), nn.logical_axis_rules(self.rules):
            yield


def layout(boxed: Any, mesh: Mesh) -> Layout:
    """Computes the layout of a tree on `mesh`.

    Args:
      boxed: abstract arrays in Linen's partitioning boxes (`eval_shape` of an init); arrays without a box
        are replicated.
      mesh: the devices.
    """
    boxes = jax.tree.leaves(boxed, is_leaf=_is_box)
    sizes = {
        name: size
        for box in filter(_is_box, boxes)
        for name, size in zip(box.names, box.value.shape, strict=True)
    }

    def fits(name: str, axes: str | tuple[str, ...] | None) -> bool:
        return axes is None or sizes.get(name.removeprefix("act_"), 0) % _size(mesh, axes) == 0

    rules = tuple((name, axes if fits(name, axes) else None) for name, axes in RULES)
    return Layout(mesh, rules, nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules))


def unbox(tree: Any) -> Any:
    """The arrays of a tree without Linen's partitioning boxes."""
    return nn.meta.unbox(tree)


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """The ShapeDtypeStructs of `abstract` with `shardings` added, for restoring and for compiling ahead."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Shards the rows of a batch over (data, fsdp). The row axis follows `leading` replicated axes."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """The number of shards of the row axis under `batch_sharding`."""
    return _size(mesh, BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def row_group(mesh: Mesh) -> tuple[int, int]:
    """(index, count): the group of rows of each batch that this process supplies, and the number of groups.

    Processes whose devices hold the same rows (along `tensor`) are in the same group.

    Raises:
      BadInput: the rows of two processes overlap without being the same.
    """
    held = collections.defaultdict(set)
    for device, (rows,) in batch_sharding(mesh).devices_indices_map((batch_shards(mesh),)).items():
        held[device.process_index].add(rows.start or 0)
    groups = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, groups)) != batch_shards(mesh) or len({len(rows) for rows in groups}) > 1:
        raise BadInput(f"mesh: {dict(mesh.shape)} does not cut the batch evenly between processes")
    return groups.index(tuple(sorted(held[jax.process_index()]))), len(groups)


def _size(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)
