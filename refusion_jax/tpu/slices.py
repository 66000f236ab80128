"""Descriptions of TPU slices for libtpu's compiler; the slices need not be attached.

A topology is named GENERATION:SHAPE, where SHAPE is the grid of chips ("v5e:4x4", "v5p:4x4x8"), as in Cloud
TPU's documentation (https://cloud.google.com/tpu/docs/system-architecture-tpu-vm).
"""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from refusion_jax.devices import TPU_CHIPS, TPUChip
from refusion_jax.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of chips of one generation.

    Attributes:
      generation: a key of TPU_CHIPS.
      shape: chips along each axis of the grid.
    """

    generation: str
    shape: tuple[int, ...]

    @classmethod
    def named(cls, name: str) -> "Topology":
        """The slice that GENERATION:SHAPE names.

        Raises:
          BadInput: there is no such slice.
        """
        generation, _, shape = name.partition(":")
        if generation not in TPU_CHIPS or shape not in TPU_CHIPS[generation].shapes:
            known = (f"{name}:{{{', '.join(chip.shapes)}}}" for name, chip in TPU_CHIPS.items())
            raise BadInput(f"--topology: must be one of {'; '.join(known)}; found {name!r}")
        return cls(generation, tuple(map(int, shape.split("x"))))

    @property
    def name(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> TPUChip:
        return TPU_CHIPS[self.generation]

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices

    def larger(self) -> list["Topology"]:
        """The slices of the same generation with more chips, in ascending order."""
        named = [Topology.named(f"{self.generation}:{shape}") for shape in self.chip.shapes]
        return [other for other in named if other.num_chips > self.num_chips]

    def devices(self) -> Sequence[jax.Device]:
        """Devices of the slice; programs can be compiled for them and not run.

        Raises:
          BadInput: libtpu, which has the compiler, is not installed.
        """
        if importlib.util.find_spec("libtpu") is None:
            raise BadInput("compiling for TPUs needs libtpu: pip install 'refusion_jax[tpu]'")
        # libtpu must not search for an attached TPU, nor fail where another process holds one.
        for name, value in {
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any valid name
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }.items():
            os.environ.setdefault(name, value)
        flat = len(self.shape) == 2
        # An axis closes into a ring where it is 16 long (2D slices) or where all sides are multiples of 4 (3D
        # slices). With wrong values the compiler picks other collectives (all-reduce for all-gather).
        wrap = [size == 16 if flat else all(side % 4 == 0 for side in self.shape) for size in self.shape]
        return topologies.get_topology_desc(
            platform="tpu",
            topology_name=self.name,
            chip_config_name=self.chip.config,
            chips_per_host_bounds=(min(2, self.shape[0]), min(2, self.shape[1]), 1),
            num_slices=1,
            wrap=(*wrap, False)[:3],
        ).devices
