"""Adapters in the files of the PEFT library: written, read back, and those that others wrote."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file
from test_convert import QWEN2, QWEN3, hugging_face

from refusion_jax import convert, load
from refusion_jax.checkpoints import peft
from refusion_jax.errors import BadInput
from refusion_jax.loader import lazy_params, stored_params
from refusion_jax.sharding import MeshConfig, make_mesh

MASK = 259
TOKENS = np.array([[5, 6, 7, MASK, MASK]], "i4")
POSITIONS = np.arange(5, dtype="i4")[None]


def adapter_files(folder: Path, rank=2, alpha=6, targets=("q", "o", "gate", "down"), **fields) -> dict:
    """Writes what PEFT's `save_pretrained` does for the model in a folder; returns the tensors."""
    weights = load_file(folder / "model.safetensors")
    random, tensors = np.random.default_rng(1), {}
    for name, weight in weights.items():
        if name.removesuffix("_proj.weight").split(".")[-1] in targets:
            stem = "base_model.model." + name.removesuffix(".weight")
            shapes = {"A": (rank, weight.shape[1]), "B": (weight.shape[0], rank)}
            for end, shape in shapes.items():
                tensors[f"{stem}.lora_{end}.weight"] = random.normal(size=shape, scale=0.3).astype("f4")
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "bias": "none"}
    config |= {"target_modules": [f"{name}_proj" for name in targets], "rank_pattern": {}, "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    return tensors


def merged(folder: Path, tensors: dict, scale: float) -> dict:
    """W + alpha / r * B A of every weight, in Hugging Face's names and axes."""
    weights = {name: weight.astype("f4") for name, weight in load_file(folder / "model.safetensors").items()}
    for name in weights:
        stem = "base_model.model." + name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" in tensors:
            a, b = (tensors[f"{stem}.lora_{end}.weight"] for end in "AB")
            weights[name] = weights[name] + scale * b @ a
    return weights


def logits(model, params):
    return jax.jit(model.apply)({"params": params}, TOKENS, POSITIONS)[0]


@pytest.mark.parametrize("config", [QWEN3, QWEN2])
def test_adapters_of_others_are_merged_in_float32(tmp_path, config):
    """The folder opens as one with the merged weights: in float32, and rounded once in the stored dtype."""
    folder = hugging_face(tmp_path / "model", config)
    wanted = merged(folder, adapter_files(folder), 3.0)
    plain = hugging_face(tmp_path / "plain", config)
    save_file(wanted, plain / "model.safetensors")
    (model, found, _), (_, right, _) = load(folder, dtype="float32"), load(plain, dtype="float32")
    assert model.adapter is None
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, right)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(lazy_params(folder, config))} == {"bfloat16"}


@pytest.fixture
def gated(tmp_path):
    """A folder whose adapters act at masks only."""
    folder = hugging_face(tmp_path / "gated", dtype=np.float32)
    tensors = adapter_files(folder, only_masks=True)
    row = np.random.default_rng(2).normal(size=16).astype("f4")
    save_file(tensors | {"mask_embedding": row}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("layouts", [["orbax", None], ["peft"], ["orbax", "peft", "orbax"]])
def test_gated_adapters_pass_through_conversions(tmp_path, gated, layouts):
    """Arrays and logits are the same from every layout, and clean tokens are the base's."""
    model, params, _ = load(gated)
    assert model.adapter.mask_id == MASK and model.adapter.scale == 3.0
    assert model.adapter.targets == ("q", "o", "gate", "down") and model.fused
    folder = gated
    for number, layout in enumerate(layouts):
        convert.convert(folder, tmp_path / str(number), layout)
        folder = tmp_path / str(number)
    other, found, _ = load(folder)
    assert other == model
    jax.tree.map(np.testing.assert_array_equal, found, params)
    base = {name: leaf for name, leaf in params.items() if name != "mask_embedding"}
    base = {path: leaf for path, leaf in flatten_dict(base).items() if "_lora_" not in path[-1]}
    plain = hugging_face(tmp_path / "plain", dtype=np.float32)
    _, wanted, _ = load(plain)
    jax.tree.map(np.testing.assert_array_equal, base, flatten_dict(wanted))
    ours, theirs = logits(other, found), logits(model.clone(adapter=None), wanted)
    np.testing.assert_allclose(ours[:, :3], theirs[:, :3], atol=1e-4)  # two programs
    assert (np.abs(ours - theirs)[:, 3:].max(-1) > 0.1).all()


def test_gated_adapters_on_a_mesh(gated):
    """Fused and sharded over two devices, as on one."""
    mesh = make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])
    (model, params, _), (same, spread, _) = load(gated), load(gated, mesh)
    assert model == same
    jax.tree.map(np.testing.assert_array_equal, spread, params)
    assert spread["layers_0"]["attention"]["q_lora_b"].sharding.spec == P(None, "tensor", None)
    np.testing.assert_allclose(logits(same, spread), logits(model, params), atol=1e-4)


