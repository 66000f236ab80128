"""GGUF files written here with the gguf package: weights and shape are read with Hugging Face's layout."""

import builtins
import dataclasses
import math

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
    extra = write(tmp_path / "extra.gguf", "qwen3", tensors | {"cls.weight": np.ones(16, np.float32)})
    with pytest.raises(BadInput, match=r"'cls.weight' belongs to no part"):
        read_gguf(GGUFFile(extra))
    del tensors["model.embed_tokens.weight"]
    with pytest.raises(BadInput, match=r"'token_embd.weight' missing"):
        read_gguf(GGUFFile(write(tmp_path / "missing.gguf", "qwen3", tensors)))


EMBEDDING = {"model.embed_tokens.weight": np.ones((40, 64), np.float32)}


def llama3_factors(theta, head_dim, factor, low, high, length):
    """`rope_freqs.weight` as llama.cpp's converter computes it from rope_scaling."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        smooth = (length / wavelength - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1 if wavelength < length / high else factor if wavelength > length / low else between)
    return np.array(factors, np.float32)


@pytest.mark.parametrize(
    ("head_dim", "scaling"),
    [(128, (8.0, 1.0, 4.0, 8192)), (64, (32.0, 1.0, 4.0, 8192)), (64, (4.0, 1.0, 3.0, 5000))],
)
def test_rope_factors_are_the_llama3_scaling_that_made_them(tmp_path, head_dim, scaling):
    config = dataclasses.replace(FAMILIES["llama"], num_heads=2, num_kv_heads=1, head_dim=head_dim)
    change = {
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
    }
    factors = llama3_factors(config.rope_theta, head_dim, *scaling)
    path = write(tmp_path / "model.gguf", "llama", {"rope_freqs.weight": factors} | EMBEDDING, change=change)
    fields, tensors = read_gguf(GGUFFile(path))
    factor, low, high, length = scaling
    found = hf.parse_config(fields, path).rope_scaling
    assert found.as_fields() == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
    assert tensors.keys() == {"model.embed_tokens.weight"}


def test_rope_factors_of_no_known_scaling(tmp_path):
    def fields_of(factors, **change):
        tensors = {"rope_freqs.weight": np.asarray(factors, np.float32)} | EMBEDDING
        return read_gguf(GGUFFile(write(tmp_path / "model.gguf", "llama", tensors, change=change)))[0]

    assert fields_of(np.ones(8))["rope_scaling"] is None
    for factors in (np.linspace(1, 4, 8), np.full(8, 2), [1] * 7 + [np.nan], [4] + [1] * 7, -np.ones(8)):
        with pytest.raises(BadInput, match=r"'rope_freqs.weight' holds RoPE factors of no scaling"):
            fields_of(factors)
    with pytest.raises(BadInput, match=r"has shape \(7,\), expected \(8,\)"):
        fields_of(np.ones(7))
    with pytest.raises(BadInput, match="both scale RoPE"):
        fields_of(np.ones(8), **{"rope.scaling.type": "linear", "rope.scaling.factor": 2.0})


def write_parts(folder, tensors, count=3, **change):
    """A split file as llama.cpp writes it: the first part has the metadata, each part some tensors."""
    names, paths = list(tensors), []
    for number in range(count):
        path = folder / f"model-{number + 1:05}-of-{count:05}.gguf"
        writer = gguf.GGUFWriter(path, "qwen3")
        split = {"no": number, "count": count, "tensors.count": len(names)} | change
        for name, value in split.items():
            writer.add_uint16(f"split.{name}", value)
        if number == 0:
            whole = gguf.GGUFReader(write(folder / "whole.gguf", "qwen3", {}))
            for name, field in whole.fields.items():
                if name.startswith("qwen3."):
                    writer.add_key_value(name, field.contents(), field.types[0])
        for name in names[number::count]:
            writer.add_tensor(gguf_name(name), tensors[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


def test_split_files(tmp_path):
    tensors = random_tensors(QWEN3)
    paths = write_parts(tmp_path, tensors)
    for path in paths:  # whichever part is named
        fields, found = read_gguf(GGUFFile(path))
        assert hf.parse_config(fields, path) == QWEN3
        assert found.keys() == tensors.keys()
        for name in tensors:
            np.testing.assert_array_equal(found[name].whole(), tensors[name], err_msg=name)
    paths[1].rename(tmp_path / "kept")
    with pytest.raises(
        BadInput, match=r"one of 3 parts, of which model-00002-of-00003.gguf is missing beside"
    ):
        GGUFFile(paths[0])
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(BadInput, match=r"model-00002-of-00003.gguf: is part 3 of 3 .* expected part 2 of 3"):
        GGUFFile(paths[0])
    with pytest.raises(
        BadInput, match=r"kept: is one of 3 parts .* expected a name like NAME-00001-of-00003"
    ):
        GGUFFile(tmp_path / "kept")
    paths = write_parts(tmp_path, tensors, **{"tensors.count": 99})
    with pytest.raises(BadInput, match=f"its 3 parts have {len(tensors)} tensors, split.tensors.count is 99"):
        GGUFFile(paths[0])


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


@pytest.mark.parametrize(
    ("name", "shift", "number", "complaint"),
    [
        # After the name of a metadatum: its type, then its value; a list has type, length, elements.
        ("qwen3.block_count", 0, 9, "a name of 196,608 bytes at byte"),
        ("qwen3.block_count", 0, 99, "metadata of the unknown type 99"),
        ("qwen3.block_count", 0, 8, "cut short: .* bytes at byte"),
        ("a.list", 8, 2**40, "cut short: 4,398,046,511,104 bytes at byte"),
        # After the name of a tensor: its number of axes, the axes, its type and its offset.
        ("output_norm.weight", 0, 2**31, "has 2147483648 axes, expected 1 to 4"),
        ("output_norm.weight", 4, 2**62, r"has the shape \(4611686018427387904,\)"),
        ("output_norm.weight", 4, 2**40, "cut short: tensor 'output_norm.weight' ends at byte"),
        ("output_norm.weight", 12, 77, "'output_norm.weight' has the unknown type 77"),
        ("output_norm.weight", 16, 0, "begins at byte 0 of the data, inside another"),
    ],
)
def test_numbers_of_a_header_that_cannot_be(tmp_path, name, shift, number, complaint):
    """The reader of the package gguf takes the long list for one of 2**40 elements, and never ends."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_uint32("qwen3.block_count", 2)
    writer.add_array("a.list", [1, 2, 3])
    for tensor in ("token_embd.weight", "output_norm.weight"):
        writer.add_tensor(tensor, np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = path.read_bytes()
    place = content.index(name.encode()) + len(name) + shift
    size = 4 if number < 2**32 and shift != 16 else 8
    path.write_bytes(content[:place] + number.to_bytes(size, "little") + content[place + size :])
    with pytest.raises(BadInput, match=f"model.gguf: not a readable GGUF file .*{complaint}"):
        GGUFFile(path)


@pytest.mark.parametrize(
    "change",
    [
        {"attention.head_count": 2**31},
        {"attention.key_length": 2**31},
        {"attention.key_length": 15, "attention.value_length": 15},
    ],
)
def test_heads_that_do_not_fit_the_rows(tmp_path, change):
    tensors = random_tensors(FAMILIES["llama"])
    path = write(tmp_path / "model.gguf", "llama", tensors, change={"attention.value_length": None} | change)
    with pytest.raises(BadInput, match=r"'blk.0.attn_[qk].weight' has .* rows, its metadata make it"):
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
