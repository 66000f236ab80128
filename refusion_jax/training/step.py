"""One training step as a compiled function of (state, batch).

    corrupt the batch -> per microbatch: model, loss, gradients -> sum of gradients -> AdamW

The noise is a function of (seed, step, example id), so a run that resumes, on the same mesh or another,
draws the same noise. The loss is `slot_diffusion.loss_of_states`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding

from refusion_jax import sharding
from refusion_jax.diffusion import distillation, slot_diffusion
from refusion_jax.diffusion.segments import Batch
from refusion_jax.diffusion.slot_diffusion import Noised
from refusion_jax.errors import BadInput
from refusion_jax.model.adapter import Adapter
from refusion_jax.model.attention import fitting_kernel
from refusion_jax.model.transformer import Transformer
from refusion_jax.sharding import Layout
from refusion_jax.training.flops import forward_flops, train_flops
from refusion_jax.training.objectives import OBJECTIVES
from refusion_jax.training.run import RunConfig
from refusion_jax.training.teacher import Teacher, make_teacher
from refusion_jax.weights import lora

Array = jax.Array

# Compiler options of the step by platform; measured on one H200 (docs/training_speed.md).
COMPILER_OPTIONS = {
    "gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_latency_hiding_scheduler": True},
}

# Parameters that are not cast to the dtype of matrix products, see `_working_copy`.
KEPT_PRECISE = ("embedding", lora.MASK_EMBEDDING)


class TrainState(struct.PyTreeNode):
    """The arrays that a step reads and updates. It holds no random key: noise follows from the step number.

    Attributes:
      step: int32 [], number of updates done.
      params: the parameters that are trained.
      opt_state: the state of the optimizer.
      frozen: the other parameters, see `lora.split`; empty without adapters.
    """

    step: Array
    params: Any
    opt_state: Any
    frozen: Any

    @property
    def base(self) -> Any:
        """The model's own parameters, without adapters."""
        return self.frozen["base"] if self.frozen else self.params


class Program(NamedTuple):
    """The jitted functions of a run, and the abstract arrays they work on.

    Attributes:
      state: TrainState of ShapeDtypeStructs with shardings.
      batch: the arrays of a batch, ShapeDtypeStructs with shardings.
      batch_sharding: sharding of every array of a batch.
      init: () -> state with random parameters.
      start: parameters of the model, like `state.base` -> state with them; donates its argument.
      step: (state, batch, *teacher) -> (next state, metrics), see `train_step`; donates the state.
      teacher: the parameters of the teacher, ShapeDtypeStructs with shardings; empty without one.
    """

    state: TrainState
    batch: Batch
    batch_sharding: NamedSharding
    init: Callable[[], TrainState]
    start: Callable[[Any], TrainState]
    step: Callable[..., tuple[TrainState, dict[str, Array]]]
    teacher: tuple[Any, ...] = ()


class StepParts(NamedTuple):
    """What a step is compiled for: everything static that `train_step` uses.

    Attributes:
      run: the configuration.
      mask_id: id of the mask token; None for objectives without one.
      model: the model in the run's dtype.
      optimizer: AdamW with clipping and the learning-rate schedule.
      layout: mesh and shardings of the state.
      teacher: the teacher; None without one.
    """

    run: RunConfig
    mask_id: int | None
    model: Transformer
    optimizer: optax.GradientTransformation
    layout: Layout
    teacher: Teacher | None = None


def make_program(run: RunConfig, mesh: Mesh, mask_id: int | None) -> Program:
    """Prepares a run on a mesh; computes and compiles nothing yet.

    Args:
      run: the configuration.
      mesh: the devices.
      mask_id: id of the mask token; None for objectives without one.

    Raises:
      BadInput: the batch does not split evenly over microbatches and devices, or a row over loss_chunks; or
        the teacher does not fit, see `teacher_config`.
    """
    _check_batch(run, mesh)
    platform = mesh.devices.flat[0].platform
    model = _model(run, platform, mask_id)
    optimizer = run.optimizer.transformation(run.train.steps)
    init = functools.partial(_random_state, run, model, optimizer, mask_id)
    boxed = jax.eval_shape(init)
    layout = sharding.layout(boxed, mesh)
    batch_sharding, shardings = sharding.batch_sharding(mesh), layout.shardings
    teacher = make_teacher(run, mesh)
    taught_by = () if teacher is None else (teacher,)
    return Program(
        state=sharding.with_shardings(sharding.unbox(boxed), shardings),
        batch=_abstract_batch(run, batch_sharding),
        batch_sharding=batch_sharding,
        init=jax.jit(lambda: sharding.unbox(init()), out_shardings=shardings),
        start=jax.jit(
            functools.partial(_state_with, run, optimizer, mask_id),
            in_shardings=(shardings.base,),
            out_shardings=shardings,
            donate_argnums=0,
        ),
        step=jax.jit(
            functools.partial(train_step, StepParts(run, mask_id, model, optimizer, layout, teacher)),
            in_shardings=(shardings, batch_sharding, *(one.layout.shardings for one in taught_by)),
            out_shardings=(shardings, sharding.replicated(mesh)),
            donate_argnums=0,
            compiler_options=COMPILER_OPTIONS.get(platform),
        ),
        teacher=tuple(one.params for one in taught_by),
    )


