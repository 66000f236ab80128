"""Training adapters: on every mesh the same, resumed to the last bit, merged for all readers."""

import contextlib
import csv
import dataclasses
import functools
import io
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from whole_params import load_params, merge_adapters

from refusion_jax import generate, load
from refusion_jax.checkpoints import hugging_face as hf
from refusion_jax.checkpoints import orbax_io as checkpoint
from refusion_jax.convert import convert
from refusion_jax.data.pipeline import DataConfig
from refusion_jax.diffusion.slot_diffusion import DiffusionConfig
from refusion_jax.errors import BadInput
from refusion_jax.model.transformer import ModelConfig
from refusion_jax.sharding import MeshConfig, make_mesh
from refusion_jax.train import main
from refusion_jax.training.optimizer import OptimizerConfig
from refusion_jax.training.run import RunConfig, TrainConfig
from refusion_jax.training.step import make_program
from refusion_jax.weights import fused
from refusion_jax.weights.lora import LoraConfig

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "data" / "oracle" / "tiny_a"
MODEL = ModelConfig(260, 2, 16, 2, 2, 8, 32)
WIDE = ModelConfig(260, 8, 256, 4, 2, 64, 1024)  # where the layers take most of the memory

CONFIG = f"""
import dataclasses
from ml_collections import ConfigDict
from refusion_jax.checkpoints import hugging_face as hf

def get_config():
    c = ConfigDict()
    c.model = ConfigDict(dataclasses.asdict(hf.read_config({str(TINY)!r})))
    c.data = ConfigDict({{"tasks": {{"extraction": {{"fields": 1, "value_length": 2}}}}, "max_length": 64}})
    c.train = ConfigDict({{"steps": 4, "batch_size": 8, "save_every": 2, "log_every": 1}})
    c.train.init_from = {str(TINY)!r}
    c.optimizer = ConfigDict({{"learning_rate": 1e-2}})
    c.lora = ConfigDict({{"rank": 2, "alpha": 4.0, "targets": ("q", "o", "up", "down")}})
    return c
"""


def run_config(mesh=(1, 1, 1), only_masks=False, **train) -> RunConfig:
    fields = {"steps": 3, "batch_size": 8, "save_every": 9, "log_every": 1, "init_from": "somewhere"} | train
    return RunConfig(
        MODEL,
        DataConfig(),
        TrainConfig(**fields),
        DiffusionConfig((4, 8)),
        OptimizerConfig(learning_rate=1e-2, weight_decay=0.1),
        MeshConfig(*mesh),
        LoraConfig(rank=2, only_masks=only_masks),
    )


def take_steps(run: RunConfig):
    """(state before, metrics of each step, state after), all as NumPy, on the run's mesh."""
    mesh = make_mesh(run.mesh, jax.devices()[: np.prod(dataclasses.astuple(run.mesh))])
    program = make_program(run, mesh, mask_id=259)
    random = np.random.default_rng(0)

    def value(leaf):
        return jax.device_put(random.normal(size=leaf.shape, scale=0.2).astype(leaf.dtype), leaf.sharding)

    start = program.start.lower(program.state.base).compile()
    state = start(jax.tree.map(value, program.state.base))
    before = jax.tree.map(np.asarray, state)
    batch = {
        "tokens": np.random.default_rng(0).integers(0, 256, (8, 24)),
        "prompt_len": np.full(8, 6),
        "total_len": np.full(8, 24),
        "example_id": np.arange(8),
    }
    batch = jax.device_put({name: x.astype("i4") for name, x in batch.items()}, program.batch_sharding)
    step = program.step.lower(program.state, batch).compile()
    taken = []
    for _ in range(3):
        state, values = step(state, batch)
        taken.append({name: float(value) for name, value in values.items()})
    for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(program.state), strict=True):
        assert leaf.sharding == like.sharding
    return before, taken, jax.tree.map(np.asarray, state)


@pytest.fixture(scope="module")
def alone():
    return take_steps(run_config())


