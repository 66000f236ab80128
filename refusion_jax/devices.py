"""Accelerators by name: peak FLOPs, memory bandwidth, and the TPU slices that exist.

This is the only module that lists chips. It imports no JAX, so reading it starts no backend. FLOP formulas
live in `training/flops.py`.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """Data sheet figures of one JAX device.

    Attributes:
      peak_flops: dense bfloat16 FLOPs per second, without sparsity.
      memory_bandwidth: bytes per second between the device and its memory.
    """

    peak_flops: float
    memory_bandwidth: float


_V5E = Device(197e12, 0.819e12)
_V5P = Device(459e12, 2.765e12)
_V6E = Device(918e12, 1.64e12)

# `jax.Device.device_kind` -> figures from the vendor's data sheet. TPU kinds are spelled as in
# jax/_src/pallas/mosaic/tpu_info.py; some generations have two spellings.
DEVICES = {
    "NVIDIA A100-SXM4-40GB": Device(312e12, 1.555e12),
    "NVIDIA A100-SXM4-80GB": Device(312e12, 2.039e12),
    "NVIDIA A100-PCIE-40GB": Device(312e12, 1.555e12),
    "NVIDIA A100 80GB PCIe": Device(312e12, 1.935e12),
    "NVIDIA H100 80GB HBM3": Device(989e12, 3.35e12),  # SXM
    "NVIDIA H100 NVL": Device(835e12, 3.9e12),
    "NVIDIA H100 PCIe": Device(756e12, 2.0e12),
    "NVIDIA H200": Device(989e12, 4.8e12),
    "TPU v4": Device(275e12, 1.228e12),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    # JAX sees one TPU7x chip as two devices: https://docs.cloud.google.com/tpu/docs/tpu7x
    "TPU7x": Device(2307e12 / 2, 7.37e12 / 2),
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOPs per second of a device; None for a kind that DEVICES does not list."""
    device = DEVICES.get(device_kind)
    return device.peak_flops if device else None


def ridge_tokens(device_kind: str) -> float | None:
    """Tokens per forward pass at which computing takes as long as reading the weights, in bfloat16.

    A pass takes 2 FLOPs per weight and token, and reads 2 bytes per weight, so this is peak FLOPs over
    memory bandwidth. None for a kind that DEVICES does not list.
    """
    device = DEVICES.get(device_kind)
    return device.peak_flops / device.memory_bandwidth if device else None


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")


@dataclasses.dataclass(frozen=True)
class TPUChip:
    """One generation of TPUs.

    Attributes:
      hbm: GB of memory per chip, as cloud.google.com/tpu/docs/GENERATION states it.
      usable: bytes of memory that a program may use on each device, as libtpu 0.0.48 reports when a program
        exceeds them.
      config: libtpu's name for the chip as JAX runs it; "megacore" makes one device of two cores.
      shapes: chip grids of the slices that exist, in ascending order.
      devices: JAX devices per chip.
    """

    hbm: int
    usable: float
    config: str
    shapes: tuple[str, ...]
    devices: int = 1


TPU_CHIPS = {
    "v4": TPUChip(32, 30.75 * GIB, "megacore", _CUBES),
    "v5e": TPUChip(16, 15.75 * GIB, "default", _FLAT),
    "v5p": TPUChip(95, 95.73 * GIB, "megacore", (*_CUBES, "16x16x16", "16x16x24")),
    "v6e": TPUChip(32, 31.24 * GIB, "default", _FLAT),
    "tpu7x": TPUChip(192, 94.74 * GIB, "default", _CUBES, devices=2),
}
