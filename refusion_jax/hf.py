"""Hugging Face model folders: config.json and safetensors, read strictly.

One table gives for each tensor its Hugging Face name, its path in our parameters and how the axes map.
A tensor that is missing, that nothing asks for, or that has another shape is an error naming it.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from refusion_jax.errors import BadInput
from refusion_jax.model import ModelConfig

# Hugging Face's model_type <-> (qk_norm, qkv_bias); everything else of the block is shared.
FAMILIES = {"qwen3": (True, False), "qwen2": (False, True), "llama": (False, False)}
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}


class Entry(NamedTuple):
    """One tensor: `ours = theirs.reshape(split).transpose(order)`.

    Attributes:
      path: where it lies in the unrolled model's parameters.
      split: the Hugging Face shape with heads and head dim apart.
      order: of the axes of `split` in ours.
      shape: the Hugging Face shape.
    """

    path: tuple[str, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]


def table(config: ModelConfig) -> dict[str, Entry]:
    """Every tensor of a model by its Hugging Face name."""
    c = config
    D, F, H = c.embed_dim, c.mlp_dim, c.head_dim

    def vector(*path: str, size: int) -> Entry:
        return Entry(path, (size,), (0,), (size,))

    entries = {
        "model.embed_tokens.weight": Entry(("embedding",), (c.vocab_size, D), (0, 1), (c.vocab_size, D)),
        "model.norm.weight": vector("final_norm", "scale", size=D),
    }
    if not c.tie_embeddings:
        entries["lm_head.weight"] = Entry(("head",), (c.vocab_size, D), (1, 0), (c.vocab_size, D))
    for i in range(c.num_layers):
        layer, name = f"layers_{i}", f"model.layers.{i}."
        entries[name + "input_layernorm.weight"] = vector(layer, "attention_norm", "scale", size=D)
        entries[name + "post_attention_layernorm.weight"] = vector(layer, "mlp_norm", "scale", size=D)
        for x, heads in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
            theirs = f"{name}self_attn.{x}_proj"
            path = (layer, "attention", x)
            entries[theirs + ".weight"] = Entry(path, (heads, H, D), (2, 0, 1), (heads * H, D))
            if c.qkv_bias:
                path = (layer, "attention", f"{x}_bias")
                entries[theirs + ".bias"] = Entry(path, (heads, H), (0, 1), (heads * H,))
            if c.qk_norm and x != "v":
                norm = vector(layer, "attention", f"{x}_norm", "scale", size=H)
                entries[f"{name}self_attn.{x}_norm.weight"] = norm
        entries[name + "self_attn.o_proj.weight"] = Entry(
            (layer, "attention", "o"), (D, c.num_heads, H), (1, 2, 0), (D, c.num_heads * H)
        )
        for x, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
            entries[f"{name}mlp.{x}_proj.weight"] = Entry((layer, "mlp", x), shape, (1, 0), shape)
    return entries


def read_config(folder: str | Path) -> ModelConfig:
    """The model's shape from FOLDER/config.json.

    Raises:
      BadInput: no such file, a field is missing or of the wrong type, or it asks for something this
        model does not do (another architecture, RoPE scaling, sliding-window attention).
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)

    def need(field: str, kind: type) -> Any:
        value = raw.get(field)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise BadInput(f"{path}: field {field!r} must be {kind.__name__}, found {value!r}")
        return value

    family = need("model_type", str)
    if family not in FAMILIES:
        raise BadInput(f"{path}: model_type must be one of {', '.join(FAMILIES)}, found {family!r}")
    _refuse_unsupported(path, raw)
    qk_norm, qkv_bias = FAMILIES[family]
    num_heads = need("num_attention_heads", int)
    rope = raw.get("rope_parameters") or {}
    if "rope_theta" in rope:  # newer transformers keep it there
        raw["rope_theta"] = rope["rope_theta"]
    try:
        return ModelConfig(
            vocab_size=need("vocab_size", int),
            num_layers=need("num_hidden_layers", int),
            embed_dim=need("hidden_size", int),
            num_heads=num_heads,
            num_kv_heads=need("num_key_value_heads", int),
            head_dim=need("head_dim", int) if raw.get("head_dim") else need("hidden_size", int) // num_heads,
            mlp_dim=need("intermediate_size", int),
            rope_theta=need("rope_theta", float),
            norm_eps=need("rms_norm_eps", float),
            qk_norm=qk_norm,
            qkv_bias=qkv_bias,
            tie_embeddings=need("tie_word_embeddings", bool),
        )
    except (ValueError, ZeroDivisionError) as error:
        raise error if isinstance(error, BadInput) else BadInput(f"{path}: {error}") from None