def test_only_adapters_change(alone):
    before, taken, after = alone
    jax.tree.map(np.testing.assert_array_equal, before.frozen, after.frozen)
    for path, leaf in flatten_dict(after.params).items():
        assert not np.array_equal(leaf, flatten_dict(before.params)[path]), path
    assert taken[-1]["loss"] != taken[0]["loss"]
    adapters = sum(leaf.size for leaf in jax.tree.leaves(after.params))
    state = sum(leaf.size for leaf in jax.tree.leaves(after.opt_state))
    assert state <= 2 * adapters + 8 < sum(leaf.size for leaf in jax.tree.leaves(after.frozen))


def equations(jaxpr):
    """All equations of a jaxpr, those of the jaxprs inside it included."""
    for equation in jaxpr.eqns:
        inner = [x for x in jax.tree.leaves(equation.params, is_leaf=is_jaxpr) if is_jaxpr(x)]
        if not inner:
            yield equation
        for x in inner:
            yield from equations(getattr(x, "jaxpr", x))


def is_jaxpr(x) -> bool:
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def arise(run: RunConfig) -> set[tuple[int, ...]]:
    """Sorted shapes of the matrices and tables that a step computes from arrays of other shapes."""
    program = make_program(run, make_mesh(run.mesh, jax.devices()[:1]), mask_id=259)
    step = jax.make_jaxpr(program.step)(program.state, program.batch)

    def shapes(variables):
        return {tuple(sorted(v.aval.shape)) for v in variables if hasattr(v.aval, "shape")}

    found = set()
    for equation in equations(step.jaxpr):
        name = equation.primitive.name
        operands = equation.invars[1:] if name == "scatter-add" else equation.invars  # rows added up from 0
        if name != "broadcast_in_dim":  # a constant
            found |= shapes(equation.outvars) - shapes(operands)
    return found


@pytest.mark.parametrize("only_masks", [False, True])
@pytest.mark.parametrize(
    "train", [{}, {"scan_layers": True, "remat": "full", "loss_chunks": 4, "microbatches": 2}]
)
def test_no_gradient_of_a_kernel_is_formed(train, only_masks):
    """Nothing of the shape of a kernel, the head or the embedding is computed; without adapters all are."""
    adapted = run_config(**train)
    adapted = dataclasses.replace(adapted, lora=LoraConfig(rank=3, only_masks=only_masks))
    everything = dataclasses.replace(adapted, lora=LoraConfig())
    program = make_program(everything, make_mesh(everything.mesh, jax.devices()[:1]), mask_id=259)
    leaves = flatten_dict(program.state.params).items()
    layers = {tuple(sorted(leaf.shape[path[0] == "layers" :])) for path, leaf in leaves}
    kernels = {shape for shape in layers if len(shape) > 1}
    assert kernels == {(16, 260), (2, 8, 16), (16, 32)}
    assert arise(everything) >= kernels
    assert not arise(adapted) & kernels


def memory_of_a_step(run: RunConfig) -> tuple[int, int]:
    """Bytes of a step beside parameters and optimizer state, and bytes of the parameters of the layers."""
    program = make_program(run, make_mesh(run.mesh, jax.devices()[:1]), mask_id=259)
    memory = program.step.lower(program.state, program.batch).compile().memory_analysis()
    names = (name for name in program.state.base if name.startswith("layers"))
    layers = sum(4 * leaf.size for name in names for leaf in jax.tree.leaves(program.state.base[name]))
    return memory.temp_size_in_bytes, layers


@pytest.mark.long
@pytest.mark.parametrize(("scan_layers", "share"), [(True, 0.3), (False, 0.6)])
def test_memory_of_a_step(scan_layers, share):
    """Beside parameters and optimizer state a step takes less than this share of what the kernels take."""
    run = run_config(scan_layers=scan_layers, remat="full", batch_size=1)
    needed, layers = memory_of_a_step(dataclasses.replace(run, model=WIDE, data=DataConfig(max_length=32)))
    assert needed < share * layers


def test_no_product_of_an_adapter_is_kept():
    """With remat "dots" a layer keeps no more than without adapters: x A, not (x A) B."""
    run = run_config(scan_layers=True, remat="dots", batch_size=4)
    run = dataclasses.replace(run, model=WIDE, data=DataConfig(max_length=256))
    plain = dataclasses.replace(run, lora=LoraConfig())
    assert memory_of_a_step(run)[0] < 1.1 * memory_of_a_step(plain)[0]


