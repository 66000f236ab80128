"""GGUF model files, presented with Hugging Face's names, shapes and config.json; weights are dequantised.

Metadata that asks for something this model does not implement is an error, as in a config.json.
"""

import re
from typing import Any

import numpy as np

from refusion_jax.checkpoints.gguf_file import GGUFFile
from refusion_jax.checkpoints.gguf_header import GGUFTensor
from refusion_jax.errors import BadInput
from refusion_jax.model.rope import RopeScaling, frequencies
from refusion_jax.weights.lazy import Index, LazyArray

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # the same names as Hugging Face's model_type

# GGUF name of a tensor -> Hugging Face name; LAYER_NAMES without the prefix of the layer and the suffix.
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ROPE_FACTORS = "rope_freqs.weight"
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
    shapes = {tensor.name: tensor.shape for tensor in file.tensors}
    config = _config(file, shapes)
    heads = {}
    if config["model_type"] == "llama":
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = {}
    for tensor in file.tensors:
        if tensor.name == ROPE_FACTORS:
            config["rope_scaling"] = _llama3_fields(tensor, config)
            continue
        name = _name(tensor)
        part = name.split(".")[-2]
        rows = None
        if part in heads and len(tensor.shape) > 1:
            num_rows, head_dim = heads[part] * config["head_dim"], config["head_dim"]
            if tensor.shape[0] != num_rows or head_dim % 2:
                raise BadInput(
                    f"{_where(tensor)} has {tensor.shape[0]} rows, its metadata make it {num_rows}, in "
                    f"heads of {head_dim}, which must be even"
                )
            rows = _half_split_rows(heads[part], head_dim)
        tensors[name] = _lazy_array(tensor, rows)
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


def _llama3_fields(tensor: GGUFTensor, config: dict[str, Any]) -> dict[str, Any] | None:
    """The rope_scaling of config.json of which a tensor of factors was made, None if all are 1.

    Llama 3 files have no other trace of their scaling: the factors are those by which RoPE frequencies are
    divided. Fields and factors have one degree of freedom more, so low_freq_factor is taken as 1.

    Raises:
      BadInput: no scaling of the type llama3 has these factors, or the metadata have a scaling as well.
    """
    where = _where(tensor)
    if config["rope_scaling"] is not None:
        raise BadInput(f"{where} and metadata rope.scaling.type both scale RoPE, expected one of the two")
    expected = (config["head_dim"] // 2,)
    if tensor.shape != expected:
        raise BadInput(f"{where} has shape {tensor.shape}, expected {expected}, half of the size of a head")
    if not 1 <= config["rope_theta"] < np.inf:
        raise BadInput(f"{where} scales RoPE frequencies of base {config['rope_theta']}, expected 1 or above")
    base, _ = frequencies(config["head_dim"], config["rope_theta"], None)
    factors = _lazy_array(tensor, None).whole().astype(np.float64)
    if (factors == 1).all():
        return None
    unlike = BadInput(f"{where} holds RoPE factors of no scaling of the type llama3, the only one supported")
    factor = float(factors[-1])
    between = (factors > 1) & (factors < factor)
    if not 1 < factor < np.inf or between.sum() < 2:
        raise unlike
    # Where neither end applies, 1 / factors = (1 - smooth) / factor + smooth, and smooth is linear in the
    # frequency: length / (high - low) / wavelength - low / (high - low).
    smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
    slope, start = np.polyfit(base[between].astype(np.float64) / (2 * np.pi), smooth, 1).tolist()
    if not (slope > 0 and start < 0):
        raise unlike
    high = 1 - 1 / start
    fields = {
        "rope_type": "llama3",
        "factor": round(factor, 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": round(high, 3),
        "original_max_position_embeddings": round(slope * (high - 1)),
    }
    try:
        scaled, _ = frequencies(config["head_dim"], config["rope_theta"], RopeScaling(**fields))
    except ValueError:
        raise unlike from None
    if not np.allclose(base / scaled, factors, rtol=1e-3, atol=0):
        raise unlike
    return fields


def _where(tensor: GGUFTensor) -> str:
    return f"{tensor.path}: tensor {tensor.name!r}"


def _name(tensor: GGUFTensor) -> str:
    """The Hugging Face name of a tensor."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor.name, re.ASCII)
    if layer and layer[2] in LAYER_NAMES:
        return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.{layer[3]}"
    if tensor.name not in NAMES:
        raise BadInput(f"{_where(tensor)} belongs to no part of this model")
    return NAMES[tensor.name]


def _half_split_rows(heads: int, head_dim: int) -> np.ndarray:
    """Indices of the rows of a Llama's q or k in a GGUF file, in our order of rows.

    In RoPE a Llama GGUF file rotates channel 2i with 2i + 1, we (and Hugging Face) rotate i with i + H/2.
    """
    rows = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def _lazy_array(tensor: GGUFTensor, rows: np.ndarray | None) -> LazyArray:
    """One tensor, dequantised when it is read; `rows` gives the index in the file of each of its rows."""
    from gguf import quants

    where = _where(tensor)

    def read(index: Index) -> np.ndarray:
        if 0 in tensor.shape:  # nothing to map
            return np.empty(tensor.shape, np.float32)[index]
        data = np.memmap(tensor.path, np.uint8, "r", tensor.offset, tensor.byte_shape)
        one_axis = len(tensor.shape) == 1
        first = slice(None) if one_axis else index[0] if rows is None else rows[index[0]]
        try:
            # Copying lets the mapping end. Quantised blocks never cross rows, so rows can be read alone.
            array = quants.dequantize(np.array(data[first]), tensor.kind)
        except NotImplementedError:
            raise BadInput(f"{where} has quantisation {tensor.kind.name}, which gguf cannot undo") from None
        return array[index] if one_axis else array[:, *index[1:]]

    return LazyArray(tensor.shape, np.dtype(np.float32), read, where)
