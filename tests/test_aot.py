"""Programs for TPUs that are not attached: their collectives, their memory, and the report on them."""

import dataclasses
import importlib.util
import re
import textwrap

import jax
import pytest

from refusion_jax import aot, loader
from refusion_jax.data.pipeline import DataConfig
from refusion_jax.devices import TPU_CHIPS
from refusion_jax.diffusion.slot_diffusion import DiffusionConfig
from refusion_jax.model.transformer import ModelConfig
from refusion_jax.sharding import MeshConfig
from refusion_jax.tpu import slices as chips
from refusion_jax.tpu.collectives import Collective, count
from refusion_jax.tpu.lowering import bytes_needed
from refusion_jax.tpu.slices import Topology
from refusion_jax.training.optimizer import OptimizerConfig
from refusion_jax.training.run import RunConfig, TrainConfig

CONFIG = "configs/tiny.py"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed"
)

# HLO as the TPU compiler writes it, without the attributes that `count` does not read.
HLO = """\
HloModule jit_step, is_scheduled=true

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[]{:T(256)} parameter(0)
  %y = bf16[]{:T(256)} parameter(1)
  ROOT %sum = bf16[]{:T(256)} add(%x, %y)
}

%start (p: bf16[1,64,512]) -> (bf16[1,64,512], bf16[1,256,512], u32[]) {
  %p = bf16[1,64,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[1,256,512]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, dimensions={1}
  ROOT %out = (bf16[1,64,512], bf16[1,256,512], u32[]) custom-call(%p, %all-gather.1)
}

%done (q: bf16[1,64,512]) -> bf16[1,256,512] {
  %q = bf16[1,64,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[1,256,512]{2,1,0:T(8,128)(2,1)} all-gather(%q), channel_id=7, dimensions={1}
}

%all-reduce-scatter.3 (g: f32[256,512]) -> f32[64,512] {
  %g = f32[256,512]{1,0:T(8,128)} parameter(0)
  %all-reduce.4 = f32[256,512]{1,0:T(8,128)} all-reduce(%g), channel_id=9, to_apply=%add
  ROOT %slice = f32[64,512]{1,0:T(8,128)} dynamic-slice(%all-reduce.4)
}

%beside (r: f32[4,4]) -> f32[16,4] {
  %r = f32[4,4]{1,0} parameter(0)
  ROOT %all-gather.5 = f32[16,4]{1,0} all-gather(%r), channel_id=16, dimensions={0}
}

%layer (carry: (s32[], bf16[1,64,512])) -> (s32[], bf16[1,64,512]) {
  %carry = (s32[]{:T(128)}, bf16[1,64,512]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %gather-start = (bf16[1,64,512], bf16[1,256,512], u32[]) fusion(%carry), kind=kCustom, calls=%start
  %gather-done = bf16[1,256,512] fusion(%gather-start), kind=kCustom, calls=%done
  %scatter = f32[64,512] fusion(%gather-done), kind=kCustom, calls=%all-reduce-scatter.3
  %number = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %two = s32[]{:T(128)} constant(2)
  %next_number = s32[]{:T(128)} add(%number, %two)
  ROOT %next = (s32[], bf16[1,64,512]) tuple(%next_number, %scatter)
}

%more_layers (carry.2: (s32[], bf16[1,64,512])) -> pred[] {
  %carry.2 = (s32[]{:T(128)}, bf16[1,64,512]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %depth = s32[]{:T(128)} constant(72)
  %layer_number = s32[]{:T(128)} get-tuple-element(%carry.2), index=0
  ROOT %less = pred[]{:T(512)} compare(%layer_number, %depth), direction=LT, metadata={op_name="lt"}
}

%part (carry.3: (s32[], bf16[1,64,512])) -> (s32[], bf16[1,64,512]) {
  %carry.3 = (s32[]{:T(128)}, bf16[1,64,512]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %layers = (s32[], bf16[1,64,512]) while(%carry.3), condition=%more_layers, body=%layer
  %moved = (f32[2,3]{1,0}, f32[2,3]{1,0}, u32[]) collective-permute-start(%layers), channel_id=11
  ROOT %back = (s32[], bf16[1,64,512]) tuple(%layers, %moved)
}

%meanwhile (carry.7: (s32[], bf16[1,64,512])) -> (s32[], bf16[1,64,512]) {
  %carry.7 = (s32[]{:T(128)}, bf16[1,64,512]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %piece = (s32[], bf16[1,64,512]) fusion(%carry.7), kind=kCustom, calls=%beside
  ROOT %next.2 = (s32[], bf16[1,64,512]) tuple(%piece, %piece)
}

%more_parts (carry.4: (s32[], bf16[1,64,512])) -> pred[] {
  %carry.4 = (s32[]{:T(128)}, bf16[1,64,512]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %parts = s32[]{:T(128)} constant(2)
  %part_number = s32[]{:T(128)} get-tuple-element(%carry.4), index=0
  ROOT %less.2 = pred[]{:T(512)} compare(%part_number, %parts), direction=LT
}

%narrow (few: bf16[4]) -> bf16[4] {
  %few = bf16[4]{0} parameter(0)
  ROOT %all-reduce.7 = bf16[4]{0} all-reduce(%few), channel_id=17, to_apply=%add
}

%wide (many: bf16[64]) -> bf16[64] {
  %many = bf16[64]{0} parameter(0)
  ROOT %all-reduce.8 = bf16[64]{0} all-reduce(%many), channel_id=18, to_apply=%add
}

%round (carry.5: (s32[], pred[8])) -> (s32[], pred[8]) {
  %carry.5 = (s32[]{:T(128)}, pred[8]{0:T(256)(4,1)}) parameter(0)
  %width = bf16[64]{0} conditional(%carry.5, %carry.5, %carry.5), branch_computations={%narrow, %wide}
  ROOT %all-reduce.6 = (s32[]{:T(128)}, pred[8]{0:T(256)(4,1)}) all-reduce(%carry.5), channel_id=12
}

%running (carry.6: (s32[], pred[8])) -> pred[] {
  %carry.6 = (s32[]{:T(128)}, pred[8]{0:T(256)(4,1)}) parameter(0)
  ROOT %any = pred[]{:T(512)} fusion(%carry.6), kind=kLoop, calls=%add
}

ENTRY %main (arg: (s32[], bf16[1,64,512])) -> (s32[], bf16[1,64,512]) {
  %arg = (s32[]{:T(128)}, bf16[1,64,512]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %step = (s32[], bf16[1,64,512]) while(%arg), condition=%more_parts, body=%part
  %more = (s32[], bf16[1,64,512]) while(%step), condition=%more_layers, body=%meanwhile
  %decoding = (s32[], pred[8]) while(%step), condition=%running, body=%round
  %spread = bf16[16]{0} reduce-scatter(%step), channel_id=13, replica_groups=mesh['a'=2,'b'=4] {'b'}
  %spread.2 = bf16[16]{0} reduce-scatter(%step), channel_id=14, replica_groups=[2,4]<=[8]
  %spread.3 = bf16[16]{0} reduce-scatter(%step), channel_id=15, replica_groups={{0,1},{2,3}}
  %begin = f32[16,4]{1,0} fusion(%spread), kind=kCustom, calls=%beside
  ROOT %end = (s32[], bf16[1,64,512]) tuple(%step)
}
"""


