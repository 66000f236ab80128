"""Low-rank adapters in the layout of the PEFT library: adapter_config.json and adapter_model.safetensors.

A Hugging Face model folder that also holds these two files is an adapted model, whose weights [out, in] are

  W + lora_alpha / r * lora_B lora_A,   lora_A [r, in], lora_B [out, r]

Adapters for mask tokens only have two additions of ours, which PEFT ignores: the field "only_masks" of
adapter_config.json, and the tensor "mask_embedding" [D].
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refusion_jax.checkpoints import hugging_face, safetensors_io
from refusion_jax.checkpoints.hugging_face import Entry
from refusion_jax.errors import BadInput
from refusion_jax.files import read_json, write_atomically
from refusion_jax.model.config import ModelConfig
from refusion_jax.weights import lora
from refusion_jax.weights.lazy import LazyArray

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
ONLY_MASKS = "only_masks"
# Fields of a LoRA configuration that would change the function computed; each must be absent or empty.
UNSUPPORTED = (
    "alpha_pattern",
    "alora_invocation_tokens",
    "fan_in_fan_out",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "trainable_token_indices",
    "use_dora",
    "use_qalora",
    "use_rslora",
)


def table(config: ModelConfig, rank: int) -> dict[str, Entry]:
    """The mapping of A and B of every kernel, by PEFT's tensor name; paths as in `weights.lora`."""
    entries = {}
    for name, kernel in hugging_face.table(config).items():
        if kernel.path[-1] not in lora.TARGETS:
            continue
        num_in = lora.TARGETS[kernel.path[-1]]
        num_out = len(kernel.split) - num_in
        outputs, inputs = kernel.split[:num_out], kernel.split[num_out:]
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        order, shape = (*range(1, num_in + 1), 0), (rank, kernel.shape[1])
        entries[f"{stem}.lora_A.weight"] = Entry((*kernel.path, "a"), (rank, *inputs), order, shape)
        order, shape = (num_out, *range(num_out)), (kernel.shape[0], rank)
        entries[f"{stem}.lora_B.weight"] = Entry((*kernel.path, "b"), (*outputs, rank), order, shape)
    return entries


def with_adapter(config: ModelConfig, base: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The parameters of the model in a folder: `base`, with the adapters if the folder has some.

    Args:
      config: shape of the model.
      base: parameters of the unrolled model, nested dict of LazyArray.
      folder: a Hugging Face model folder.

    Returns:
      `base`, or the tree of an adapted model as in `weights.lora`.

    Raises:
      BadInput: the adapters are broken, do not fit the model, or are of a kind that is not supported.
    """
    path = folder / CONFIG
    if not path.is_file():
        return dict(base)
    fields = read_json(path)
    rank, scale = _rank_and_scale(fields, path)
    tensors = safetensors_io.read_file(folder / TENSORS)
    adapters: dict[str, Any] = {}
    if fields.get(ONLY_MASKS):
        row = tensors.pop(lora.MASK_EMBEDDING, None)
        if row is None or row.shape != (config.embed_dim,):
            found = "none" if row is None else f"shape {row.shape}"
            raise BadInput(
                f"{folder / TENSORS}: tensor {lora.MASK_EMBEDDING!r} must have shape ({config.embed_dim},), "
                f"found {found}"
            )
        adapters[lora.MASK_EMBEDDING] = row
    entries = table(config, rank)
    for name, tensor in tensors.items():
        entry = entries.get(name)
        if entry is None:
            raise BadInput(f"{tensor.where} is no adapter of a kernel of this model")
        if tensor.shape != entry.shape:
            raise BadInput(f"{tensor.where} has shape {tensor.shape}, rank {rank} makes it {entry.shape}")
        other = name.replace("lora_A", "lora_B") if "lora_A" in name else name.replace("lora_B", "lora_A")
        if other not in tensors:
            raise BadInput(f"{folder / TENSORS}: tensor {other!r} missing")
        node = adapters
        for key in entry.path[:-1]:
            node = node.setdefault(key, {})
        node[entry.path[-1]] = entry.ours(tensor)
    if not tensors:
        raise BadInput(f"{folder / TENSORS}: holds no adapter")
    return {"base": dict(base), "lora": adapters, "scale": _constant(scale, f"{path}: lora_alpha / r")}


def write_adapter(folder: Path, config: ModelConfig, params: Mapping[str, Any], base_name: str) -> None:
    """Writes the adapters of an adapted model beside its Hugging Face files.

    Args:
      folder: an existing folder.
      config: shape of the model.
      params: tree of an adapted unrolled model as in `weights.lora`, with leaves LazyArray.
      base_name: where users find the base model, for base_model_name_or_path.
    """
    rank, targets = lora.rank_and_targets(params)
    alpha = float(f"{float(params['scale'].whole()) * rank:.6g}")  # the scale is stored in float32
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": [f"{name}_proj" for name in targets],
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {
        name: entry.theirs(functools.reduce(lambda node, key: node[key], entry.path, params["lora"]))
        for name, entry in table(config, rank).items()
        if entry.path[-2] in targets
    }
    if lora.only_masks(params):
        fields[ONLY_MASKS] = True
        tensors[lora.MASK_EMBEDDING] = params["lora"][lora.MASK_EMBEDDING]
    safetensors_io.write_file(folder / TENSORS, tensors)
    write_atomically(folder / CONFIG, json.dumps(fields, indent=2, sort_keys=True) + "\n")


def _rank_and_scale(fields: Mapping[str, Any], path: Path) -> tuple[int, float]:
    """r, and lora_alpha / r; BadInput for a configuration that is not supported."""
    if fields.get("peft_type") != "LORA":
        raise BadInput(f"{path}: peft_type must be 'LORA', found {fields.get('peft_type')!r}")
    if fields.get("bias", "none") != "none":
        raise BadInput(f"{path}: bias must be 'none', found {fields['bias']!r}")
    for field in UNSUPPORTED:
        if fields.get(field):
            raise BadInput(f"{path}: {field} is not supported, found {fields[field]!r}")
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise BadInput(f"{path}: r must be a whole number of at least 1, found {rank!r}")
    if type(alpha) not in (int, float) or not alpha > 0:
        raise BadInput(f"{path}: lora_alpha must be a number above 0, found {alpha!r}")
    return rank, alpha / rank


def _constant(value: float, where: str) -> LazyArray:
    return LazyArray((), np.dtype(np.float32), lambda index: np.asarray(value, np.float32), where)
