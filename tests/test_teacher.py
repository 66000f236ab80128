"""Training with a teacher against plain NumPy: the divergence, what the teacher reads, and whole steps."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from noising import BATCHES, CONFIGS, noise, plain_rows

from refusion_jax import sharding
from refusion_jax.checkpoints import hugging_face as hf
from refusion_jax.data.pipeline import DataConfig
from refusion_jax.diffusion import distillation
from refusion_jax.diffusion.cross_entropy import SoftTargets, weighted_cross_entropy
from refusion_jax.diffusion.slot_diffusion import DiffusionConfig
from refusion_jax.errors import BadInput
from refusion_jax.model.transformer import ModelConfig, Transformer
from refusion_jax.sharding import MeshConfig, make_mesh
from refusion_jax.tokenizer import ByteTokenizer
from refusion_jax.training import teacher
from refusion_jax.training.objectives import OBJECTIVES
from refusion_jax.training.optimizer import OptimizerConfig
from refusion_jax.training.run import RunConfig, TrainConfig
from refusion_jax.training.step import make_program, noise_key

# The divergence.

B, T, D, C, V = 2, 24, 8, 6, 30
RNG = np.random.default_rng(0)
STATES, HEAD = RNG.normal(size=(B, T, D)).astype("f4"), RNG.normal(size=(D, V)).astype("f4")
TEACHER, TEACHER_HEAD = RNG.normal(size=(B, T, C)).astype("f4"), RNG.normal(size=(C, V)).astype("f4")
TARGETS = RNG.integers(0, V, (B, T), np.int32)
WEIGHTS = np.where(RNG.random((B, T)) < 0.4, 0, RNG.random((B, T))).astype("f4")
SHARES = (0.7 * (RNG.random((B, T)) < 0.6)).astype("f4")


def log_softmax(logits: np.ndarray, xp=np):
    return logits - xp.log(xp.exp(logits).sum(-1, keepdims=True))


def plain_losses(logits, targets, teacher_logits, shares, top_k: int, xp=np):
    """(1 - s) ce + s KL of every token from all logits; the bucket is 1 minus the named probabilities."""
    log_q, log_p = log_softmax(logits, xp), log_softmax(teacher_logits, xp)
    ce = -xp.take_along_axis(log_q, targets[..., None], -1)[..., 0]
    named = np.argsort(-np.asarray(teacher_logits), axis=-1, kind="stable")[..., :top_k]
    p, q = (xp.exp(xp.take_along_axis(x, named, -1)) for x in (log_p, log_q))
    kl = (p * xp.log(p / q)).sum(-1)
    if top_k < logits.shape[-1]:
        p_rest, q_rest = 1 - p.sum(-1), 1 - q.sum(-1)
        kl += p_rest * xp.log(p_rest / q_rest)
    return (1 - shares) * ce + shares * kl


def total_of(states, head, num_chunks, top_k):
    soft = SoftTargets(TEACHER, TEACHER_HEAD, SHARES, top_k)
    return weighted_cross_entropy(states, head, TARGETS, WEIGHTS, num_chunks, soft)


@pytest.mark.parametrize(("num_chunks", "top_k"), [(1, 4), (1, 1), (6, 4), (2, V), (1, V + 9)])
def test_divergence_and_its_gradient(num_chunks, top_k):
    """The gradient is JAX's own of the plain computation, in float64 where the bucket is a difference."""
    function = jax.jit(jax.value_and_grad(total_of, argnums=(0, 1), has_aux=True), static_argnums=(2, 3))
    (total, losses), (d_states, d_head) = function(STATES, HEAD, num_chunks, top_k)
    with jax.enable_x64(True):
        states, head, theirs = (jnp.asarray(x, jnp.float64) for x in (STATES, HEAD, TEACHER @ TEACHER_HEAD))

        def plain(states, head):
            each = plain_losses(states @ head, TARGETS, theirs, SHARES.astype(float), min(top_k, V), jnp)
            return (each * WEIGHTS).sum(), each

        (wanted, each), gradients = jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)(states, head)
        wanted, each, gradients = jax.device_get((wanted, each, gradients))
    assert float(total) == pytest.approx(float(wanted), rel=1e-5)
    np.testing.assert_allclose(losses, each * (WEIGHTS != 0), atol=2e-5)
    np.testing.assert_allclose(d_states, gradients[0], atol=2e-5)
    np.testing.assert_allclose(d_head, gradients[1], atol=2e-5)


