"""Valid files to mutate, small so that a case takes a millisecond."""

import functools
import io
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from refusion_jax.checkpoints import hugging_face as hf
from refusion_jax.model.transformer import ModelConfig

SPECIAL = ["<pad>", "<bos>", "<eos>", "<mask>"]
TEXT = "the cat sat on the mat, the dog ate 17 eggs & 3 <ham>s"
TEMPLATE = (
    "{%- if tools %}{{ tools | tojson(indent=1) }}{% endif %}{{ bos_token }}"
    "{% for m in messages %}{%- if m.role not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "{% set content = m.content | trim %}{% if loop.first and m.role == 'system' %}{% continue %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ content.split('</think>')[-1].lstrip('\\n') }}{{ eos_token }}\n{% endfor %}"
    "{% macro end(n) %}{% for i in range(n) %}{{ '%d' % i }}{{ 'a' * n }}{% endfor %}{% endmacro %}"
    "{% if add_generation_prompt %}{{ end(3) }}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>{% endif %}{% endif %}"
)
SHORT = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m['content'] }}\n{% endfor %}"
CONFIG = ModelConfig(40, 1, 16, 4, 2, 6, 24)
SCALINGS = (
    None,
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"type": "linear", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
)

Files = dict[str, bytes]


def as_json(value) -> bytes:
    return json.dumps(value).encode()


def safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    names = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(ml_dtypes.bfloat16): "BF16"}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = as_json(header)
    return len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in tensors.values())


@functools.cache
def model_tensors() -> dict[str, np.ndarray]:
    return {name: np.ones(entry.shape, np.float32) for name, entry in hf.table(CONFIG).items()}


def safetensors_folders() -> list[Files]:
    """One file; two shards and their index."""
    one = {"a": np.ones((2, 3), np.float32), "b.c": np.ones(4, np.float16), "d": np.ones((0, 3), np.float32)}
    two = {"e": np.ones((2, 2), ml_dtypes.bfloat16)}
    index = {"weight_map": dict.fromkeys(one, "1.safetensors") | dict.fromkeys(two, "2.safetensors")}
    shards = {"1.safetensors": safetensors(one), "2.safetensors": safetensors(two)}
    return [
        {"model.safetensors": safetensors(one)},
        {"model.safetensors.index.json": as_json(index), **shards},
    ]


def config_folders() -> list[Files]:
    """config.json with every scaling of RoPE, and the fields that training adds, beside weights."""
    weights = safetensors(model_tensors())
    added = {
        "verify": "exact",
        "first_token": "mask",
        "border": "ar",
        "slot_sizes": [4, 8],
        "objective": "refusion",
        "mask_token_id": 3,
        "eos_token_id": [2, 1],
        "pad_token_id": 0,
        "max_position_embeddings": 128,
        "layer_types": ["full_attention"],
        "partial_rotary_factor": 1.0,
    }
    old = {"tokenizer_config.json": as_json({"tokenizer_class": "ByteTokenizer"})}
    return [
        {
            "config.json": as_json(hf.config_json(CONFIG) | added | {"rope_scaling": scaling}),
            "model.safetensors": weights,
            **old,
        }
        for scaling in SCALINGS
    ]


@functools.cache
def byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet()} & {*map(chr, range(33, 127)), "Ġ"})
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return backend


@functools.cache
def sentence_piece() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20),
        model_writer=model,
        vocab_size=60,
        model_type="bpe",
        user_defined_symbols=["<mask>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def tokenizer_folders() -> list[Files]:
    """tokenizer.json; vocab.json and merges.txt; tokenizer.model; bytes. With their settings."""
    state = json.loads(byte_level().to_str())
    ids = {
        "mask_token_id": 3,
        "eos_token_id": [2, 0],
        "pad_token_id": 0,
        "bos_token_id": 1,
        "vocab_size": 130,
    }
    added = {
        str(i): {"content": text, "special": True, "lstrip": False, "normalized": False}
        for i, text in enumerate(SPECIAL)
    }
    settings = {
        "chat_template": SHORT,
        "eos_token": "<eos>",
        "mask_token": {"content": "<mask>"},
        "additional_special_tokens": ["<pad>"],
        "add_bos_token": True,
        "bos_token": "<bos>",
    }
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in state["model"]["merges"])
    common = {"config.json": as_json(ids), "generation_config.json": as_json({"eos_token_id": [2]})}
    return [
        {
            **common,
            "tokenizer.json": as_json(state),
            "tokenizer_config.json": as_json(settings | {"added_tokens_decoder": added}),
        },
        {
            **common,
            "vocab.json": as_json(state["model"]["vocab"]),
            "merges.txt": merges.encode(),
            "tokenizer_config.json": as_json(settings | {"tokenizer_class": "GPT2Tokenizer"}),
            "added_tokens.json": as_json({text: i for i, text in enumerate(SPECIAL)}),
            "special_tokens_map.json": as_json({"eos_token": "<eos>", "pad_token": {"content": "<pad>"}}),
        },
        {
            "tokenizer.model": sentence_piece(),
            "tokenizer_config.json": as_json(
                {"eos_token": "</s>", "legacy": False, "added_tokens_decoder": {"90": {"content": "<new>"}}}
            ),
            "config.json": as_json({"eos_token_id": 2, "mask_token_id": 3, "vocab_size": 100}),
        },
        {"tokenizer_config.json": as_json({"tokenizer_class": "ByteTokenizer"})},
    ]


def jsonl_files() -> list[Files]:
    import gzip

    records = [
        {"query": "What is 1 + 1?", "response": "2"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
        {"query": "é🙂", "response": "", "more": [1, {"a": None}]},
    ]
    lines = b"\n".join(map(as_json, records)) + b"\n"
    return [{"data.jsonl": lines}, {"data.jsonl.gz": gzip.compress(lines, mtime=0)}]


def request_files() -> list[Files]:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    settings = {
        "gen_length": 32,
        "slot_size": 8,
        "num_blocks": 2,
        "slot_threshold": 0.9,
        "token_threshold": 0.4,
        "temperature": 0.5,
        "seed": 1,
        "semantics": "fixed",
        "trace": True,
    }
    exact = {"verify": "exact", "draft_length": 4, "first_token": "next", "border": "ar"}
    records = [
        {"id": "7", "prompt": "Hello", **settings},
        {"id": 8, "messages": messages, "gen_length": 64, **exact},
        {"id": "9", "prompt_ids": [1, 2, 3], "block_len": 4, "tokens_per_step": 2},
    ]
    return [{"requests.jsonl": b"\n".join(map(as_json, [record]))} for record in records]


def gguf_files(folder: Path) -> list[Files]:
    """A Llama with factors of RoPE and byte-level BPE; a Qwen3 in two parts with quantised tensors."""
    from fuzzing.gguf_seeds import llama, qwen3_parts

    return [llama(folder), qwen3_parts(folder)]
