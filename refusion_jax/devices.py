"""What accelerators can do: one table of devices by JAX's device_kind, one of TPU generations by name."""

import dataclasses
from typing import NamedTuple


class Device(NamedTuple):
    """One JAX device, from its vendor's data sheet.

    Attributes:
      peak_flops: dense bfloat16 FLOPs per second, sparsity not counted.
      memory_bandwidth: bytes per second between the device and its memory.
    """

    peak_flops: float
    memory_bandwidth: float


# By device_kind. The names of TPUs are those in JAX's pallas/mosaic/tpu_info.py.
DEVICES = {
    "NVIDIA A100-SXM4-40GB": Device(312e12, 1.555e12),
    "NVIDIA A100-SXM4-80GB": Device(312e12, 2.039e12),
    "NVIDIA A100-PCIE-40GB": Device(312e12, 1.555e12),
    "NVIDIA A100 80GB PCIe": Device(312e12, 1.935e12),
    "NVIDIA H100 80GB HBM3": Device(989e12, 3.35e12),  # SXM
    "NVIDIA H100 NVL": Device(835e12, 3.9e12),
    "NVIDIA H100 PCIe": Device(756e12, 2e12),
    "NVIDIA H200": Device(989e12, 4.8e12),
    "TPU v4": Device(275e12, 1.228e12),
    "TPU v5 lite": Device(197e12, 0.819e12),  # v5e
    "TPU v5e": Device(197e12, 0.819e12),
    "TPU v5": Device(459e12, 2.765e12),  # v5p
    "TPU v5p": Device(459e12, 2.765e12),
    "TPU v6 lite": Device(918e12, 1.64e12),  # v6e
    "TPU v6e": Device(918e12, 1.64e12),
    # A chip does 2307e12, but JAX sees it as two devices: https://docs.cloud.google.com/tpu/docs/tpu7x
    "TPU7x": Device(2307e12 / 2, 7.37e12 / 2),
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOPs per second of a device, None for kinds not in the table."""
    device = DEVICES.get(device_kind)
    return device and device.peak_flops


def ridge_tokens(device_kind: str) -> float | None:
    """Tokens a bfloat16 forward pass may feed before computing takes longer than reading the weights.

    2 FLOPs per weight and token stand against 2 bytes per weight. None for kinds not in the table.
    """
    device = DEVICES.get(device_kind)
    return device and device.peak_flops / device.memory_bandwidth


GIB = 2**30

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")


@dataclasses.dataclass(frozen=True)
class TPUGeneration:
    """A generation of TPUs.

    Attributes:
      hbm: GB a chip, as cloud.google.com/tpu/docs/GENERATION states it.
      usable: bytes of it that a program may use on each device, as libtpu 0.0.48 reports when one exceeds it.
      config: libtpu's name of the chip as JAX runs it; "megacore" makes one device of two cores.
      shapes: of the slices there are, ascending.
      devices: JAX devices a chip.
    """

    hbm: int
    usable: float
    config: str
    shapes: tuple[str, ...]
    devices: int = 1


TPU_GENERATIONS = {
    "v4": TPUGeneration(32, 30.75 * GIB, "megacore", _CUBES),
    "v5e": TPUGeneration(16, 15.75 * GIB, "default", _FLAT),
    "v5p": TPUGeneration(95, 95.73 * GIB, "megacore", (*_CUBES, "16x16x16", "16x16x24")),
    "v6e": TPUGeneration(32, 31.24 * GIB, "default", _FLAT),
    "tpu7x": TPUGeneration(192, 94.74 * GIB, "default", _CUBES, devices=2),
}