@pytest.mark.parametrize(("mesh", "train"), [((2, 2, 2), {}), ((2, 2, 2), {"microbatches": 2})])
def test_meshes_agree(alone, mesh, train):
    _, taken, _ = take_steps(run_config(mesh, **train))
    for found, right in zip(taken, alone[1], strict=True):
        for name, value in right.items():
            assert found[name] == pytest.approx(value, rel=1e-4 if name == "grad_norm" else 1e-5), name


@pytest.mark.long
def test_meshes_agree_about_masks():
    """Eight devices, in microbatches and chunks of the loss, against one device."""
    _, alone, _ = take_steps(run_config(only_masks=True, scan_layers=True))
    more = {"scan_layers": True, "microbatches": 2, "loss_chunks": 2}
    before, taken, after = take_steps(run_config((2, 2, 2), only_masks=True, **more))
    assert not np.array_equal(before.params["mask_embedding"], after.params["mask_embedding"])
    assert taken[0]["loss"] == pytest.approx(taken[0]["diffusion_loss"]) and taken[0]["ar_loss"] == 0
    jax.tree.map(np.testing.assert_array_equal, before.frozen, after.frozen)
    for found, right in zip(taken, alone, strict=True):
        for name, value in right.items():
            assert found[name] == pytest.approx(value, rel=1e-4 if name == "grad_norm" else 1e-5), name


def test_the_scanned_model_learns_too():
    before, taken, after = take_steps(run_config((2, 2, 2), scan_layers=True, remat="full", dtype="bfloat16"))
    jax.tree.map(np.testing.assert_array_equal, before.frozen, after.frozen)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(after.frozen["base"])} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(after.params)} == {"float32"}
    assert all(np.isfinite(values["loss"]) and values["grad_norm"] > 0 for values in taken)


def test_it_needs_a_model_to_adapt():
    with pytest.raises(BadInput, match=r"lora\.rank: is 2, which needs train\.init_from"):
        run_config(init_from="")


# The command


def command(config_file: Path, folder: Path) -> str:
    """What the command prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([f"--config={config_file}", f"--workdir={folder}"]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config_file = tmp_path_factory.mktemp("config") / "lora.py"
    config_file.write_text(CONFIG)
    folder = tmp_path_factory.mktemp("run") / "run"
    assert "607,616 parameters and 10,240 that adapt them on" in command(config_file, folder)
    return config_file, folder


def arrays(folder: Path):
    return jax.tree.map(lambda leaf: leaf.whole(), checkpoint.saved_params(folder))


def test_a_run_goes_on_to_the_last_bit(finished, tmp_path):
    config_file, whole = finished
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "4")
    assert "resuming from step 2 of 4" in command(config_file, folder)
    jax.tree.map(np.testing.assert_array_equal, arrays(folder), arrays(whole))
    kept = [
        [line.split(",")[:7] for line in (f / "metrics.csv").read_text().splitlines()]
        for f in (folder, whole)
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 5


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.lora.rank=3", "lora.rank: is 3, the run in "),
        ("--config.lora.rank=0", "lora.rank: is 0, the run in "),
        ("--config.train.init_from=", "lora.rank: is 2, which needs train.init_from"),
        ("--config.lora.targets=('q_proj',)", "lora.targets must be some of q, k, v, o, gate, up, down"),
    ],
)
def test_bad_input_is_one_line(finished, capsys, flag, message):
    config_file, folder = finished
    assert main([f"--config={config_file}", f"--workdir={folder}", flag]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


@pytest.fixture(scope="module")
def gated(finished, tmp_path_factory):
    """A run whose adapters act at masks only, some of its context in text order."""
    config_file = tmp_path_factory.mktemp("config") / "gated.py"
    more = "c.lora.only_masks = True\n    c.diffusion = ConfigDict({'text_order_share': 0.5})\n    return c"
    config_file.write_text(CONFIG.replace("return c", more))
    folder = tmp_path_factory.mktemp("gated") / "run"
    assert "607,616 parameters and 10,368 that adapt them on" in command(config_file, folder)
    return config_file, folder


def test_a_gated_run(gated, tmp_path):
    """The base stays, the mask's embedding is trained, only L_diff counts, and resuming changes nothing."""
    config_file, whole = gated
    saved, base = arrays(whole), load_params(TINY, hf.read_config(TINY))
    jax.tree.map(np.testing.assert_array_equal, saved["base"], base)
    mask_id = json.loads((whole / "config.json").read_text())["mask_token_id"]
    moved = np.abs(saved["lora"]["mask_embedding"] - base["embedding"][mask_id])
    assert 0 < moved.max() < 0.1
    with open(whole / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row in rows:
        assert float(row["ar_loss"]) == 0 and float(row["loss"]) == float(row["diffusion_loss"]) > 0
        assert float(row["grad_norm"]) > 0
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "4")
    assert "resuming from step 2 of 4" in command(config_file, folder)
    jax.tree.map(np.testing.assert_array_equal, arrays(folder), saved)


