"""Hugging Face folders: reading and writing compared with the safetensors library, and error messages."""

import dataclasses
import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from whole_params import load_params, stack_layers

from refusion_jax import loader
from refusion_jax.checkpoints import hugging_face as hf
from refusion_jax.checkpoints import safetensors_io
from refusion_jax.errors import BadInput
from refusion_jax.model.rope import RopeScaling
from refusion_jax.model.transformer import ModelConfig, Transformer
from refusion_jax.sharding import MeshConfig, layout, make_mesh, unbox, with_shardings
from refusion_jax.weights.lazy import LazyArray, bounds, load_to_devices

QWEN3 = ModelConfig(40, 2, 16, 4, 2, 6, 24)  # heads x head_dim differs from the width
FAMILIES = {
    "qwen3": QWEN3,
    "qwen2": dataclasses.replace(QWEN3, qk_norm=False, qkv_bias=True, head_dim=4),
    "llama": dataclasses.replace(QWEN3, qk_norm=False, tie_embeddings=True),
}
RAW = hf.config_json(QWEN3)


def random_tensors(config: ModelConfig, dtype=np.float32) -> dict[str, np.ndarray]:
    """Tensors of a model by their Hugging Face names."""
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=entry.shape).astype(dtype) for name, entry in hf.table(config).items()}