@pytest.mark.parametrize("scale", [1, 40])
def test_a_teacher_equal_to_the_student_teaches_nothing(scale):
    """Also where both are so sure that the other tokens' probability underflows."""
    soft = SoftTargets(STATES * scale, HEAD, np.ones((B, T), np.float32), 4)
    (total, losses), gradients = jax.value_and_grad(weighted_cross_entropy, argnums=(0, 1), has_aux=True)(
        STATES * scale, HEAD, TARGETS, WEIGHTS, 1, soft
    )
    assert abs(float(total)) < 1e-5 and np.abs(losses).max() < 1e-5
    assert all(np.abs(g).max() < 1e-4 for g in gradients)


def test_a_sure_teacher_and_a_sure_student_that_disagree_have_a_finite_loss():
    head, soft_head = np.eye(4, dtype=np.float32) * 500, np.eye(4, dtype=np.float32)[::-1] * 500
    states, weights = np.eye(4, dtype=np.float32)[None], np.ones((1, 4), np.float32)
    soft = SoftTargets(states, soft_head, weights, 2)
    (total, _), gradients = jax.value_and_grad(weighted_cross_entropy, argnums=(0, 1), has_aux=True)(
        states, head, np.zeros((1, 4), np.int32), weights, 1, soft
    )
    assert float(total) == pytest.approx(4 * 500) and all(np.isfinite(g).all() for g in gradients)


# What the teacher reads.


@pytest.mark.parametrize("layout", BATCHES)
def test_lessons_are_those_of_plain_python(layout):
    batch = BATCHES[layout]
    drawn, noised = jax.device_get(noise(batch, CONFIGS["release"]))
    ours = jax.device_get(jax.jit(distillation.lesson)(batch, noised))
    np.testing.assert_array_equal(ours.tokens, batch["tokens"])
    np.testing.assert_array_equal(ours.segments, noised.segments)
    seen = {"taught clean": 0, "taught mask": 0, "hard mask": 0, "first": 0}
    for row, examples in enumerate(plain_rows(batch, drawn)):
        start = at = 0
        for example, *_ in examples:
            clean = [position for _, position, _, kind in example if kind != "diffusion"]
            assert ours.positions[row, start : start + len(example)].tolist() == list(range(len(example)))
            for _, position, _, kind in example:
                target = position + (kind == "ar")
                later = any(other > position for other in clean)
                taught = kind == "ar" or (kind == "diffusion" and not later and position > 0)
                assert ours.taught[row, at] == taught, (row, at)
                if taught:
                    assert ours.reading[row, at] == start + target - 1
                seen["taught clean"] += kind == "ar"
                seen["taught mask"] += taught and kind == "diffusion"
                seen["hard mask"] += kind == "diffusion" and later
                seen["first"] += kind == "diffusion" and not later and position == 0
                at += 1
            start = at
        assert not ours.taught[row, at:].any()
    assert min(seen.values()) > 0, seen


# Whole steps.

TOKENS, ROW, SYMBOLS = 260, 48, 32
STUDENT, TEACHER_MODEL = ModelConfig(TOKENS, 2, 16, 2, 2, 8, 32), ModelConfig(TOKENS, 1, 24, 4, 2, 8, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    hf.write_config(folder, TEACHER_MODEL, {})
    return folder


@pytest.fixture(scope="module")
def params():
    """Of the student and of the teacher, large enough that predictions differ."""

    def of(config):
        tokens = jnp.zeros((1, 1), jnp.int32)
        made = sharding.unbox(jax.jit(Transformer(config).init)(jax.random.key(1), tokens, tokens))["params"]
        return jax.device_get(jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, made))

    return of(STUDENT), of(TEACHER_MODEL)


