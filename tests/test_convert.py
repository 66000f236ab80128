"""Conversion in both directions: bytes are preserved, memory stays small, and a failure leaves no files."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tensorstore
import tokenizers
from whole_params import load_params, stack_layers

from refusion_jax import convert, load
from refusion_jax.checkpoints import hugging_face as hf
from refusion_jax.checkpoints import orbax_io as checkpoint
from refusion_jax.checkpoints import safetensors_io
from refusion_jax.errors import BadInput
from refusion_jax.model.rope import RopeScaling
from refusion_jax.model.transformer import ModelConfig
from refusion_jax.sharding import MeshConfig, make_mesh
from refusion_jax.tokenizer import ByteTokenizer
from refusion_jax.weights.fused import fuse_projections
from refusion_jax.weights.lazy import LazyArray
from refusion_jax.weights.new_tokens import add_rows
from refusion_jax.weights.quantized import quantize

SCALING = RopeScaling("yarn", 4.0, 64, attention_factor=0.9)
QWEN3 = ModelConfig(272, 3, 16, 4, 2, 6, 24, rope_scaling=SCALING)
QWEN2 = dataclasses.replace(QWEN3, qk_norm=False, qkv_bias=True, head_dim=4, rope_scaling=None)
LLAMA = dataclasses.replace(QWEN3, qk_norm=False)
BYTES_IDS = {"mask_token_id": 259, "eos_token_id": 258, "pad_token_id": 256, "bos_token_id": 257}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def hugging_face(
    folder: Path, config: ModelConfig = QWEN3, dtype=BFLOAT16, shard_bytes=10**9, **fields
) -> Path:
    """A Hugging Face folder of random weights with the byte tokenizer."""
    folder.mkdir()

    def tensor(seed, shape):
        numbers = np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)
        return LazyArray(shape, np.dtype(dtype), lambda index: numbers[index], "random")

    tensors = {n: tensor(seed, e.shape) for seed, (n, e) in enumerate(hf.table(config).items())}
    safetensors_io.write_folder(folder, tensors, shard_bytes)
    hf.write_config(folder, config, BYTES_IDS | {"max_position_embeddings": 256} | fields)
    ByteTokenizer().save(folder)
    return folder


def hashes(folder: Path) -> dict[str, tuple]:
    """name -> type, shape and sha256 of every tensor, read by the safetensors library."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, array in safetensors.numpy.load_file(file).items():
            assert name not in found
            found[name] = (str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest())
    return found


def raw_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def run(*arguments) -> tuple[int, list[Path]]:
    return convert.main([str(argument) for argument in arguments])


# Round trips.


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [QWEN3, QWEN2, LLAMA], ids=["qwen3", "qwen2", "llama"])
def test_the_same_bytes_come_back(tmp_path, monkeypatch, config, tied, shards):
    config = dataclasses.replace(config, tie_embeddings=tied)
    size = sum(np.prod(entry.shape) for entry in hf.table(config).values()) * 2
    limit = int(size * 0.42) if shards == 3 else 10**9
    source = hugging_face(tmp_path / "hf", config, shard_bytes=limit)
    monkeypatch.setattr(convert, "SHARD_BYTES", limit)
    assert run(source, tmp_path / "ours") == 0
    assert run(tmp_path / "ours", tmp_path / "back") == 0
    assert len(list(source.glob("*.safetensors"))) == shards
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == shards
    assert hashes(tmp_path / "back") == hashes(source)
    assert raw_config(tmp_path / "back") == raw_config(source) | {"torch_dtype": "bfloat16"}
    assert hf.read_config(tmp_path / "ours") == config
    assert checkpoint.latest_step(tmp_path / "ours") == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
