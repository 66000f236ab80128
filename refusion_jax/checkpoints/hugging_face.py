"""Hugging Face model folders: config.json and the names, shapes and axes of their tensors.

`table` gives for each tensor its Hugging Face name, its path in our parameters and the mapping of its axes.
A tensor that is missing, unknown or of another shape is an error that names it.
"""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refusion_jax.buckets import location
from refusion_jax.errors import BadInput
from refusion_jax.files import read_json, write_atomically
from refusion_jax.model.reading import BORDERS, FIRST_TOKENS, SLOT_SIZES, VERIFY
from refusion_jax.model.rope import RopeScaling
from refusion_jax.model.transformer import ModelConfig
from refusion_jax.weights.lazy import LazyArray

# Hugging Face's model_type <-> (qk_norm, qkv_bias); the blocks of these families are otherwise the same.
FAMILIES = {"qwen3": (True, False), "qwen2": (False, True), "llama": (False, False)}
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}

# Values of fields that a config.json leaves out, as in the configuration classes of `transformers`. Sizes,
# which every config.json has, stay required: their defaults are those of a model of 7 billion parameters.
_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "max_position_embeddings": 32768,
}
DEFAULTS = {
    "llama": _DEFAULTS | {"max_position_embeddings": 2048},
    "qwen2": _DEFAULTS | {"num_key_value_heads": 32},
    "qwen3": _DEFAULTS | {"num_key_value_heads": 32, "head_dim": 128},
}

# Fields of a config.json that are not copied: fields that we write replace them, or (auto_map) they name
# Python files, which are not copied either.
LEFT_OUT = (
    "rope_parameters",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "dtype",
    "auto_map",
)

# Fields of config.json that choose how to decode: default, and possible values.
DECODING_FIELDS = {
    "verify": ("threshold", VERIFY),
    "first_token": ("mask", FIRST_TOKENS),
    "border": ("ar", BORDERS),
}

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
COMPARED_BYTES = 2**24  # of two tensors that must be equal, read at a time
# Buffers in old files, per layer or one for all; they follow from config.json.
IGNORED = re.compile(r"(.+\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)")


class Entry(NamedTuple):
    """The mapping of one tensor: `ours = theirs.reshape(split).transpose(order)`.

    Attributes:
      path: keys to the array in the unrolled model's parameters.
      split: the Hugging Face shape with the axes of heads and head dim separated.
      order: permutation of the axes of `split` that gives our axes.
      shape: the Hugging Face shape.
    """

    path: tuple[str, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    def ours(self, theirs: LazyArray) -> LazyArray:
        """Converts a Hugging Face tensor to our axes."""
        split = theirs if self.split == self.shape else theirs.split(self.split)
        return split.transpose(self.order)

    def theirs(self, ours: LazyArray) -> LazyArray:
        """Converts our array to the Hugging Face shape."""
        return ours.transpose(np.argsort(self.order)).reshape(self.shape)


def table(config: ModelConfig) -> dict[str, Entry]:
    """The mapping of every tensor of a model, by Hugging Face name."""
    c = config
    D, F, H = c.embed_dim, c.mlp_dim, c.head_dim

    def vector(*path: str, size: int) -> Entry:
        return Entry(path, (size,), (0,), (size,))

    entries = {
        EMBEDDING: Entry(("embedding",), (c.vocab_size, D), (0, 1), (c.vocab_size, D)),
        "model.norm.weight": vector("final_norm", "scale", size=D),
    }
    if not c.tie_embeddings:
        entries[HEAD] = Entry(("head",), (c.vocab_size, D), (1, 0), (c.vocab_size, D))
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
    """`parse_config` of FOLDER/config.json. Raises BadInput also if there is no such file."""
    path = location(folder) / "config.json"
    return parse_config(read_json(path), path)


def parse_config(raw: Mapping[str, Any], path: Path) -> ModelConfig:
    """The ModelConfig described by the fields of a config.json.

    Args:
      raw: the fields, with the names of `transformers`, old or new.
      path: their file, for messages.

    Raises:
      BadInput: a field is missing or of the wrong type, or asks for something that this model does not
        implement (another architecture, an unknown RoPE scaling, sliding-window attention).
    """

    def need(field: str, kind: type) -> Any:
        value = raw.get(field)
        if kind is float and type(value) is int and abs(value) < 2**63:
            value = float(value)
        if type(value) is not kind:
            raise BadInput(f"{path}: field {field!r} must be {kind.__name__}, found {value!r}")
        return value

    family = need("model_type", str)
    if family not in FAMILIES:
        raise BadInput(f"{path}: model_type must be one of {', '.join(FAMILIES)}, found {family!r}")
    raw = DEFAULTS[family] | dict(raw)
    _refuse_unsupported(path, raw)
    qk_norm, qkv_bias = FAMILIES[family]
    num_heads = need("num_attention_heads", int)
    raw["rope_theta"], scaling = _rope(raw, path)
    if raw.get("num_key_value_heads") is None:
        raw["num_key_value_heads"] = num_heads
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
            rope_scaling=scaling,
        )
    except (ValueError, ZeroDivisionError) as error:
        raise error if isinstance(error, BadInput) else BadInput(f"{path}: {error}") from None


