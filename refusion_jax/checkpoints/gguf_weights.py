"""GGUF model files, presented with Hugging Face's names, shapes and config.json; weights are dequantised.

Metadata that asks for something this model does not implement is an error, as in a config.json.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from refusion_jax.checkpoints.gguf_file import GGUFFile
from refusion_jax.errors import BadInput
from refusion_jax.weights.lazy import Index, LazyArray

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # the same names as Hugging Face's model_type

# GGUF name of a tensor -> Hugging Face name; LAYER_NAMES without the prefix of the layer and the suffix.
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# Metadata with the architecture's prefix that `_config` reads; all other such metadata must be unset or 0.
KNOWN = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",  # not read: the shape of the embedding gives it
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
}


def read_gguf(file: GGUFFile) -> tuple[dict[str, Any], dict[str, LazyArray]]:
    """The configuration and the weights in a GGUF file.

    Args:
      file: a file of architecture llama, qwen2 or qwen3.

    Returns:
      the fields of a config.json, and float32 tensors by Hugging Face name, in Hugging Face's shapes and
      order of rows, which are dequantised when they are read.

    Raises:
      BadInput: the file contains something that this model does not implement.
    """
    path = file.path
    shapes = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in file.tensors}
    config = _config(file, shapes)
    heads = {}
    if config["model_type"] == "llama":
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = {}
    for tensor in file.tensors:
        name = _name(path, tensor.name)
        part = name.split(".")[-2]
        rows = _half_split_rows(heads[part], config["head_dim"]) if part in heads else None
        tensors[name] = _lazy_array(path, tensor, shapes[tensor.name], rows)
    return config, tensors


def _config(file: GGUFFile, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of the config.json equivalent to the metadata of a GGUF file."""
    path, family = file.path, file.get("general.architecture")
    if family not in ARCHITECTURES:
        raise BadInput(
            f"{path}: general.architecture must be one of {', '.join(ARCHITECTURES)}, found {family!r}"
        )

    def get(key: str, kind: type, default: Any = None) -> Any:
        name = f"{family}.{key}"
        if default is None:
            return file.need(name, kind)
        value = file.get(name, kind)
        return default if value is None else value

    for name in file.names:
        known = name.removeprefix(f"{family}.") in KNOWN
        if name.startswith(f"{family}.") and not known and (value := file.get(name)):
            raise BadInput(f"{path}: metadata {name} is not supported, found {value!r}")
    if "token_embd.weight" not in shapes:
        raise BadInput(f"{path}: tensor 'token_embd.weight' missing")
    heads, width = get("attention.head_count", int), get("embedding_length", int)
    head_dim = get("attention.key_length", int, width // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, int, head_dim) != head_dim:
            raise BadInput(f"{path}: metadata {family}.{key} must be {head_dim}, the size of a head")
    scaling = None
    if get("rope.scaling.type", str, "none") != "none":
        scaling = {
            "rope_type": get("rope.scaling.type", str),
            "factor": get("rope.scaling.factor", float),
            "original_max_position_embeddings": file.get(f"{family}.rope.scaling.original_context_length"),
        }
    return {
        "model_type": family,
        "vocab_size": shapes["token_embd.weight"][0],
        "num_hidden_layers": get("block_count", int),
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "intermediate_size": get("feed_forward_length", int),
        "max_position_embeddings": get("context_length", int),
        "rope_theta": get("rope.freq_base", float, 10000.0),
        "rope_scaling": scaling,
        # Stored as float32; the shortest decimal with that float32 value is the original, such as 1e-05.
        "rms_norm_eps": float(str(np.float32(get("attention.layer_norm_rms_epsilon", float)))),
        "tie_word_embeddings": "output.weight" not in shapes,
    }


def _name(path: Path, name: str) -> str:
    """The Hugging Face name of a tensor from its GGUF name."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer and layer[2] in LAYER_NAMES:
        return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.{layer[3]}"
    if name not in NAMES:
        raise BadInput(f"{path}: tensor {name!r} belongs to no part of this model")
    return NAMES[name]


def _half_split_rows(heads: int, head_dim: int) -> np.ndarray:
    """Indices of the rows of a Llama's q or k in a GGUF file, in our order of rows.

    In RoPE a Llama GGUF file rotates channel 2i with 2i + 1, we (and Hugging Face) rotate i with i + H/2.
    """
    rows = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def _lazy_array(path: Path, tensor: Any, shape: tuple[int, ...], rows: np.ndarray | None) -> LazyArray:
    """One tensor, dequantised when it is read; `rows` gives the index in the file of each of its rows."""
    from gguf import quants

    where, kind = f"{path}: tensor {tensor.name!r}", tensor.tensor_type
    layout = (tensor.data.dtype, "r", int(tensor.data_offset), tensor.data.shape)

    def read(index: Index) -> np.ndarray:
        first = index[0] if rows is None else rows[index[0]]
        try:
            # Copying lets the mapping end. Quantised blocks never cross rows, so rows can be read alone.
            return quants.dequantize(np.array(np.memmap(path, *layout)[first]), kind)[:, *index[1:]]
        except NotImplementedError:
            raise BadInput(f"{where} has quantisation {kind.name}, which gguf cannot undo") from None

    def read_vector(index: Index) -> np.ndarray:
        return quants.dequantize(np.array(np.memmap(path, *layout)), kind)[index]

    return LazyArray(shape, np.dtype(np.float32), read if len(shape) > 1 else read_vector, where)