def test_types_are_kept_or_cast(tmp_path, dtype):
    name = np.dtype(dtype).name
    source = hugging_face(tmp_path / "hf", dtype=dtype)
    assert run(source, tmp_path / "same", "--to=hf") == 0
    assert hashes(tmp_path / "same") == hashes(source)
    for other in convert.DTYPES:
        for layout in ("hf", "orbax"):
            folder = tmp_path / f"{layout}-{other}"
            assert run(source, folder, f"--to={layout}", f"--dtype={other}") == 0
            assert raw_config(folder)["torch_dtype"] == other
            wanted = load_params(source, QWEN3, other)
            found = load(folder)[1]
            assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {other}
            jax.tree.map(np.testing.assert_array_equal, found, fuse_projections(wanted))
    assert raw_config(tmp_path / "same")["torch_dtype"] == name


@pytest.mark.parametrize("scan_layers", [False, True])
def test_what_training_saved_is_exported(tmp_path, scan_layers):
    """Exports a training checkpoint: float32, on a mesh, layers scanned or not, with optimizer state."""
    source = hugging_face(tmp_path / "hf", dtype=np.float32)
    params = load_params(source, QWEN3)
    params = stack_layers(params) if scan_layers else params
    run_folder = tmp_path / "run"
    with checkpoint.Checkpoints(run_folder, keep=1) as checkpoints:
        checkpoints.save(7, {"params": params, "optimizer": (jnp.int32(7), params)}, {"next_index": 3})
    hf.write_config(run_folder, QWEN3, BYTES_IDS | {"objective": "refusion"})
    ByteTokenizer().save(run_folder)
    assert run(run_folder, tmp_path / "back") == 0
    assert hashes(tmp_path / "back") == hashes(source)
    assert raw_config(tmp_path / "back")["objective"] == "refusion"
    if scan_layers:  # each layer in its own chunks, so that it can be read alone
        path = f"{run_folder}/checkpoints/7/params/"
        kvstore = {"driver": "ocdbt", "base": f"file://{path}", "path": "layers.mlp.up/"}
        array = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
        assert array.shape[0] == 3 and array.chunk_layout.read_chunk.shape[0] == 1
    found, wanted = load(run_folder)[1], load(source)[1]
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_logits_are_the_same_from_either_layout_and_on_a_mesh(tmp_path):
    source = hugging_face(tmp_path / "hf", dtype=np.float32)
    assert run(source, tmp_path / "ours") == 0
    tokens = np.random.default_rng(0).integers(0, 256, (2, 9))
    positions = np.stack([np.random.default_rng(i).permutation(9) for i in range(2)])
    logits = []
    for folder in (source, tmp_path / "ours"):
        for mesh in (None, make_mesh(MeshConfig(2, 2, 2))):
            model, params, tokenizer = load(folder, mesh)
            assert model.config == QWEN3 and tokenizer.mask_id == 259
            logits.append(np.asarray(jax.jit(model.apply)({"params": params}, tokens, positions)[0]))
    for other in logits[1:]:
        np.testing.assert_allclose(other, logits[0], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(logits[2], logits[0])


def test_int8_weights_are_made_as_they_are_read(tmp_path):
    source = hugging_face(tmp_path / "hf", dtype=np.float32)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 9))
    positions = np.broadcast_to(np.arange(9), (2, 9))
    wanted = quantize(fuse_projections(load_params(source, QWEN3)))
    plain, params, _ = load(source)
    exact = np.asarray(jax.jit(plain.apply)({"params": params}, tokens, positions)[0])
    for mesh in (None, make_mesh(MeshConfig(2, 2, 2))):
        model, params, _ = load(source, mesh, int8=True)
        assert jax.tree.structure(params) == jax.tree.structure(wanted)
        assert params["layers_0"]["attention"]["qkv"].dtype == jnp.int8
        logits, _ = jax.jit(model.apply)({"params": params}, tokens, positions)
        assert np.linalg.norm(np.asarray(logits) - exact) < 0.05 * np.linalg.norm(exact)
    half = load(source, dtype=jnp.bfloat16, int8=True)[1]
    assert half["embedding"].dtype == jnp.bfloat16 and half["head_scale"].dtype == jnp.float32