def _rope(raw: Mapping[str, Any], path: Path) -> tuple[Any, RopeScaling | None]:
    """(base, scaling) of RoPE from `rope_theta` and `rope_scaling`, or from the newer `rope_parameters`."""
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    fields = raw.get(name) or {}
    if not isinstance(fields, dict) or any(isinstance(value, dict) for value in fields.values()):
        raise BadInput(f"{path}: field {name!r} must be one set of numbers for all layers, found {fields!r}")
    fields = {field: value for field, value in fields.items() if value is not None}
    theta = fields.pop("rope_theta", raw.get("rope_theta"))
    partial = fields.pop("partial_rotary_factor", raw.get("partial_rotary_factor") or 1)
    if partial != 1:
        raise BadInput(f"{path}: partial_rotary_factor must be 1 (RoPE on all of a head), found {partial!r}")
    kind = fields.pop("type", "default")  # the old name of rope_type
    kind = fields.setdefault("rope_type", kind)
    if kind == "default":
        return theta, None
    trained, reached = raw.get("original_max_position_embeddings"), raw.get("max_position_embeddings")
    if kind in ("llama3", "yarn") and (trained or reached):
        fields = {"original_max_position_embeddings": reached} | fields
        if trained:
            fields["original_max_position_embeddings"] = trained
    try:
        return theta, RopeScaling.from_fields(fields)
    except ValueError as error:
        raise BadInput(f"{path}: {name}.{error}") from None


