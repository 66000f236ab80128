"""The device mesh and what lies where on it: the only file that names mesh axes.

Arrays name their axes by meaning ("embed", "act_batch", …: see the einsum letters in model.py). RULES
says which mesh axis splits each of them:

  data    copies of the parameters, each with its own rows of the batch;
  fsdp    rows of the batch too, and the parameters split along D, gathered layer by layer as needed;
  tensor  heads, MLP and vocabulary split, so that one matrix product runs on several devices.

An axis of the model that its mesh axis does not divide (3 key/value heads over tensor=2) stays whole on
every device of that mesh axis, in parameters and activations alike: correct, only less is saved.
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

# Logical axis -> mesh axis or axes that split it; None keeps it whole. The first rows are of parameters,
# the `act_` rows of activations; `act_x` stays whole where `x` does.
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
    """How many devices each mesh axis takes.

    Attributes:
      data: devices (groups of them) that hold whole copies of the parameters; -1 takes what is left.
      fsdp: devices the parameters are split over along the model's width; -1 takes what is left.
      tensor: devices that share each matrix product; -1 takes what is left.
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
    # Auto axes: the compiler propagates shardings. Linen's logical constraints fail with Explicit ones.
    types = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=types, devices=devices)


def tensor_mesh(count: int) -> Mesh:
    """The first `count` devices, which share each matrix product: what decoding on several takes.

    Raises:
      BadInput: there are not so many.
    """
    there = jax.devices()
    if not 1 <= count <= len(there):
        raise BadInput(f"--tensor must be 1 to the {len(there)} devices there are, found {count}")
    return make_mesh(MeshConfig(data=1, tensor=count), there[:count])


def sizes(config: MeshConfig, count: int) -> MeshConfig:
    """`config` for `count` devices, with the size that -1 stands for.

    Raises:
      BadInput: the sizes do not multiply to the number of devices.
    """
    given = dataclasses.asdict(config)
    product = math.prod(size for size in given.values() if size != -1)
    left = count // product if -1 in given.values() else 1
    if product * left != count:
        shape = ", ".join(f"{name}={size}" for name, size in given.items())
        raise BadInput(f"mesh: {shape} must multiply to the {count} devices there are")
    return MeshConfig(**{name: left if size == -1 else size for name, size in given.items()})


class Layout(NamedTuple):
    """Where the arrays of a model, or of a training state, lie on a mesh.

    Attributes:
      mesh: the devices.
      rules: RULES with None for each axis of this model that the mesh does not divide.
      shardings: a NamedSharding for each array, in the structure of the unboxed tree.
    """

    mesh: Mesh
    rules: Rules
    shardings: Any

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Within it the model's logical constraints mean `rules` on `mesh`.

        Enter it inside the function that jit traces: then they hold wherever that is called from.
        """
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh), nn.logical_axis_rules(self.rules):
            yield


def layout(boxed: Any, mesh: Mesh) -> Layout:
    """The layout of a tree on `mesh`.

    Args:
      boxed: abstract arrays in Linen's partitioning boxes (`eval_shape` of an init); those without a box
        lie on every device.
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
    """The ShapeDtypeStructs of `abstract` with `shardings` in them, as restore and AOT compiling want."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Rows over (data, fsdp); the row axis comes after `leading` axes that stay whole."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts `batch_sharding` cuts the rows."""
    return _size(mesh, BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def row_group(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which of how many groups of rows of each batch this process has to supply.

    Processes whose devices hold the same rows (those along `tensor`) are in the same group.

    Raises:
      BadInput: some processes' rows overlap without being the same.
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