def test_what_config_json_says_survives(tmp_path):
    fields = {"max_position_embeddings": 40960, "eos_token_id": [258, 256], "initializer_range": 0.02}
    source = hugging_face(tmp_path / "hf", **fields)
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    assert run(source, tmp_path / "ours") == 0
    assert run(tmp_path / "ours", tmp_path / "back") == 0
    for folder in (tmp_path / "ours", tmp_path / "back"):
        raw = raw_config(folder)
        assert {name: raw[name] for name in fields} == fields
        assert raw["mask_token_id"] == 259 and raw["rope_scaling"] == SCALING.as_fields()
        assert (folder / "generation_config.json").read_text() == '{"temperature": 0.6}'
        assert load(folder)[2].eos_id == 258


# New tokens.


def without_mask(folder: Path, config: ModelConfig, num_tokens=260) -> Path:
    """A base model whose tokenizer has `num_tokens` words and EOS as its only special token."""
    hugging_face(
        folder, config, np.float32, mask_token_id=None, eos_token_id=2, pad_token_id=None, bos_token_id=None
    )
    words = {"[UNK]": 0, "word": 1, "</s>": 2} | {f"w{i}": i for i in range(3, num_tokens)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_new_tokens_take_spare_rows_first(tmp_path, tied, to):
    config = dataclasses.replace(QWEN3, vocab_size=261, tie_embeddings=tied)
    source = without_mask(tmp_path / "base", config)
    assert run(source, tmp_path / "new", "--add_tokens=mask,bos", f"--to={to}") == 0
    raw, old = raw_config(tmp_path / "new"), safetensors.numpy.load_file(source / "model.safetensors")
    assert (raw["bos_token_id"], raw["mask_token_id"], raw["vocab_size"]) == (260, 261, 262)
    assert raw["objective"] == "ar" and hf.decoding_defaults(tmp_path / "new")["first_token"] == "next"
    _, params, tokenizer = load(tmp_path / "new")
    assert (tokenizer.mask_id, tokenizer.bos_id, tokenizer.vocab_size) == (261, 260, 262)
    tables = {"model.embed_tokens.weight": params["embedding"]}
    if not tied:
        tables["lm_head.weight"] = params["head"].T
    for name, table in tables.items():
        assert table.shape == (262, 16)
        np.testing.assert_array_equal(table[:260], old[name][:260], err_msg=name)
        mean = old[name][:260].mean(0)  # row 260 was a spare row
        np.testing.assert_allclose(table[260:], np.stack([mean, mean]), rtol=0, atol=1e-6, err_msg=name)
    assert tokenizer.encode("w7<|mask|>w8") == [7, 261, 8]
    # Everything else is unchanged.
    rest = fuse_projections(load_params(source, config))
    for name in rest.keys() - {"embedding", "head"}:
        jax.tree.map(np.testing.assert_array_equal, params[name], rest[name])


def test_an_id_of_ones_own(tmp_path):
    source = without_mask(tmp_path / "base", QWEN3)
    assert run(source, tmp_path / "new", "--add_tokens=mask:270") == 0
    assert raw_config(tmp_path / "new")["mask_token_id"] == 270
    model, params, tokenizer = load(tmp_path / "new")
    assert model.config.vocab_size == 272 and tokenizer.mask_id == 270
    old = load_params(source, QWEN3)["embedding"]
    np.testing.assert_array_equal(params["embedding"][:270], old[:270])
    np.testing.assert_array_equal(params["embedding"][271:], old[271:])
    np.testing.assert_allclose(params["embedding"][270], old[:260].mean(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ("mask:259", "id 259 is in use by 'w259'"),
        ("mask:2", "id 2 is in use by '</s>'"),
        ("mask:272", "--add_tokens=mask:272: must be at most 271"),
        ("bos:263,mask:263", "id 263 is in use by '<|beginoftext|>'"),
        ("mask:x", "must be mask, bos or both"),
        ("mask,mask", "must be mask, bos or both"),
        ("eos", "must be mask, bos or both"),
        ("", "must be mask, bos or both"),
    ],
)
def test_ids_in_use_are_refused(tmp_path, capsys, asked, complaint):
    source = without_mask(tmp_path / "base", QWEN3)
    assert run(source, tmp_path / "new", f"--add_tokens={asked}") == 2
    assert complaint in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["base"]


def test_a_token_the_model_has_is_not_added_again(tmp_path, capsys):
    assert run(hugging_face(tmp_path / "hf"), tmp_path / "new", "--add_tokens=mask") == 2
    assert "the model has a mask token, id 259" in capsys.readouterr().err
    source = without_mask(tmp_path / "base", QWEN3)
    backend = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    backend.add_special_tokens(["<|mask|>"])
    backend.save(str(source / "tokenizer.json"))
    assert run(source, tmp_path / "new", "--add_tokens=mask") == 2
    assert "'<|mask|>' is in the vocabulary already, with id 260" in capsys.readouterr().err


def test_a_new_bos_takes_the_role_of_the_old(tmp_path):
    """Qwen3 has a BOS token, and the authors train with a new one."""
    source = without_mask(tmp_path / "base", QWEN3)
    raw = raw_config(source)
    (source / "config.json").write_text(json.dumps(raw | {"bos_token_id": 1}))
    assert run(source, tmp_path / "new", "--add_tokens=bos,mask") == 0
    raw = raw_config(tmp_path / "new")
    assert (raw["bos_token_id"], raw["mask_token_id"]) == (260, 261)
    tokenizer = load(tmp_path / "new")[2]
    assert (tokenizer.bos_id, tokenizer.mask_id) == (260, 261)
    assert tokenizer.encode("word<|beginoftext|>") == [1, 260]


def test_any_part_of_a_table_with_new_rows_can_be_read_alone():
    rng = np.random.default_rng(0)
    arrays = {"embedding": rng.normal(size=(20, 16)), "head": rng.normal(size=(16, 20))}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    stored = {n: LazyArray(a.shape, a.dtype, lambda index, a=a: a[index], n) for n, a in arrays.items()}
    new = add_rows(stored, [17, 20, 21], 18)
    assert new["embedding"].shape == (22, 16) and new["head"].shape == (16, 22)
    for name, axis in (("embedding", 0), ("head", 1)):
        whole = new[name].whole()
        wanted = np.concatenate([arrays[name], np.zeros_like(arrays[name]).take([0, 1], axis)], axis)
        np.moveaxis(wanted, axis, 0)[[17, 20, 21]] = arrays[name].take(range(18), axis).mean(axis)
        np.testing.assert_allclose(whole, wanted, rtol=0, atol=1e-6)
        for _ in range(30):
            index = tuple(slice(*map(int, sorted(rng.integers(0, n + 1, 2)))) for n in whole.shape)
            np.testing.assert_array_equal(new[name].read(index), whole[index])


# Failures.


def failures(tmp_path):
    """(arguments, part of the message) of conversions that fail."""
    good = hugging_face(tmp_path / "good")
    yield (good, good), "exists, expected a folder to be made"
    (tmp_path / "there").mkdir()
    yield (good, tmp_path / "there"), "exists, expected a folder to be made"
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    yield (good, tmp_path / "dangling"), "exists, expected a folder to be made"
    yield (tmp_path / "none", tmp_path / "new"), "none: no such file or folder, expected a folder with"
    (tmp_path / "empty").mkdir()
    yield (tmp_path / "empty", tmp_path / "new"), "empty: is no checkpoint, expected a folder with"
    (tmp_path / "notes.txt").write_text("")
    yield (tmp_path / "notes.txt", tmp_path / "new"), "notes.txt: is no checkpoint"
    yield (good, tmp_path / "notes.txt" / "new"), "new: cannot be written"
    yield (good, tmp_path / "new", "--dtype=int8"), "--dtype"
    yield (good, tmp_path / "new", "--to=torch"), "--to"
    yield (good,), "DST"
    cut = shutil.copytree(good, tmp_path / "cut")
    os.truncate(cut / "model.safetensors", 5000)
    yield (cut, tmp_path / "new"), "model.safetensors: cut short"
    bare = shutil.copytree(good, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    yield (bare, tmp_path / "new"), "holds neither model.safetensors nor"
    (bare / "checkpoints").mkdir()
    yield (bare, tmp_path / "new"), "checkpoints: holds no checkpoint"
    other = hugging_face(tmp_path / "other", dataclasses.replace(QWEN3, mlp_dim=25))
    shutil.copy(good / "config.json", other)
    yield (other, tmp_path / "new"), r"has shape (25, 16), config.json makes it (24, 16)"


def test_failures_leave_nothing(tmp_path, capsys):
    for arguments, complaint in failures(tmp_path):
        before = sorted(os.listdir(tmp_path))
        assert run(*arguments) == 2, complaint
        error = capsys.readouterr().err
        assert complaint in error and error.startswith("error: ") and error.count("\n") == 1, error
        assert sorted(os.listdir(tmp_path)) == before, complaint


def test_another_models_checkpoint(tmp_path, capsys):
    source = hugging_face(tmp_path / "hf")
    assert run(source, tmp_path / "ours") == 0
    raw = raw_config(tmp_path / "ours")
    (tmp_path / "ours" / "config.json").write_text(json.dumps(raw | {"intermediate_size": 25}))
    capsys.readouterr()
    assert run(tmp_path / "ours", tmp_path / "new") == 2
    assert "layers_0/mlp/down is (24, 16), this model makes it (25, 16)" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["hf", "orbax"])
@pytest.mark.parametrize(
    "error", [BadInput("broken"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch, to, error):
    source = hugging_face(tmp_path / "hf")
    real, reads = LazyArray.whole, []

    def whole(self):
        reads.append(self.where)
        if len(reads) > 10:
            raise error
        return real(self)

    monkeypatch.setattr(LazyArray, "whole", whole)
    wanted = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else BadInput
    with pytest.raises(wanted, match=None if wanted is KeyboardInterrupt else "broken|No space left"):
        convert.convert(source, tmp_path / "new", to)
    assert len(reads) > 10 and sorted(os.listdir(tmp_path)) == ["hf"]


def test_a_full_disk_is_noticed_before(tmp_path, monkeypatch, capsys):
    source = hugging_face(tmp_path / "hf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**4))
    assert run(source, tmp_path / "new") == 2
    assert "needs 0.0 GB, its disk has 0.0 GB free" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["hf"]


MEASURE = r"""
import pathlib, re, sys, tempfile
from refusion_jax.checkpoints import orbax_io as checkpoint
from refusion_jax import convert
checkpoint.BATCH_BYTES = 2**23
sys.path.insert(0, sys.argv[1])
import test_convert
def peak():  # getrusage would count what the process that started us had
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    test_convert.hugging_face(folder / "small")
    convert.convert(folder / "small", folder / "a")
    convert.convert(folder / "a", folder / "b")
    before = peak()
    convert.convert(sys.argv[2], folder / "ours")
    convert.convert(folder / "ours", folder / "back")
    print(peak() - before)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory as Linux tells it")
def test_memory_stays_at_a_few_tensors(tmp_path):
    """200 MB of weights, the largest tensor 8 MB."""
    config = ModelConfig(2048, 6, 1024, 8, 8, 128, 4096)
    source = hugging_face(tmp_path / "hf", config)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    command = [sys.executable, "-c", MEASURE, str(Path(__file__).parent), str(source)]
    # One arena, so that memory that glibc keeps per thread is not measured.
    env = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    grown = int(done.stdout.splitlines()[-1])
    assert size > 200e6 and grown < 100e6, f"{grown / 1e6:.0f} MB for {size / 1e6:.0f} MB"