def test_collectives_in_loops_count_once_a_turn():
    layers, parts = 36, 2
    traffic = count(HLO)
    assert traffic.collectives == [
        # One per layer, and one that begins outside a loop and continues inside.
        Collective("all-gather", parts * layers + 1, parts * layers * 256 * 512 * 2 + 16 * 4 * 4),
        # The all-reduce inside all-reduce-scatter, and three reduce-scatters with groups of 4, 4 and 2.
        Collective(
            "reduce-scatter", parts * layers + 3, parts * layers * 256 * 512 * 4 + 16 * 2 * (4 + 4 + 2)
        ),
        Collective("collective-permute", parts, parts * 2 * 3 * 4),
    ]
    # One that always runs, and the branch of the conditional that sends more.
    assert traffic.in_open_loops == [Collective("all-reduce", 2, 4 + 8 + 64 * 2)]


def test_no_collectives():
    text = jax.jit(lambda x: x + 1).lower(1.0).compile().as_text()
    assert count(text) == ([], [])


def test_scans_of_a_real_program():
    """`count` reads the text of the installed XLA, not only the sample above."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def layer(carry, _):
        return jax.lax.psum(carry, "x") / 8, None

    def run(x):
        return jax.lax.scan(layer, x, length=5)[0]

    spec = jax.sharding.PartitionSpec("x")
    run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    assert count(run.lower(jax.numpy.zeros((8, 16))).compile().as_text()) == (
        [Collective("all-reduce", 5, 5 * 16 * 4)],
        [],
    )


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(362.29G) exceeds available HBM (15.75G). HLO module: jit_step.",
            362.29 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
            "Used 1.5T of 15.75G hbm. Exceeded hbm capacity by 1.48T.",
            1.5 * 2**40,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20M of 16M vmem.", None),
        ("INVALID_ARGUMENT: something else", None),
    ],
)
def test_too_little_memory_in_the_words_of_the_compiler(words, needed):
    assert bytes_needed(words) == needed


def test_slices():
    topology = Topology.named("v5e:4x4")
    assert (topology.name, topology.num_chips, topology.num_devices) == ("v5e:4x4", 16, 16)
    assert [other.name for other in topology.larger()] == ["v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"]
    assert Topology.named("tpu7x:2x2x1").num_devices == 8  # two per chip
    for generation, chip in TPU_CHIPS.items():
        sizes = [Topology.named(f"{generation}:{shape}").num_chips for shape in chip.shapes]
        assert sizes == sorted(set(sizes))
        assert chip.usable * chip.devices < chip.hbm * 2**30 * 1.01


def run_config(model: ModelConfig, **train) -> RunConfig:
    train = {"steps": 1, "batch_size": 32, "save_every": 1, "log_every": 1, "remat": "dots"} | train
    return RunConfig(
        model,
        DataConfig(max_length=128),
        TrainConfig(**train),
        DiffusionConfig(),
        OptimizerConfig(),
        MeshConfig(2, 2, 4),
    )


def test_changes_that_save_memory():
    run = run_config(ModelConfig(100, 1, 16, 4, 2, 6, 16))
    changes = aot.training_changes(run, Topology.named("v5e:4x4"))
    found = [
        (topology.name, " ".join(flag.removeprefix("--config.") for flag in flags))
        for topology, flags in changes
    ]
    less = "train.loss_chunks=8"
    whole = "mesh.data=1 mesh.fsdp=-1 mesh.tensor"
    assert found == [
        ("v5e:4x4", "train.remat=full"),
        ("v5e:4x4", "train.remat=full train.microbatches=2"),
        ("v5e:4x4", "train.remat=full train.microbatches=8"),
        ("v5e:4x4", f"train.remat=full train.microbatches=8 {less}"),
        ("v5e:4x4", f"train.remat=full train.microbatches=8 {less} optimizer.mean_dtype=bfloat16"),
        ("v5e:4x4", f"train.remat=full train.microbatches=2 {less} optimizer.mean_dtype=bfloat16 {whole}=1"),
        ("v5e:4x8", f"train.remat=full train.microbatches=1 {less} optimizer.mean_dtype=bfloat16 {whole}=1"),
        # 64 devices for 32 rows: two share each product, which two key/value heads allow.
        ("v5e:8x8", f"train.remat=full train.microbatches=1 {less} optimizer.mean_dtype=bfloat16 {whole}=2"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v9:2x2"], "--topology: must be one of v4:{2x2x1, "),
        (["--topology=v5e:3x3"], "found 'v5e:3x3'"),
        (["--topology=v5e"], "found 'v5e'"),
        (["--topology=v5e:2x2", "--decode", "--batch_size=0"], "--batch_size: must be a whole number"),
        (["--topology=v5e:2x2", "--decode", "--batch_size=1,x"], "must be a whole number above 0, found 'x'"),
        (["--topology=v5e:2x2,v6e:2x2"], "--topology must be one slice for a training step"),
        (["--topology=v5e:2x2", "--config.mesh.dta=4"], "did you mean --config.mesh.data?"),
        (["--topology=v5e:2x2", "--colour"], "--colour: no such flag"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert aot.main([f"--config={CONFIG}", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_libtpu(capsys, monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    assert aot.main([f"--config={CONFIG}", "--topology=v5e:2x2"]) == 2
    assert capsys.readouterr().err == (
        "error: compiling for TPUs needs libtpu: pip install 'refusion_jax[tpu]'\n"
    )


def test_what_tpus_decode_with(monkeypatch):
    """Separate projections and one cache array per layer, which the compiler does not copy."""
    folder = "tests/data/oracle/tiny_a"
    here = loader.load(folder)[1]["layers_0"]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    model, params, _ = loader.load(folder)
    assert model.cache_by_layer and not model.fused
    assert {"qkv"} <= here["attention"].keys() and {"q", "k", "v"} <= params["layers_0"]["attention"].keys()


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """A configuration whose shapes fit the splash kernel, sharded over all devices."""
    path = tmp_path_factory.mktemp("aot") / "config.py"
    path.write_text(
        textwrap.dedent("""
        from ml_collections import ConfigDict

        def get_config():
            return ConfigDict({
                "model": dict(vocab_size=256, num_layers=3, embed_dim=128, num_heads=4, num_kv_heads=2,
                              head_dim=64, mlp_dim=256),
                "data": dict(max_length=128),
                "train": dict(steps=1, batch_size=8, save_every=1, log_every=1, dtype="bfloat16",
                              remat="full", scan_layers=True),
                "mesh": dict(data=1, fsdp=-1),
            })
        """)
    )
    return path


def run_aot(capfd, *arguments: str) -> tuple[int, str, str]:
    code = aot.main(list(arguments))
    return code, *capfd.readouterr()


@needs_libtpu
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.mesh.tensor=3", "fsdp=-1, tensor=3 must multiply to the 4 available devices"),
        ("--config.train.batch_size=6", "train.batch_size must be a multiple of 4"),
    ],
)
def test_what_cannot_be_on_a_slice(config_file, capfd, override, message):
    code, _, error = run_aot(capfd, f"--config={config_file}", "--topology=v5e:2x2", override)
    assert code == 2 and message in error


@needs_libtpu
def test_a_step_that_fits(config_file, capfd):
    code, output, _ = run_aot(capfd, f"--config={config_file}", "--topology=v5e:2x2")
    assert code == 0, output
    assert (
        "training step of 8 x 128 tokens on v5e:2x2, 4 chips as {'data': 1, 'fsdp': 4, 'tensor': 1}" in output
    )
    found = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.endswith("GiB")}
    # Each layer is gathered at least once in the forward and once in the backward pass.
    assert int(found["all-gather"][0]) >= 2 * 3
    assert output.splitlines()[-1].startswith("fits, 15.")


@needs_libtpu
@pytest.mark.parametrize("objective", ["ar", "mdm", "bd3"])
def test_steps_of_other_objectives(config_file, capfd, objective):
    """The kernel also computes attention that is not causal; masks fall back to dense attention."""
    flags = (f"--config.objective={objective}", "--config.model.num_layers=1")
    code, output, _ = run_aot(capfd, f"--config={config_file}", "--topology=v5e:2x2", *flags)
    assert code == 0, output


@needs_libtpu
def test_the_work_of_an_objective_is_told():
    run = dataclasses.replace(run_config(ModelConfig(100, 1, 16, 4, 2, 6, 16)), mesh=MeshConfig())

    def flops(objective: str) -> float:
        changed = dataclasses.replace(run, objective=objective)
        return float(re.search(r"(\S+) FLOPs", aot.describe_training(changed, Topology.named("v5e:2x2")))[1])

    assert flops("refusion") == flops("ar") < flops("mdm") < flops("bd3")


@needs_libtpu
def test_a_step_that_does_not_fit(config_file, capfd):
    # 16,384 tokens with an MLP width of 200,000: a few arrays of 6 GB each.
    wide = ("--config.model.num_layers=1", "--config.model.mlp_dim=200000", "--config.train.batch_size=128")
    code, output, _ = run_aot(capfd, f"--config={config_file}", "--topology=v5e:1x1", *wide)
    lines = output.splitlines()
    assert code == aot.DOES_NOT_FIT, output
    assert lines[-1].startswith("does not fit, by ")
    assert "these choices would fit: --topology=v5e:1x1 --config.train.microbatches=" in lines[-1]


@needs_libtpu
def test_the_sampler(config_file, capfd):
    code, output, _ = run_aot(
        capfd,
        f"--config={config_file}",
        "--topology=v5e:2x2",
        "--decode",
        "--int8",
        *("--prompt_length=16", "--gen_length=16", "--slot_size=4", "--num_blocks=2", "--batch_size=2"),
    )
    assert code == 0, output
    assert "decoder of 2 x (16 + 16) tokens, weights in int8, on v5e:2x2" in output
    assert "per iteration of loops" in output and "all-reduce" in output


@needs_libtpu
def test_a_table_of_samplers(config_file, capfd):
    small = ("--batch_size=2", "--prompt_length=16", "--gen_length=16", "--slot_size=4", "--num_blocks=2")
    # Two rows; the arguments of the second alone do not fit, so it is not compiled.
    wide = ("--config.model.num_layers=1", "--config.model.mlp_dim=24000000")
    code, output, _ = run_aot(
        capfd,
        f"--config={config_file}",
        "--topology=v5e:2x2,v5e:1x1",
        "--decode",
        "--batch_size=2",
        *small,
        *wide,
    )
    assert code == aot.DOES_NOT_FIT, output
    names, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines())
    first, second = (dict(zip(names, row, strict=True)) for row in rows)
    assert (
        first["slice"] == "v5e:2x2"
        and first["fits"] == "yes"
        and "all-reduces" in first["sent per iteration"]
    )
    assert second["slice"] == "v5e:1x1" and second["fits"] == "no" and second["peak"] == "more"
    assert float(first["arguments"]) < float(first["peak"]) < float(second["arguments"])