def batch_of(packing: bool) -> dict[str, np.ndarray]:
    dice, rows, places = np.random.default_rng(2), 8, 3 if packing else 1
    batch = {"tokens": dice.integers(0, SYMBOLS, (rows, ROW)), "example_id": np.arange(rows * places) + 50}
    batch["total_len"] = dice.integers(5, ROW // places + 1, (rows, places))
    batch["prompt_len"] = np.minimum(dice.integers(0, 9, (rows, places)), batch["total_len"])
    batch["example_id"] = batch["example_id"].reshape(rows, places)
    if not packing:
        batch |= {name: x[:, 0] for name, x in batch.items() if name != "tokens"}
    return {name: x.astype(np.int32) for name, x in batch.items()}


def run_config(folder, packing: bool, mesh=(1, 1, 1), weight=0.6, **changes) -> RunConfig:
    train = TrainConfig(5, 8, 100, 1, teacher=str(folder), distill_weight=weight, distill_top_k=8, **changes)
    return RunConfig(
        STUDENT,
        DataConfig(max_length=ROW, packing=packing, examples_per_row=3),
        train,
        DiffusionConfig((4, 8), ar_share=0.3, diffusion_weight=0.5),
        OptimizerConfig(),
        MeshConfig(*mesh),
    )


def step_metrics(run: RunConfig, params) -> dict[str, float]:
    program = make_program(
        run, make_mesh(run.mesh, jax.devices()[: np.prod(dataclasses.astuple(run.mesh))]), 259
    )
    student, theirs = (
        jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), tree, abstract)
        for tree, abstract in zip(params, (program.state.base, program.teacher[0]), strict=True)
    )
    batch = jax.device_put(batch_of(run.data.packing), program.batch_sharding)
    state, metrics = program.step(program.start(student), batch, theirs)
    jax.block_until_ready(state)
    return {name: float(value) for name, value in metrics.items()}


@functools.partial(jax.jit, static_argnames="config")
def logits_of(config, params, tokens, positions, segments):
    return Transformer(config, max_segments=4).apply(
        {"params": params}, tokens, positions, segments=segments
    )[0]


def plain_step(run: RunConfig, params) -> tuple[float, float]:
    """(ar_loss, diffusion_loss) from all logits of both models, token by token."""
    batch = batch_of(run.data.packing)
    noised = jax.device_get(
        OBJECTIVES["refusion"].corrupt(noise_key(run, jnp.int32(0)), batch, run.diffusion, 259)
    )
    ours = np.asarray(logits_of(STUDENT, params[0], noised.tokens, noised.positions, noised.segments), float)
    starts = np.cumsum(totals := batch["total_len"].reshape(8, -1), axis=1) - totals
    text_positions, segments = np.zeros((8, ROW), np.int32), np.full((8, ROW), totals.shape[1], np.int32)
    for row in range(8):
        for place, (start, total) in enumerate(zip(starts[row], totals[row], strict=True)):
            text_positions[row, start : start + total] = np.arange(total)
            segments[row, start : start + total] = place
    theirs = np.asarray(logits_of(TEACHER_MODEL, params[1], batch["tokens"], text_positions, segments), float)
    sums = np.zeros(2)
    for row in range(8):
        clean = (noised.diffusion_weights[row] == 0) & (noised.segments[row] < totals.shape[1])
        for at in range(ROW):
            weights = noised.ar_weights[row, at], noised.diffusion_weights[row, at]
            if not any(weights):
                continue
            place, position = noised.segments[row, at], noised.positions[row, at]
            c = position + (weights[0] > 0)  # position of the target
            later = clean & (noised.segments[row] == place) & (noised.positions[row] > position)
            hard = c == 0 or (weights[1] > 0 and later.any())
            reading = theirs[row, starts[row, place] + max(c - 1, 0)]
            loss = plain_losses(ours[row, at], noised.targets[row, at], reading, 0 if hard else 0.6, 8)
            sums += loss * np.asarray(weights)
    return sums[0] / noised.ar_count.sum(), sums[1] / noised.has_response.sum()