def write(folder, tensors, **fields):
    """A folder written by the safetensors library."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(RAW | fields))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def write_shards(folder, shards):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(RAW))
    weight_map = {}
    for number, shard in enumerate(shards):
        safetensors.numpy.save_file(shard, folder / f"{number}.safetensors")
        weight_map |= dict.fromkeys(shard, f"{number}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / safetensors_io.INDEX).write_text(json.dumps(index))
    return folder


def as_stored(array: np.ndarray) -> LazyArray:
    return LazyArray(array.shape, array.dtype, lambda index: array[index], "here")


# Tensors.


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_the_tensors_in_our_axes(tmp_path, family):
    config = FAMILIES[family]
    tensors = random_tensors(config)
    folder = write(tmp_path, tensors, **hf.config_json(config))
    assert hf.read_config(folder) == config
    params = load_params(folder, config)
    N, H, D = config.num_heads, config.head_dim, config.embed_dim
    q = tensors["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(params["layers_1"]["attention"]["q"], q.reshape(N, H, D).transpose(2, 0, 1))
    o = tensors["model.layers.0.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(params["layers_0"]["attention"]["o"], o.reshape(D, N, H).transpose(1, 2, 0))
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    np.testing.assert_array_equal(params["layers_0"]["mlp"]["down"], down.T)
    assert ("head" in params) != config.tie_embeddings
    if config.qkv_bias:
        bias = tensors["model.layers.0.self_attn.k_proj.bias"]
        np.testing.assert_array_equal(params["layers_0"]["attention"]["k_bias"], bias.reshape(-1, H))
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), *np.zeros((2, 1, 1), np.int32))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, unbox(shapes["params"]))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_type_is_kept_or_cast(tmp_path, dtype):
    folder = write(tmp_path, random_tensors(QWEN3, dtype))
    kept, cast = load_params(folder, QWEN3), load_params(folder, QWEN3, np.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {np.dtype(dtype)}
    jax.tree.map(np.testing.assert_array_equal, cast, jax.tree.map(lambda x: x.astype(np.float32), kept))


def test_any_part_can_be_read_alone(tmp_path):
    params = hf.from_tensors(
        QWEN3, safetensors_io.read_folder(write(tmp_path, random_tensors(QWEN3))), tmp_path
    )
    rng = np.random.default_rng(1)
    for leaf in jax.tree.leaves(params):
        whole = leaf.whole()
        assert whole.shape == leaf.shape and whole.nbytes == leaf.nbytes
        for _ in range(5):
            ends = [sorted(rng.integers(0, size + 1, 2)) for size in leaf.shape]
            index = tuple(slice(int(start), int(stop)) for start, stop in ends)
            np.testing.assert_array_equal(leaf.read(index), whole[index], err_msg=leaf.where)


@pytest.mark.parametrize("scanned", [False, True])
def test_a_process_reads_its_own_parts_once(tmp_path, scanned):
    """On data=2, fsdp=2, tensor=2: each shard is read once, though two devices hold it."""
    tensors = random_tensors(QWEN3)
    folder = write(tmp_path, tensors)
    model = Transformer(QWEN3, scan_layers=scanned)
    boxed = jax.eval_shape(model.init, jax.random.key(0), *np.zeros((2, 1, 1), np.int32))["params"]
    mesh = make_mesh(MeshConfig(2, 2, 2))
    abstract = with_shardings(unbox(boxed), layout(boxed, mesh).shardings)
    params = loader.load_params(folder, QWEN3, abstract)
    wanted = load_params(folder, QWEN3)
    wanted = stack_layers(wanted) if scanned else wanted
    jax.tree.map(np.testing.assert_array_equal, params, wanted)
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, abstract)

    table, reads = tensors["model.embed_tokens.weight"], []
    recorded = LazyArray(table.shape, table.dtype, lambda index: reads.append(index) or table[index], "")
    load_to_devices([recorded], [abstract["embedding"]])
    assert sorted(bounds(index, table.shape) for index in reads) == [
        ((0, 20), (0, 8)),
        ((0, 20), (8, 16)),
        ((20, 40), (0, 8)),
        ((20, 40), (8, 16)),
    ]


def test_what_others_write_beside_the_weights_is_left_alone(tmp_path):
    """An equal head of a tied model and the RoPE buffers of old Llama files, as in `transformers`."""
    config = FAMILIES["llama"]
    tensors = random_tensors(config)
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32),
        "model.rotary_emb.inv_freq": np.ones(3, np.float16),
        "rotary_emb.inv_freq": np.ones((1, 3), np.float32),
        "model.layers.1.self_attn.rotary_emb.cos_cached": np.ones((1, 1, 8, 3), np.float32),
    }
    params = load_params(write(tmp_path, tensors | extra), config)
    assert "head" not in params


def test_a_tied_model_has_one_matrix_under_either_name(tmp_path):
    """A head that differs would be dropped in silence; a file with the head alone has the embedding in it."""
    config = FAMILIES["llama"]
    tensors = random_tensors(config)
    other = tensors["model.embed_tokens.weight"].copy()
    other[-1, -1] += 1
    with pytest.raises(
        BadInput, match=r"lm_head.weight.* differs from .*model.embed_tokens.weight.* to false"
    ):
        load_params(write(tmp_path / "other", tensors | {"lm_head.weight": other}), config)
    alone = {name: tensor for name, tensor in tensors.items() if name != "model.embed_tokens.weight"}
    alone["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    found = load_params(write(tmp_path / "alone", alone), config)
    jax.tree.map(
        np.testing.assert_array_equal, found, load_params(write(tmp_path / "whole", tensors), config)
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_library_reads_what_we_write(tmp_path, dtype):
    tensors = random_tensors(QWEN3, dtype)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    lazy = {name: as_stored(array) for name, array in tensors.items()}
    safetensors_io.write_folder(tmp_path, lazy, 10**9)
    found = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes(), name
    with safetensors.safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_and_their_index(tmp_path):
    tensors = random_tensors(QWEN3)
    largest = max(array.nbytes for array in tensors.values())
    total = sum(array.nbytes for array in tensors.values())
    for limit in (largest, total // 3 + largest, 1):
        folder = tmp_path / str(limit)
        folder.mkdir()
        safetensors_io.write_folder(folder, {n: as_stored(a) for n, a in tensors.items()}, limit)
        index = json.loads((folder / safetensors_io.INDEX).read_text())
        files = sorted(set(index["weight_map"].values()))
        assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
        assert index["metadata"]["total_size"] == total
        assert index["weight_map"].keys() == tensors.keys()
        for file in files:
            shard = safetensors.numpy.load_file(folder / file)
            assert len(shard) == 1 or sum(array.nbytes for array in shard.values()) <= limit
            assert {name for name, where in index["weight_map"].items() if where == file} == shard.keys()
        for name, tensor in safetensors_io.read_folder(folder).items():
            np.testing.assert_array_equal(tensor.whole(), tensors[name])
    assert len(files) == len(tensors)


# Broken folders.


def broken_folders(tmp_path):
    """(name of the mistake, a folder with it, part of the message)."""
    good = random_tensors(QWEN3)
    names = list(good)
    halves = [{name: good[name] for name in part} for part in (names[:5], names[5:])]

    def without(*left_out):
        return {name: array for name, array in good.items() if name not in left_out}

    yield "no weights", write_config_alone(tmp_path / "a"), "holds neither model.safetensors nor"
    norm = "model.layers.1.mlp.up_proj.weight"
    yield "a tensor is missing", write(tmp_path / "b", without(norm)), rf"tensor '{norm}' missing"
    many = write(tmp_path / "c", without("model.norm.weight", norm))
    yield "two tensors are missing", many, "and 1 more missing"
    extra = write(tmp_path / "d", good | {"model.extra": np.ones(1, np.float32)})
    yield "a tensor too many", extra, "model.safetensors: tensor 'model.extra' belongs to no part"
    wrong = write(tmp_path / "e", good | {norm: np.ones((2, 3), np.float32)})
    yield "a wrong shape", wrong, r"up_proj.weight' has shape \(2, 3\), config.json makes it \(24, 16\)"
    integers = write(tmp_path / "f", good | {norm: np.ones((24, 16), np.int8)})
    yield "a wrong type", integers, "up_proj.weight' has dtype 'I8', expected one of BF16, F16, F32"

    absent = write_shards(tmp_path / "g", halves)
    (absent / "1.safetensors").unlink()
    yield "a missing shard", absent, "index.json: names the file '1.safetensors', which is not in"
    index = {"weight_map": dict.fromkeys(names, "0.safetensors")}
    yield (
        "a tensor of the index that its file lacks",
        with_index(write_shards(tmp_path / "h", halves), index),
        "index.json: places tensor '.*' in 0.safetensors, which does not hold it",
    )
    index = {
        "weight_map": dict.fromkeys(names[:4], "0.safetensors") | dict.fromkeys(names[5:], "1.safetensors")
    }
    yield (
        "a tensor of a file that the index lacks",
        with_index(write_shards(tmp_path / "i", halves), index),
        rf"0.safetensors: holds tensor '{names[4]}', which .*index.json does not place there",
    )
    twice = write_shards(tmp_path / "j", [good, {names[0]: good[names[0]]}])
    yield "a tensor in two files", twice, "0.safetensors: holds tensor 'model.embed_tokens.weight', which"
    outside = with_index(write_shards(tmp_path / "k", halves), {"weight_map": {names[0]: "../x.safetensors"}})
    yield "a file outside", outside, r"names the file '\.\./x.safetensors'"
    for number, index in enumerate(({}, {"weight_map": []}, {"weight_map": {}})):
        folder = with_index(write_shards(tmp_path / f"l{number}", halves), index)
        yield "an index without a map", folder, "field 'weight_map' must map tensor names to files"
    folder = write_shards(tmp_path / "m", halves)
    (folder / safetensors_io.INDEX).write_text("{")
    yield "a broken index", folder, "index.json: not readable as JSON"


def write_config_alone(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(RAW))
    return folder


def with_index(folder, index):
    (folder / safetensors_io.INDEX).write_text(json.dumps(index))
    return folder


def test_broken_folders(tmp_path):
    for what, folder, complaint in broken_folders(tmp_path):
        with pytest.raises(BadInput, match=complaint) as caught:
            load_params(folder, QWEN3)
        assert "\n" not in str(caught.value), what


def entry(begin, end, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def file_bytes(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


BROKEN_FILES = {
    "empty": (b"", "0 bytes"),
    "cut in the length": (b"\x10\0\0", "3 bytes"),
    "cut in the header": (file_bytes({"a": entry(0, 4)}, b"1234")[:30], "cut short"),
    "a huge length": (
        file_bytes(b"{}", length=2**64 - 1),
        "header of 18,446,744,073,709,551,615 in 10 bytes",
    ),
    "a length beyond the file": (file_bytes(b"{}", length=3), "header of 3 in 10 bytes"),
    "no JSON": (file_bytes(b"PK\x03\x04"), "its header is not JSON"),
    "no text": (file_bytes(b"\xff\xfe\xff"), "its header is not JSON"),
    "deeply nested": (file_bytes(b"[" * 100_000), "its header is not JSON"),
    "no object": (file_bytes([1]), "must be a JSON object, found list"),
    "cut in the tensors": (file_bytes({"a": entry(0, 4)}, b"12"), "cut short or damaged"),
    "bytes left over": (file_bytes({"a": entry(0, 4)}, b"12345678"), "cut short or damaged"),
    "offsets beyond the file": (file_bytes({"a": entry(0, 4 * 2**50, shape=[2**50])}, b"1234"), "cut short"),
    "negative offsets": (file_bytes({"a": entry(-4, 0)}, b"1234"), r"data_offsets \[-4, 0\]"),
    "offsets backwards": (file_bytes({"a": entry(4, 0)}, b"1234"), "has -4 bytes"),
    "overlapping": (file_bytes({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"), "'b' begins at byte"),
    "a gap": (file_bytes({"a": entry(2, 6)}, b"123456"), "'a' begins at byte"),
    "fewer bytes than the shape": (
        file_bytes({"a": entry(0, 4, shape=[3])}, b"1234"),
        r"shape \(3,\) takes 12",
    ),
    "a negative size": (file_bytes({"a": entry(0, 4, shape=[-1])}, b"1234"), r"has shape \[-1\]"),
    "a fractional size": (file_bytes({"a": entry(0, 4, shape=[1.0])}, b"1234"), "expected a list of sizes"),
    "an unknown type": (
        file_bytes({"a": entry(0, 4, "F8_E4M3", [4])}, b"1234"),
        "'F8_E4M3', expected one of BF16",
    ),
    "a size beyond NumPy": (file_bytes({"a": entry(0, 0, shape=[0, 2**62])}), "expected a list of sizes"),
    "axes beyond NumPy": (file_bytes({"a": entry(0, 0, shape=[0] * 100)}), "expected a list of sizes"),
    "no entry": (file_bytes({"a": 1}), "has dtype None"),
    "three offsets": (file_bytes({"a": entry(0, 4) | {"data_offsets": [0, 4, 4]}}, b"1234"), "data_offsets"),
}


@pytest.mark.parametrize("what", BROKEN_FILES)
def test_broken_files(tmp_path, what):
    content, complaint = BROKEN_FILES[what]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=complaint) as caught:
        safetensors_io.read_folder(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../0.safetensors", "/etc/passwd", "x" * 5000, "a\0b", "", ".", "sub/0.safetensors"]
)
def test_an_index_names_files_of_its_folder_only(tmp_path, name):
    folder = write_shards(tmp_path / "model", [random_tensors(QWEN3)])
    (tmp_path / "0.safetensors").write_bytes((folder / "0.safetensors").read_bytes())
    (folder / "sub").mkdir()
    (folder / "sub" / "0.safetensors").write_bytes((folder / "0.safetensors").read_bytes())
    with_index(folder, {"weight_map": {"model.norm.weight": name}})
    with pytest.raises(BadInput, match=r"index.json: names the file '.*', which is not in"):
        safetensors_io.read_folder(folder)
    with_index(folder, {"weight_map": {"model.norm.weight": [name]}})
    with pytest.raises(BadInput, match="must map tensor names to files"):
        safetensors_io.read_folder(folder)


def test_one_file_beside_an_index_of_others_is_no_silent_choice(tmp_path):
    tensors = random_tensors(QWEN3)
    folder = write_shards(tmp_path, [tensors])
    (folder / "model.safetensors").write_bytes((folder / "0.safetensors").read_bytes())
    with pytest.raises(
        BadInput, match=r"holds model.safetensors and model.safetensors.index.json, which names"
    ):
        safetensors_io.read_folder(folder)
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (folder / safetensors_io.INDEX).write_text(json.dumps(index))
    assert safetensors_io.read_folder(folder).keys() == tensors.keys()


def test_a_header_may_say_more_and_a_tensor_may_be_empty(tmp_path):
    header = {"__metadata__": {"format": "pt"}, "b": entry(0, 4), "a": entry(4, 4, shape=[0, 3])}
    (tmp_path / "model.safetensors").write_bytes(file_bytes(header, np.float32(2.5).tobytes()))
    tensors = safetensors_io.read_folder(tmp_path)
    assert tensors["b"].whole() == 2.5 and tensors["a"].whole().shape == (0, 3)


def test_a_file_that_cannot_be_opened(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(BadInput, match="cannot be read"):
        safetensors_io.read_folder(tmp_path)


# config.json.


def config_of(tmp_path, **fields):
    raw = {name: value for name, value in (RAW | fields).items() if value != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return hf.read_config(tmp_path)


# config.json of the first Llama conversions, but for the sizes.
OLD_LLAMA = {
    "architectures": ["LLaMAForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "initializer_range": 0.02,
    "max_sequence_length": 2048,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": -1,
    "torch_dtype": "float16",
    "transformers_version": "4.27.0.dev0",
    "use_cache": True,
    "vocab_size": 40,
}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"num_key_value_heads": None, "head_dim": None}, {}),
        ({"rms_norm_eps": 1e-5, "num_key_value_heads": 2}, {"norm_eps": 1e-5, "num_kv_heads": 2}),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            {"rope_scaling": RopeScaling("yarn", 4.0, 2048)},
        ),
        (
            {"model_type": "qwen2", "num_attention_heads": 32, "num_key_value_heads": "absent"},
            {"num_heads": 32, "num_kv_heads": 32, "head_dim": 2, "qkv_bias": True},
        ),
        (
            {"model_type": "qwen3", "num_key_value_heads": None},
            {"head_dim": 128, "qk_norm": True},
        ),
    ],
)
def test_fields_left_out_are_as_in_transformers(tmp_path, fields, expected):
    raw = {name: value for name, value in (OLD_LLAMA | fields).items() if value != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    plain = ModelConfig(40, 2, 64, 4, 4, 16, 96, rope_theta=1e4, norm_eps=1e-6, qk_norm=False)
    assert hf.read_config(tmp_path) == dataclasses.replace(plain, **expected)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({}, None),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7e3}}, None),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeScaling("linear", 2)),
        ({"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2}}, RopeScaling("linear", 2)),
        ({"rope_scaling": YARN}, RopeScaling("yarn", 4.0, 64)),
        ({"rope_parameters": YARN | {"rope_theta": 7e3}}, RopeScaling("yarn", 4.0, 64)),
        (
            {"rope_parameters": YARN | {"partial_rotary_factor": 1.0, "mscale": None}},
            RopeScaling("yarn", 4.0, 64),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 99},
            RopeScaling("yarn", 4.0, 99),
        ),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 32}, RopeScaling("yarn", 4.0, 32)),
    ],
)
def test_rope_in_either_spelling(tmp_path, fields, scaling):
    config = config_of(tmp_path, **fields)
    theta = (fields.get("rope_parameters") or {}).get("rope_theta", QWEN3.rope_theta)
    assert config == dataclasses.replace(QWEN3, rope_scaling=scaling, rope_theta=theta)
    folder = tmp_path / "again"
    folder.mkdir()
    hf.write_config(folder, config, json.loads((tmp_path / "config.json").read_text()))
    assert hf.read_config(folder) == config


@pytest.mark.parametrize(
    "fields",
    [
        {"sliding_window": None},
        {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 1},
        {"layer_types": ["full_attention"] * 2},
        {"partial_rotary_factor": 1.0},
        {"head_dim": 6, "rope_theta": 10**6},
    ],
)
def test_fields_that_change_nothing(tmp_path, fields):
    assert config_of(tmp_path, **fields) == QWEN3


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        *(
            ({name: "absent"}, f"field '{name}' must be")
            for name in RAW
            if name not in ("architectures", "head_dim", "hidden_act", "rope_scaling", *hf.DEFAULTS["qwen3"])
        ),
        ({"vocab_size": "40"}, "field 'vocab_size' must be int, found '40'"),
        ({"tie_word_embeddings": 1}, "field 'tie_word_embeddings' must be bool, found 1"),
        ({"num_hidden_layers": 10**9}, "num_layers must be at most 10000, got 1000000000"),
        ({"hidden_size": 2**31}, "embed_dim must be at most 2147483647"),
        ({"rope_theta": 10**400}, "field 'rope_theta' must be float"),
        ({"rope_theta": float("inf")}, "rope_theta must be above 0 and finite"),
        ({"rms_norm_eps": float("nan")}, "norm_eps must be 0 or above and finite"),
        ({"rope_scaling": {"type": ["yarn"], "factor": 2.0}}, "rope_scaling.rope_type must be one of"),
        ({"rope_scaling": YARN | {"factor": 10**400}}, "rope_scaling.factor must be a positive number"),
        ({"layer_types": 5}, "layer_types must be a list, found 5"),
        ({"num_hidden_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_key_value_heads": 3}, "num_heads must be a multiple"),
        ({"model_type": "gpt2"}, "model_type must be one of qwen3, qwen2, llama, found 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', found 'gelu'"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ({"sliding_window": 128, "use_sliding_window": True}, "sliding-window attention is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window attention"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type must be one of"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type must be one of"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is needed"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "x": 1}}, "rope_scaling.x is no field"),
        ({"rope_scaling": "yarn"}, "field 'rope_scaling' must be one set of numbers"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "'rope_parameters' must be one set",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "must be 1"),
    ],
)
def test_what_the_model_does_not_do_is_refused(tmp_path, fields, complaint):
    with pytest.raises(BadInput, match=complaint) as caught:
        config_of(tmp_path, **fields)
    assert str(tmp_path / "config.json") in str(caught.value) and "\n" not in str(caught.value)


def test_the_config_that_is_written(tmp_path):
    """Unknown fields are kept; fields of the shape are replaced; references to Python files are dropped."""
    extra = {
        "max_position_embeddings": 40960,
        "eos_token_id": [1, 2],
        "vocab_size": 7,
        "dtype": "float64",
        "rope_parameters": {"rope_theta": 1.0},
        "auto_map": {"AutoModel": "modeling.py"},
    }
    hf.write_config(tmp_path, QWEN3, extra)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw == RAW | {"max_position_embeddings": 40960, "eos_token_id": [1, 2]}
    with pytest.raises(BadInput, match="qk_norm and qkv_bias together"):
        hf.write_config(tmp_path, dataclasses.replace(QWEN3, qkv_bias=True), {})


def test_no_memory_of_ours_is_the_files(tmp_path):
    """Loaded arrays stay valid after the file is deleted."""
    folder = write(tmp_path, random_tensors(QWEN3))
    tensor = safetensors_io.read_folder(folder)["model.embed_tokens.weight"]
    part = tensor.read((slice(3, 5), slice(0, 4)))
    before = part.copy()
    os.truncate(folder / "model.safetensors", 0)
    np.testing.assert_array_equal(part, before)


DEFAULTS = {"verify": "threshold", "first_token": "mask", "border": "ar", "slot_sizes": (4, 8, 16, 32)}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"mask_token_id": 3}, DEFAULTS),
        ({}, DEFAULTS | {"first_token": "next"}),  # without a mask token it was trained left to right
        ({"objective": "ar", "mask_token_id": 3}, DEFAULTS | {"first_token": "next"}),
        ({"objective": "ar", "first_token": "mask"}, DEFAULTS),
        (
            {
                "objective": "refusion",
                "verify": "exact",
                "first_token": "next",
                "border": "draft",
                "slot_sizes": [8],
            },
            {"verify": "exact", "first_token": "next", "border": "draft", "slot_sizes": (8,)},
        ),
    ],
    ids=str,
)
def test_config_json_decides_how_to_decode(tmp_path, fields, expected):
    (tmp_path / "config.json").write_text(json.dumps(RAW | fields))
    assert hf.decoding_defaults(tmp_path) == expected


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("verify", "always", "verify must be one of threshold, exact, found 'always'"),
        ("first_token", 1, "first_token must be one of next, mask, found 1"),
        ("border", None, "border must be one of ar, draft, found None"),
        ("border", [], "border must be one of ar, draft, found []"),
        ("slot_sizes", [], "slot_sizes must be a list of whole numbers above 0, found []"),
        ("slot_sizes", [4, True], "slot_sizes must be a list of whole numbers above 0, found [4, True]"),
        ("slot_sizes", 8, "slot_sizes must be a list of whole numbers above 0, found 8"),
    ],
    ids=str,
)
def test_impossible_ways_to_decode(tmp_path, field, value, expected):
    (tmp_path / "config.json").write_text(json.dumps({field: value}))
    with pytest.raises(BadInput) as caught:
        hf.decoding_defaults(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'config.json'}: {expected}"


@pytest.mark.parametrize("value", [["ar"], 7, {}])
def test_an_objective_is_text(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps({"objective": value}))
    with pytest.raises(BadInput, match=r"config.json: objective must be text"):
        hf.objective(tmp_path)