def _refuse_unsupported(path: Path, raw: dict[str, Any]) -> None:
    """What would silently change the function computed is an error, never ignored."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise BadInput(f"{path}: RoPE scaling {kind!r} is not supported, rope_scaling must be null")
    if raw.get("sliding_window") is not None and raw.get("use_sliding_window", True):
        raise BadInput(f"{path}: sliding-window attention is not supported, use_sliding_window must be false")
    if raw.get("hidden_act", "silu") != "silu":
        raise BadInput(f"{path}: hidden_act must be 'silu', found {raw['hidden_act']!r}")
    for field in ("attention_bias", "mlp_bias"):
        if raw.get(field):
            raise BadInput(f"{path}: {field} true is not supported")


def config_json(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that describe `config`, as `transformers` names them."""
    family = {switches: name for name, switches in FAMILIES.items()}.get((config.qk_norm, config.qkv_bias))
    if family is None:
        raise BadInput("qk_norm and qkv_bias together are in no Hugging Face family: switch one off")
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
    }


def write_config(folder: str | Path, config: ModelConfig, extra: dict[str, Any]) -> None:
    """Writes FOLDER/config.json: the model's shape and `extra` fields (special token ids, say)."""
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(config_json(config) | extra, indent=2, sort_keys=True) + "\n")


def first_token(folder: str | Path) -> str:
    """Where left-to-right decoding of a model reads its first token: "mask" or "next".

    What its config.json says of the objective decides; where it says nothing, a model with a mask token
    was trained as ReFusion models are.
    """
    raw = read_json(Path(folder) / "config.json")
    by_objective = {"refusion": "mask", "ar": "next"}
    return by_objective.get(raw.get("objective"), "next" if raw.get("mask_token_id") is None else "mask")


def load_params(folder: str | Path, config: ModelConfig, dtype: Any = None) -> dict[str, Any]:
    """The parameters of the unrolled model from FOLDER's safetensors files.

    Args:
      folder: holds model.safetensors, or model.safetensors.index.json and its shards.
      config: the model's shape, from `read_config`.
      dtype: what to cast to; None keeps each tensor's own.

    Raises:
      BadInput: a file is missing or broken, or a tensor is missing, extra or misshapen.
    """
    entries = table(config)
    params: dict[str, Any] = {}
    seen: set[str] = set()
    for file, name, shape, read in _tensors(Path(folder)):
        entry = entries.get(name)
        if entry is None:
            raise BadInput(f"{file}: tensor {name!r} belongs to no part of this model")
        if name in seen:
            raise BadInput(f"{file}: tensor {name!r} stands in more than one file")
        if shape != entry.shape:
            raise BadInput(f"{file}: tensor {name!r} has shape {shape}, config.json makes it {entry.shape}")
        seen.add(name)
        node = params
        for key in entry.path[:-1]:
            node = node.setdefault(key, {})
        node[entry.path[-1]] = jnp.asarray(read().reshape(entry.split).transpose(entry.order), dtype)
    missing = sorted(entries.keys() - seen)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BadInput(f"{folder}: tensor {missing[0]!r}{more} missing from its safetensors files")
    return params


def _tensors(folder: Path) -> Iterator[tuple[Path, str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """(file, tensor name, shape, reader) of every tensor in the folder, one file open at a time."""
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118, it is no mapping
                    shape = tuple(tensors.get_slice(name).get_shape())
                    yield file, name, shape, lambda tensors=tensors, name=name: tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{file}: not a readable safetensors file ({error})") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the shards its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise BadInput(f"{folder}: holds neither model.safetensors nor {index.name}")
        return [single]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{index}: field 'weight_map' must map tensor names to files")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (folder / name).exists():
            raise BadInput(f"{index}: names the file {name!r}, which is not in {folder}")
    return [folder / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      BadInput: no such file, malformed JSON, or no object.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(raw, dict):
        raise BadInput(f"{path}: must hold a JSON object, found {type(raw).__name__}")
    return raw