@pytest.mark.parametrize("packing", [False, True], ids=["alone", "packed"])
def test_a_step_is_the_plain_computation(folder, params, packing):
    run = run_config(folder, packing)
    found = step_metrics(run, params)
    ar_loss, diffusion_loss = plain_step(run, params)
    assert found["ar_loss"] == pytest.approx(ar_loss, rel=2e-5)
    assert found["diffusion_loss"] == pytest.approx(diffusion_loss, rel=2e-5)
    assert found["loss"] == pytest.approx(ar_loss + 0.5 * diffusion_loss, rel=2e-5)
    totals = batch_of(packing)["total_len"].astype(float)
    work = [
        (matmul * sum(leaf.size for leaf in jax.tree.leaves(tree)) * totals).sum()
        + (attention * config.num_layers * config.num_heads * config.head_dim * totals**2 / 2).sum()
        for tree, config, matmul, attention in [(params[0], STUDENT, 6, 12), (params[1], TEACHER_MODEL, 2, 4)]
    ]
    assert found["flops"] == pytest.approx(sum(work), rel=1e-6)


@pytest.mark.long
def test_meshes_and_microbatches_agree(folder, params):
    alone = step_metrics(run_config(folder, True), params)
    spread = run_config(folder, True, (1, 4, 2), microbatches=2, loss_chunks=4, remat="full")
    for name, value in step_metrics(spread, params).items():
        assert value == pytest.approx(alone[name], rel=1e-4 if name == "grad_norm" else 2e-5), name


def test_a_teacher_of_weight_0_is_not_even_opened(params):
    run = run_config("/no/such/folder", False, weight=0.0)
    other = dataclasses.replace(run, train=dataclasses.replace(run.train, teacher="", distill_top_k=64))
    texts = []
    for which in (run, other):
        program = make_program(which, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), 259)
        assert program.teacher == ()
        texts.append(program.step.lower(program.state, program.batch).as_text())
    assert texts[0] == texts[1]


def test_a_teacher_of_another_vocabulary(folder):
    run = run_config(folder, False)
    run = dataclasses.replace(run, model=dataclasses.replace(STUDENT, vocab_size=300))
    with pytest.raises(BadInput, match=r"train\.teacher: .* has a vocabulary of 260 tokens, must be .* 300"):
        make_program(run, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), 259)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill_weight": 1.5}, r"distill_weight must be in \[0, 1\], got 1\.5"),
        ({"distill_top_k": 0}, "distill_top_k must be at least 1, got 0"),
        ({"distill_weight": 0.5, "teacher": ""}, "needs train.teacher and the objective refusion, found ''"),
    ],
    ids=str,
)
def test_impossible_settings(folder, changes, message):
    run = run_config(folder, False, weight=0.0)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(run, train=dataclasses.replace(run.train, **changes))


def test_a_teacher_is_for_the_objective_refusion(folder):
    run = run_config(folder, False)
    plain = dataclasses.replace(run.diffusion, ar_share=0.0)
    with pytest.raises(BadInput, match=r"train\.distill_weight: is 0\.6, which needs .* and mdm"):
        dataclasses.replace(run, diffusion=plain, objective="mdm")


def test_a_teacher_of_another_tokenizer(folder):
    oracle = Path(__file__).parent / "data" / "oracle" / "tiny_a"
    with pytest.raises(BadInput, match=r"train\.teacher: the tokenizer of .*tiny_a must give the ids"):
        teacher.check_vocabulary(run_config(oracle, False), ByteTokenizer())