def train_step(
    parts: StepParts, state: TrainState, batch: Batch, teacher: Any = None
) -> tuple[TrainState, dict[str, Array]]:
    """One update; where the loss or a gradient is not finite, only the step number changes.

    Args:
      parts: what is static.
      state: the state.
      batch: the arrays of a batch.
      teacher: the parameters of the teacher, where `parts` has one.

    Returns:
      the next state, and metrics: float32 [] "loss", "ar_loss" and "diffusion_loss" of the given parameters,
      "grad_norm" before clipping, "learning_rate", "flops" (see flops.py) and "padding", the share of the
      batch that is padding; int32 [] "tokens", the tokens of the batch that are not, and "bad_steps", 1 where
      the loss or a gradient is not finite.
    """
    run, optimizer = parts.run, parts.optimizer
    objective = OBJECTIVES[run.objective]
    with parts.layout.scope():
        with jax.named_scope("noise"):
            key = noise_key(run, state.step)
            noised = objective.corrupt(key, batch, run.diffusion, parts.mask_id)
            if parts.teacher is not None:
                noised = distillation.taught(batch, noised)
                parts = parts._replace(teacher=parts.teacher._replace(params=teacher))
            if run.lora.only_masks:  # clean tokens do not depend on what is trained
                noised = noised.replace(ar_weights=jnp.zeros_like(noised.ar_weights))
        with jax.named_scope("gradients"):
            grads, losses = _gradients(parts, state, noised)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    tokens, grad_norm = jnp.sum(batch["total_len"]), optax.tree.norm(grads)
    is_finite = jnp.isfinite(losses["loss"]) & jnp.isfinite(grad_norm)
    metrics = losses | {
        "grad_norm": grad_norm,
        "bad_steps": 1 - is_finite.astype(jnp.int32),
        "learning_rate": run.optimizer.schedule(run.train.steps)(state.step),
        "tokens": tokens,
        "padding": (batch["tokens"].size - tokens) / batch["tokens"].size,
    }
    work = objective.flop_counts(batch["prompt_len"], batch["total_len"], run.diffusion)
    metrics["flops"] = train_flops(run.model, *work, run.lora)
    if parts.teacher is not None:
        metrics["flops"] += forward_flops(parts.teacher.model.config, *work)
    with jax.named_scope("update"):
        updated = optax.apply_updates(state.params, updates), opt_state
        kept = state.params, state.opt_state
        params, opt_state = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), updated, kept)
    return TrainState(state.step + 1, params, opt_state, state.frozen), metrics


def noise_key(run: RunConfig, step: Array) -> Array:
    """The key of the noise of a step; `step` is the number of updates before it."""
    return jax.random.fold_in(_keys(run)[1], step)


def _gradients(parts: StepParts, state: TrainState, noised: Noised) -> tuple[Any, dict[str, Array]]:
    """Gradients with respect to `state.params`, and the losses, summed over the microbatches."""
    divided_by = slot_diffusion.divisors(noised)  # of the whole batch, so that microbatches add up
    trained = _working_copy(state.params, parts.model.dtype)

    def of_microbatch(microbatch: Noised) -> tuple[Any, dict[str, Array]]:
        grads, losses = jax.grad(_loss, has_aux=True)(trained, state.frozen, parts, microbatch, divided_by)
        grads = jax.lax.with_sharding_constraint(grads, parts.layout.shardings.params)
        return jax.tree.map(lambda g, param: g.astype(param.dtype), grads, state.params), losses

    if parts.run.train.microbatches == 1:
        return of_microbatch(noised)
    return _sum_over(of_microbatch, _split(noised, parts.run.train.microbatches, parts.layout.mesh))


def _loss(
    trained: Any, frozen: Any, parts: StepParts, noised: Noised, divided_by: tuple[Array, Array]
) -> tuple[Array, dict[str, Array]]:
    """The loss that trains, and its parts, of one microbatch."""
    run, model = parts.run, parts.model
    params = lora.beside(lora.combine(trained, frozen))
    visibility = OBJECTIVES[run.objective].attention_kwargs(noised, run.data.max_examples_per_row > 1)
    with jax.named_scope("forward"):
        states, _ = model.apply(
            {"params": params}, noised.tokens, noised.positions, **visibility, method="hidden"
        )
    soft = None
    if parts.teacher is not None:
        weight, top_k = run.train.distill_weight, run.train.distill_top_k
        soft = parts.teacher.soft_targets(noised.lesson, run.data.max_examples_per_row > 1, weight, top_k)
    with jax.named_scope("loss"):
        head = model.apply({"params": params}, method="unembedding")
        weight, chunks = run.diffusion.diffusion_weight, run.train.loss_chunks
        return slot_diffusion.loss_of_states(states, head, noised, weight, divided_by, chunks, soft)


