"""Small GGUF files, written by the package gguf."""

import json
from pathlib import Path

import gguf
import numpy as np

from fuzzing.seeds import SHORT, SPECIAL, byte_level

KINDS = gguf.GGMLQuantizationType
D, F, V = 32, 64, 128  # width, width of the MLP, tokens
THETA = 5e5


def _metadata(writer: gguf.GGUFWriter, family: str) -> None:
    sizes = {
        "block_count": 1,
        "context_length": 128,
        "embedding_length": D,
        "feed_forward_length": F,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": 16,
        "rope.dimension_count": 16,
    }
    for name, value in sizes.items():
        writer.add_uint32(f"{family}.{name}", value)
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{family}.rope.freq_base", THETA)


def _tokens(writer: gguf.GGUFWriter) -> None:
    backend = byte_level()
    state = json.loads(backend.to_str())["model"]
    tokens = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "gpt-2")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", [3 if token in SPECIAL else 1 for token in tokens])
    writer.add_array("tokenizer.ggml.merges", [" ".join(pair) for pair in state["merges"]])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_string("tokenizer.chat_template", SHORT)


def _pieces(writer: gguf.GGUFWriter) -> None:
    tokens = ["<unk>", "<s>", "</s>", "<mask>", "▁", *"abcdefgh", "▁a", "ab"]
    writer.add_string("tokenizer.ggml.model", "llama")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", [2, 3, 3, 4] + [1] * (len(tokens) - 4))
    writer.add_array("tokenizer.ggml.scores", [-float(i) for i in range(len(tokens))])
    for name, value in {"eos": 2, "bos": 1, "unknown": 0, "mask": 3}.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", value)


def _tensors(family: str) -> dict[str, np.ndarray]:
    shapes = {
        "token_embd": (V, D),
        "output_norm": (D,),
        "blk.0.attn_norm": (D,),
        "blk.0.ffn_norm": (D,),
        "blk.0.attn_q": (32, D),
        "blk.0.attn_k": (16, D),
        "blk.0.attn_v": (16, D),
        "blk.0.attn_output": (D, 32),
        "blk.0.ffn_gate": (F, D),
        "blk.0.ffn_up": (F, D),
        "blk.0.ffn_down": (D, F),
    }
    if family == "qwen3":
        shapes |= {"blk.0.attn_q_norm": (16,), "blk.0.attn_k_norm": (16,)}
    return {f"{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama(folder: Path) -> dict[str, bytes]:
    """Float tensors, a tensor of RoPE factors, byte-level BPE."""
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    _metadata(writer, "llama")
    _tokens(writer)
    factors = {"rope_freqs.weight": np.ones(8, np.float32)}
    for name, array in (factors | _tensors("llama")).items():
        writer.add_tensor(name, array.astype(np.float16) if array.ndim > 1 else array)
    _close(writer)
    return {"model.gguf": path.read_bytes()}


def qwen3_parts(folder: Path) -> dict[str, bytes]:
    """Quantised tensors in two parts, SentencePiece."""
    tensors, files = _tensors("qwen3"), {}
    for number in range(2):
        name = f"model-{number + 1:05}-of-00002.gguf"
        writer = gguf.GGUFWriter(folder / name, "qwen3")
        for key, value in {"no": number, "count": 2, "tensors.count": len(tensors)}.items():
            writer.add_uint16(f"split.{key}", value)
        if number == 0:
            _metadata(writer, "qwen3")
            _pieces(writer)
        for tensor in list(tensors)[number::2]:
            array, kind = tensors[tensor], KINDS.Q8_0
            if array.ndim > 1:
                writer.add_tensor(tensor, gguf.quants.quantize(array, kind), raw_dtype=kind)
            else:
                writer.add_tensor(tensor, array)
        _close(writer)
        files[name] = (folder / name).read_bytes()
    return files
