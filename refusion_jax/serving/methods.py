"""The decoding methods by name and their settings. Imports no JAX, so that `--help` is fast."""

import dataclasses
from typing import Any

from refusion_jax.baselines.decoders.config import ARConfig, BD3Config, MDMConfig
from refusion_jax.decode.config import DecodeConfig

Config = DecodeConfig | ARConfig | MDMConfig | BD3Config

METHODS: dict[str, type[Config]] = {
    "refusion": DecodeConfig,
    "ar": ARConfig,
    "mdm": MDMConfig,
    "bd3": BD3Config,
}


# Fields of a config that no flag or request sets.
OF_THE_MODEL = ("mask_id", "eos_id", "pad_id", "slot_sizes")


def default_settings(method: str) -> dict[str, Any]:
    """The settings of a method with their defaults, without those of the model."""
    fields = dataclasses.fields(METHODS[method])
    return {field.name: field.default for field in fields if field.name not in OF_THE_MODEL}


SETTINGS = {name for method in METHODS for name in default_settings(method)}
