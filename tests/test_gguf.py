"""GGUF files written here with the gguf package: weights and shape are read with Hugging Face's layout."""

import builtins
import dataclasses

import jax
import numpy as np
import pytest

from refusion_jax.checkpoints import hugging_face as hf
from refusion_jax.checkpoints.gguf_file import GGUFFile
from refusion_jax.checkpoints.gguf_weights import LAYER_NAMES, NAMES, read_gguf
from refusion_jax.errors import BadInput
from refusion_jax.model.rope import RopeScaling
from refusion_jax.model.transformer import ModelConfig

gguf = pytest.importorskip("gguf")

QWEN3 = ModelConfig(40, 2, 64, 4, 2, 32, 96, rope_theta=5e5, norm_eps=1e-5)
FAMILIES = {
    "qwen3": QWEN3,
    "qwen2": dataclasses.replace(QWEN3, qk_norm=False, qkv_bias=True, head_dim=16),
    "llama": dataclasses.replace(QWEN3, qk_norm=False, head_dim=16, tie_embeddings=True),
}
KINDS = gguf.GGMLQuantizationType


def random_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=e.shape).astype(np.float32) for n, e in hf.table(config).items()}


def gguf_name(name: str) -> str:
    if name in NAMES.values():
        return next(theirs for theirs, ours in NAMES.items() if ours == name)
    _, _, layer, *part, kind = name.split(".")
    return f"blk.{layer}.{next(t for t, ours in LAYER_NAMES.items() if ours == '.'.join(part))}.{kind}"


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """q or k in the order of Llama GGUF files: channels i and i + H/2 of a head are adjacent."""
    split = rows.reshape(heads, 2, -1, rows.shape[-1])
    return np.stack([split[:, 0], split[:, 1]], axis=2).reshape(rows.shape)


def write(path, family, tensors, kind=KINDS.F32, change=None):
    """A GGUF file of Hugging Face tensors; `change` modifies the metadata before it is written."""
    c = FAMILIES[family]
    metadata = {
        "block_count": c.num_layers,
        "context_length": 128,
        "embedding_length": c.embed_dim,
        "feed_forward_length": c.mlp_dim,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.norm_eps,
        "rope.freq_base": c.rope_theta,
        "expert_count": 0,
    } | (change or {})
    writer = gguf.GGUFWriter(path, family)
    for name, value in metadata.items():
        add = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            bool: writer.add_bool,
        }
        if value is not None:
            add[type(value)](f"{family}.{name}", value)
    for name, array in tensors.items():
        if family == "llama" and "q_proj" in name:
            array = interleaved(array, c.num_heads)
        if family == "llama" and "k_proj" in name:
            array = interleaved(array, c.num_kv_heads)
        name = gguf_name(name) if name in hf.table(c) else name
        if array.ndim > 1 and kind != KINDS.F32:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "kind", [KINDS.F32, KINDS.F16, KINDS.BF16, KINDS.Q8_0, KINDS.Q4_1], ids=lambda k: k.name
)
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_and_shape_come_back(tmp_path, family, kind):
    tensors = random_tensors(FAMILIES[family])
    path = write(tmp_path / "model.gguf", family, tensors, kind)
    fields, found = read_gguf(GGUFFile(path))
    assert hf.parse_config(fields, path) == FAMILIES[family]
    assert fields["max_position_embeddings"] == 128
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        whole = found[name].whole()
        assert whole.dtype == np.float32 and whole.shape == array.shape == found[name].shape
        if array.ndim > 1:  # each row is quantised separately, so their order has no effect
            array = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
        np.testing.assert_array_equal(whole, array, err_msg=name)
        rows = slice(3, 9) if array.shape[0] > 9 else slice(None)
        part = found[name].read((rows, slice(5, 8))[: array.ndim])
        np.testing.assert_array_equal(part, whole[(rows, slice(5, 8))[: array.ndim]], err_msg=name)
    params = hf.from_tensors(FAMILIES[family], found, path)
    assert len(jax.tree.leaves(params)) == len(tensors)


@pytest.mark.parametrize(
    ("change", "scaling"),
    [
        ({"rope.scaling.type": "none", "rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, RopeScaling("linear", 2.0)),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
                "rope.scaling.finetuned": True,
            },
            RopeScaling("yarn", 4.0, 32),
        ),
        ({"attention.key_length": None, "attention.value_length": None, "rope.dimension_count": 16}, None),
    ],
)
def test_rope_scaling_and_defaults(tmp_path, change, scaling):
    config = FAMILIES["llama"]
    path = write(tmp_path / "model.gguf", "llama", random_tensors(config), change=change)
    assert hf.parse_config(read_gguf(GGUFFile(path))[0], path) == dataclasses.replace(
        config, rope_scaling=scaling
    )


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"block_count": None}, "metadata qwen3.block_count is missing"),
        ({"block_count": "2"}, "metadata qwen3.block_count must be int, found '2'"),
        (
            {"attention.sliding_window": 64},
            "metadata qwen3.attention.sliding_window is not supported, found 64",
        ),
        ({"expert_count": 8}, "expert_count is not supported"),
        ({"rope.scaling.attn_factor": 0.5}, "attn_factor is not supported"),
        ({"rope.dimension_count": 16}, "rope.dimension_count must be 32, the size of a head"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "rope_type must be one of"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.factor is missing"),
        ({"embedding_length": 32}, r"has shape \(40, 64\), config.json makes it \(40, 32\)"),
        ({"block_count": 3}, r"'model.layers.2.input_layernorm.weight' and 10 more missing"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path, change, complaint):
    path = write(tmp_path / "model.gguf", "qwen3", random_tensors(QWEN3), change=change)
    with pytest.raises(BadInput, match=complaint) as caught:
        fields, tensors = read_gguf(GGUFFile(path))
        hf.from_tensors(hf.parse_config(fields, path), tensors, path)
    assert str(path) in str(caught.value)


def test_tensors_that_do_not_fit(tmp_path):
    tensors = random_tensors(QWEN3)
    extra = write(tmp_path / "extra.gguf", "qwen3", tensors | {"rope_freqs.weight": np.ones(16, np.float32)})
    with pytest.raises(BadInput, match=r"'rope_freqs.weight' belongs to no part"):
        read_gguf(GGUFFile(extra))
    del tensors["model.embed_tokens.weight"]
    with pytest.raises(BadInput, match=r"'token_embd.weight' missing"):
        read_gguf(GGUFFile(write(tmp_path / "missing.gguf", "qwen3", tensors)))


def test_files_that_are_none(tmp_path):
    path = write(tmp_path / "model.gguf", "qwen3", random_tensors(QWEN3))
    content = path.read_bytes()
    for size in (0, 3, 20, 200, len(content) // 2, len(content) - 4):
        path.write_bytes(content[:size])
        with pytest.raises(BadInput, match="not a readable GGUF file"):
            read_gguf(GGUFFile(path))
    path.write_bytes(b"PK\x03\x04" + content)
    with pytest.raises(BadInput, match="magic"):
        read_gguf(GGUFFile(path))
    other = gguf.GGUFWriter(path, "gpt2")
    other.write_header_to_file()
    other.write_kv_data_to_file()
    other.write_tensors_to_file()
    other.close()
    with pytest.raises(BadInput, match="must be one of llama, qwen2, qwen3, found 'gpt2'"):
        read_gguf(GGUFFile(path))


def test_without_the_package(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name == "gguf":
            raise ImportError
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(
        BadInput, match=r"model.gguf: needs the package gguf: pip install 'refusion_jax\[gguf\]'"
    ):
        GGUFFile(tmp_path / "model.gguf")