def test_files_that_are_written(tmp_path, gated):
    convert.convert(gated, tmp_path / "out", "peft")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(tmp_path / "out"),
        "r": 2,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "o_proj", "gate_proj", "down_proj"],
        "bias": "none",
        "inference_mode": True,
        "only_masks": True,
    }
    tensors, kept = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "out", gated))
    assert tensors.keys() == kept.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, kept[name], name)
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (2, 16)
    assert tensors["base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"].shape == (16, 2)


def test_a_cast_leaves_adapters_alone(tmp_path, gated):
    convert.convert(gated, tmp_path / "half", "orbax", dtype="bfloat16")
    stored = stored_params(tmp_path / "half", QWEN3)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(stored["base"])} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(stored["lora"])} == {"float32"}
    model, params, _ = load(tmp_path / "half")
    assert model.dtype == "bfloat16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def test_what_cannot_be_merged_or_kept_apart_is_refused(tmp_path, gated):
    plain = hugging_face(tmp_path / "plain")
    with pytest.raises(BadInput, match=r"--to=hf: must be peft or orbax for adapters of mask tokens"):
        convert.convert(gated, tmp_path / "out", "hf")
    with pytest.raises(BadInput, match=r"--to=peft: SRC must have adapters, found none"):
        convert.convert(plain, tmp_path / "out", "peft")
    with pytest.raises(BadInput, match=r"--add_tokens: SRC has adapters that stay apart"):
        convert.convert(gated, tmp_path / "out", asked={"bos": None})
    tensors = load_file(gated / peft.TENSORS)
    save_file(
        {name: x for name, x in tensors.items() if ".layers.1.mlp.gate" not in name}, gated / peft.TENSORS
    )
    with pytest.raises(BadInput, match=r"layers_1/mlp/gate_lora_a is missing"):
        load(gated)


def test_training_does_not_start_from_gated_adapters(gated):
    with pytest.raises(BadInput, match=r"gated: has adapters for mask tokens only, which cannot be merged"):
        lazy_params(gated, QWEN3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "adapter_config.json: peft_type must be 'LORA', found 'IA3'"),
        ({"use_dora": True}, "adapter_config.json: use_dora is not supported, found True"),
        ({"bias": "all"}, "adapter_config.json: bias must be 'none', found 'all'"),
        ({"r": 0}, "adapter_config.json: r must be a whole number of at least 1, found 0"),
        ({"lora_alpha": None}, "adapter_config.json: lora_alpha must be a number above 0, found None"),
        ({"r": 3}, "rank 3 makes it (3, "),
        ({"only_masks": True}, "tensor 'mask_embedding' must have shape (16,), found none"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path, fields, message):
    folder = hugging_face(tmp_path / "model")
    adapter_files(folder, **fields)
    with pytest.raises(BadInput) as error:
        load(folder)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "q_proj.lora_B.weight' missing"),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": np.zeros((2, 16), "f4")}),
            "is no adapter",
        ),
        (lambda t: t.clear(), "holds no adapter"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    folder = hugging_face(tmp_path / "model")
    tensors = adapter_files(folder)
    change(tensors)
    save_file(tensors, folder / peft.TENSORS)
    with pytest.raises(BadInput) as error:
        load(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