def _split(noised: Noised, count: int, mesh: Mesh) -> Noised:
    """The arrays [B, …] of a batch as `count` microbatches, [count, B / count, …]."""

    def split(x: Array) -> Array:
        # Microbatch i takes the rows whose index is i modulo `count`. So each device splits the rows it
        # holds: every device is busy in every microbatch, and no row moves between devices.
        microbatches = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(microbatches, sharding.batch_sharding(mesh, leading=1))

    return jax.tree.map(split, noised)


def _sum_over(function: Callable[[Noised], Any], microbatches: Noised) -> Any:
    """The sum of `function` over the leading axis of `microbatches`, one after another."""

    def add(sums: Any, microbatch: Noised) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, function(microbatch)), None

    first = function(jax.tree.map(lambda x: x[0], microbatches))
    sums, _ = jax.lax.scan(add, first, jax.tree.map(lambda x: x[1:], microbatches))
    return sums


def _working_copy(params: Any, dtype: Any) -> Any:
    """Trained parameters in the dtype of matrix products, cast once per step and not at each use.

    Embeddings keep their dtype: the gradient of the mask token's row sums as many terms as the batch has
    masked positions, too many for bfloat16.
    """
    return {
        name: leaf if name in KEPT_PRECISE else jax.tree.map(lambda leaf: leaf.astype(dtype), leaf)
        for name, leaf in params.items()
    }


def _check_batch(run: RunConfig, mesh: Mesh) -> None:
    parts = run.train.microbatches * sharding.batch_shards(mesh)
    if run.train.batch_size % parts:
        raise BadInput(
            f"train.batch_size must be a multiple of {parts}, the microbatches times the devices that "
            f"share the rows, got {run.train.batch_size}"
        )
    if run.data.max_length % run.train.loss_chunks:
        lengths = f"data.max_length {run.data.max_length}"
        raise BadInput(f"train.loss_chunks must divide {lengths}, got {run.train.loss_chunks}")


def _model(run: RunConfig, platform: str, mask_id: int | None) -> Transformer:
    """The model as it is trained on "gpu", "tpu" or "cpu"."""
    dtype, adapter = jnp.dtype(run.train.dtype), None
    if run.lora.rank:
        scale, at = run.lora.alpha / run.lora.rank, mask_id if run.lora.only_masks else None
        adapter = Adapter(run.lora.rank, scale, run.lora.targets, at)
    return Transformer(
        run.model,
        dtype,
        jnp.float32,
        run.train.scan_layers,
        run.train.remat,
        kernel=fitting_kernel(platform, dtype, run.model.head_dim, run.data.max_length),
        max_segments=run.data.max_examples_per_row + 1,  # one more, for padding
        causal=OBJECTIVES[run.objective].causal,
        adapter=adapter,
    )


def _random_state(
    run: RunConfig, model: Transformer, optimizer: optax.GradientTransformation, mask_id: int | None
) -> TrainState:
    """The state before the first step with random parameters, in Linen's partitioning boxes."""
    nothing = jnp.zeros((1, 1), jnp.int32)
    # Kernels do not take a length of one token; parameters do not depend on the kernel.
    params = model.clone(kernel="dense", adapter=None).init(_keys(run)[0], nothing, nothing)["params"]
    return _state_with(run, optimizer, mask_id, params)


def _state_with(
    run: RunConfig, optimizer: optax.GradientTransformation, mask_id: int | None, params: Any
) -> TrainState:
    """The state before the first step with the given parameters of the model."""
    adapted = lora.init(run.lora, _keys(run)[0], params, jnp.dtype(run.train.dtype), mask_id)
    trained, frozen = lora.split(adapted)
    return TrainState(jnp.int32(0), trained, optimizer.init(trained), frozen)


def _abstract_batch(run: RunConfig, batch_sharding: NamedSharding) -> Batch:
    rows = (run.train.batch_size,)
    examples = (*rows, run.data.max_examples_per_row) if run.data.packing else rows
    shapes = dict.fromkeys(("prompt_len", "total_len", "example_id"), examples)
    shapes["tokens"] = (*rows, run.data.max_length)
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding)
        for name, shape in shapes.items()
    }


def _keys(run: RunConfig) -> Array:
    """Two keys: of the parameters, and of the noise."""
    return jax.random.split(jax.random.key(run.train.seed))