def _refuse_unsupported(path: Path, raw: Mapping[str, Any]) -> None:
    """Raises BadInput for fields that would change the computed function if they were ignored."""
    windowed = raw.get("sliding_window") is not None and raw.get("use_sliding_window", True)
    layers = raw.get("layer_types") or []
    if not isinstance(layers, list):
        raise BadInput(f"{path}: layer_types must be a list, found {layers!r}")
    if windowed or any(layer != "full_attention" for layer in layers):
        raise BadInput(
            f"{path}: sliding-window attention is not supported, use_sliding_window must be false and all "
            "layer_types 'full_attention'"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise BadInput(f"{path}: hidden_act must be 'silu', found {raw['hidden_act']!r}")
    for field in ("attention_bias", "mlp_bias", "quantization_config"):
        if raw.get(field):
            raise BadInput(f"{path}: {field} is not supported, found {raw[field]!r}")


def config_json(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that describe `config`, with the names of `transformers`."""
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
        "rope_scaling": config.rope_scaling and config.rope_scaling.as_fields(),
        "hidden_act": "silu",
    }


def write_config(folder: str | Path, config: ModelConfig, extra: Mapping[str, Any]) -> None:
    """Writes FOLDER/config.json.

    Args:
      folder: an existing folder.
      config: shape of the model.
      extra: further fields, such as special token ids, or all fields of another config.json. Fields that
        describe the shape are replaced by those of `config`.
    """
    kept = {name: value for name, value in extra.items() if name not in LEFT_OUT}
    text = json.dumps(kept | config_json(config), indent=2, sort_keys=True) + "\n"
    write_atomically(location(folder) / "config.json", text)


def objective(folder: str | Path) -> str:
    """The training objective named in a folder's config.json.

    Without the field "objective" it is "refusion" for a model with a mask token, else "ar".
    """
    path = location(folder) / "config.json"
    raw = read_json(path)
    name = raw.get("objective", "ar" if raw.get("mask_token_id") is None else "refusion")
    if not isinstance(name, str):
        raise BadInput(f"{path}: objective must be text, found {name!r}")
    return name


def decoding_defaults(folder: str | Path) -> dict[str, Any]:
    """How a model is decoded unless a flag says otherwise: a function of its config.json alone.

    Returns:
      "verify": how drafts are verified: "threshold" or "exact"; "threshold" if config.json does not say.
      "first_token": the position off which the first response token is read: "next", the last prompt token
        (if config.json does not say: for the objective "ar"), or "mask", a mask token (for all others).
      "border": the position off which tokens at slot borders are read: "ar", the token before (if config.json
        does not say), or "draft", a mask token.
      "slot_sizes": tuple of the slot sizes seen in training, in tokens; (4, 8, 16, 32) if config.json does
        not say.

    Raises:
      BadInput: there is no config.json, or one of these fields has an impossible value.
    """
    path = location(folder) / "config.json"
    raw = read_json(path)
    chosen = {name: raw.get(name, default) for name, (default, _) in DECODING_FIELDS.items()}
    if "first_token" not in raw and objective(folder) == "ar":
        chosen["first_token"] = "next"
    for name, (_, values) in DECODING_FIELDS.items():
        if chosen[name] not in values:
            raise BadInput(f"{path}: {name} must be one of {', '.join(values)}, found {chosen[name]!r}")
    sizes = raw.get("slot_sizes", SLOT_SIZES)
    if not isinstance(sizes, list | tuple) or not sizes or any(type(n) is not int or n < 1 for n in sizes):
        raise BadInput(f"{path}: slot_sizes must be a list of whole numbers above 0, found {sizes!r}")
    return chosen | {"slot_sizes": tuple(sizes)}


def block_len(folder: str | Path) -> int | None:
    """Tokens per block of a model trained by block diffusion; None if config.json does not give it."""
    return read_json(location(folder) / "config.json").get("block_len")


def from_tensors(config: ModelConfig, tensors: Mapping[str, LazyArray], source: str | Path) -> dict[str, Any]:
    """The unrolled model's parameters from tensors with Hugging Face's names and shapes.

    Args:
      config: shape of the model.
      tensors: tensors by name. They are not read, but for the head of a tied model if there is one.
      source: their file or folder, for messages.

    Returns:
      nested dict of LazyArray.

    Raises:
      BadInput: a tensor is missing, unknown or of another shape, or a tied model has a head of its own.
    """
    entries = table(config)
    if config.tie_embeddings and HEAD in tensors:
        tensors = _tied(tensors)
    params: dict[str, Any] = {}
    for name, tensor in tensors.items():
        entry = entries.get(name)
        if entry is None:
            if IGNORED.fullmatch(name):
                continue
            raise BadInput(f"{tensor.where} belongs to no part of this model")
        if tensor.shape != entry.shape:
            raise BadInput(f"{tensor.where} has shape {tensor.shape}, config.json makes it {entry.shape}")
        node = params
        for key in entry.path[:-1]:
            node = node.setdefault(key, {})
        node[entry.path[-1]] = entry.ours(tensor)
    missing = sorted(entries.keys() - tensors.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BadInput(f"{source}: tensor {missing[0]!r}{more} missing")
    return params


def _tied(tensors: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """The tensors of a tied model, of which some writers store the head too, or the head alone.

    Raises:
      BadInput: the head is not the embedding.
    """
    rest = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    head, embedding = tensors[HEAD], rest.setdefault(EMBEDDING, tensors[HEAD])
    if not _equal(head, embedding):
        raise BadInput(
            f"{head.where} differs from {embedding.where}, which config.json ties it to; "
            "set tie_word_embeddings to false if the model has both"
        )
    return rest


def _equal(one: LazyArray, other: LazyArray) -> bool:
    """Whether two matrices are equal, read a part at a time."""
    rows = max(1, COMPARED_BYTES * one.shape[0] // max(1, one.nbytes))
    parts = (slice(start, start + rows) for start in range(0, one.shape[0], rows))
    return one.shape == other.shape and all(
        np.array_equal(one.read((part, slice(None))), other.read((part, slice(None)))) for part in parts
    )


def to_tensors(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, LazyArray]:
    """The inverse of `from_tensors`; each tensor is read as a whole."""
    return {
        name: entry.theirs(functools.reduce(lambda node, key: node[key], entry.path, params))
        for name, entry in table(config).items()
    }