@pytest.mark.long
def test_a_gated_run_answers_as_its_base_left_to_right(gated, tmp_path):
    """So does the folder it is converted to; slots are decoded with the adapters, the same from both."""
    _, folder = gated
    written = json.loads((folder / "config.json").read_text())
    assert (written["objective"], written["verify"], written["first_token"]) == ("refusion", "exact", "next")
    convert(folder, tmp_path / "exported")
    assert (tmp_path / "exported" / "adapter_config.json").exists()
    prompts = ["<bos>26+0+10=", "<bos>7+11="]
    left_to_right = functools.partial(
        generate, prompts, method="ar", first_token="next", gen_length=16, raw=True
    )
    wanted = left_to_right(TINY)
    assert left_to_right(folder) == left_to_right(tmp_path / "exported") == wanted and all(wanted)
    slots = functools.partial(generate, prompts, method="refusion", gen_length=16, slot_size=4, raw=True)
    assert slots(folder) == slots(tmp_path / "exported")
    (model, params, _), (other, exported, _) = load(folder), load(tmp_path / "exported")
    assert model == other and model.adapter.mask_id == written["mask_token_id"]
    jax.tree.map(np.testing.assert_array_equal, params, exported)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.lora.only_masks=False"], "lora.only_masks: is False, the run in "),
        (
            ["--config.lora.rank=0"],
            "lora.only_masks: needs a lora.rank of at least 1 and the objective refusion",
        ),
        (
            ["--config.objective=mdm", "--config.diffusion.text_order_share=0"],
            "found lora.rank 2 and objective 'mdm'",
        ),
        (
            ["--config.objective=ar"],
            "diffusion.text_order_share: must be 0 for the objective 'ar', found 0.5",
        ),
        (["--config.diffusion.text_order_share=2"], "diffusion.text_order_share must be in [0, 1], got 2"),
    ],
)
def test_mistakes_about_masks_are_one_line(gated, capsys, flags, message):
    config_file, folder = gated
    assert main([f"--config={config_file}", f"--workdir={folder}", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_who_reads_the_run_gets_the_merged_model(finished, tmp_path):
    """`load` and `convert` know nothing of adapters and give base plus adapters."""
    _, folder = finished
    saved = arrays(folder)
    jax.tree.map(np.testing.assert_array_equal, saved["base"], load_params(TINY, hf.read_config(TINY)))
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))

    @functools.partial(jax.jit, static_argnames="model")
    def logits(model, params):
        return model.apply({"params": params}, tokens, positions)[0]

    model, params, _ = load(folder)
    wanted = logits(model, fused.fuse_projections(merge_adapters(saved)))
    assert np.abs(wanted - logits(model, fused.fuse_projections(saved["base"]))).max() > 1e-2  # it did learn
    np.testing.assert_allclose(logits(model, params), wanted, atol=1e-5)
    convert(folder, tmp_path / "exported")
    assert (tmp_path / "exported" / "model.safetensors").exists()
    model, params, _ = load(tmp_path / "exported")
    np.testing.assert_allclose(logits(model, params), wanted, atol=1e-5)
