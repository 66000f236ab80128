"""One training step as a compiled function of (state, batch).

    corrupt (whole batch) -> microbatches: model, loss, gradients -> sum -> AdamW

Its randomness is a function of (seed, step, example), so a run that was interrupted, or moved to another
mesh, draws the noise it would have drawn.
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
from refusion_jax.diffusion.slot_diffusion import Noised, divisors, loss_of_states
from refusion_jax.errors import BadInput
from refusion_jax.model.attention import fitting_kernel
from refusion_jax.model.transformer import Transformer
from refusion_jax.sharding import Layout
from refusion_jax.training.flops import train_flops
from refusion_jax.training.objectives import Batch, Objective, make_objective
from refusion_jax.training.run import RunConfig
from refusion_jax.weights import lora

Array = jax.Array

# Compiler options of the step, by platform; measured on one H200 (docs/training_speed.md).
COMPILER_OPTIONS = {
    "gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_latency_hiding_scheduler": True},
}


class TrainState(struct.PyTreeNode):
    """All that a step needs and gives. It holds no key: the randomness of a step comes from its number.

    Attributes:
      step: int32 [], updates done.
      params: the parameters that are trained.
      opt_state: of the optimiser.
      frozen: the other parameters, see lora.split.
    """

    step: Array
    params: Any
    opt_state: Any
    frozen: Any

    @property
    def base(self) -> Any:
        """The model's own parameters, without those that adapt them."""
        return self.frozen["base"] if self.frozen else self.params


class Program(NamedTuple):
    """The functions of a run, each compiled when first called, and the shapes they work on.

    Attributes:
      state: TrainState of ShapeDtypeStructs with shardings.
      batch: the arrays of a batch, ShapeDtypeStructs with shardings.
      batch_sharding: of every array of a batch.
      init: () -> state with random parameters.
      start: the model's parameters, `state.base` -> state with them; donates them.
      step: (state, batch) -> next state and metrics of this step; donates the state.
    """

    state: TrainState
    batch: Batch
    batch_sharding: NamedSharding
    init: Callable[[], TrainState]
    start: Callable[[Any], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def objective_of(run: RunConfig, mask_id: int | None) -> Objective:
    """The objective of a run; `mask_id` may be None where it needs no mask token."""
    return make_objective(run.objective, run.diffusion, run.data.max_examples_per_row, mask_id)


def make_program(run: RunConfig, mesh: Mesh, mask_id: int | None) -> Program:
    """Plans a run on a mesh; computes and compiles nothing yet. `mask_id` as in `objective_of`.

    Raises:
      BadInput: the batch cannot be split evenly over microbatches and devices.
    """
    _check_divides(run, mesh)
    platform = mesh.devices.flat[0].platform
    objective = objective_of(run, mask_id)
    model = _model(run, platform, objective.causal)
    optimizer = run.optimizer.transformation(run.train.steps)

    def start(params: Any) -> TrainState:
        params, frozen = lora.split(lora.init(run.lora, _keys(run)[0], params, model.dtype))
        return TrainState(jnp.int32(0), params, optimizer.init(params), frozen)

    def init() -> TrainState:
        nothing = jnp.zeros((1, 1), jnp.int32)
        # One token is no length for a kernel, and parameters do not depend on it.
        return start(model.clone(kernel="dense").init(_keys(run)[0], nothing, nothing)["params"])

    boxed = jax.eval_shape(init)
    layout = sharding.layout(boxed, mesh)
    rows, shardings = sharding.batch_sharding(mesh), layout.shardings
    parts = StepParts(run, model, objective, optimizer, layout)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        return next_state(parts, state, batch)

    return Program(
        state=sharding.with_shardings(sharding.unbox(boxed), shardings),
        batch=_abstract_batch(run, rows),
        batch_sharding=rows,
        init=jax.jit(lambda: sharding.unbox(init()), out_shardings=shardings),
        start=jax.jit(start, in_shardings=(shardings.base,), out_shardings=shardings, donate_argnums=0),
        step=jax.jit(
            train_step,
            in_shardings=(shardings, rows),
            out_shardings=(shardings, sharding.replicated(mesh)),
            donate_argnums=0,
            compiler_options=COMPILER_OPTIONS.get(platform),
        ),
    )


class StepParts(NamedTuple):
    """The parts of a step that are fixed while it is compiled."""

    run: RunConfig
    model: Transformer
    objective: Objective
    optimizer: optax.GradientTransformation
    layout: Layout


def next_state(parts: StepParts, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    """One update: the next state, and metrics of the parameters given.

    Metrics are float32 scalars "loss", "ar_loss", "diffusion_loss", "grad_norm" before clipping,
    "learning_rate", "flops" (see flops.py) and "padding", the share of the batch that is padding; and int32
    "tokens" of the batch without padding.
    """
    run, objective = parts.run, parts.objective
    with parts.layout.scope():
        with jax.named_scope("corrupt"):
            noised = objective.corrupt(noise_key(run, state.step), batch)
        grads, losses = gradients(parts, state, noised)
        with jax.named_scope("optimizer"):
            updates, opt_state = parts.optimizer.update(grads, state.opt_state, state.params)
    tokens = jnp.sum(batch["total_len"])
    metrics = losses | {
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": run.optimizer.schedule(run.train.steps)(state.step),
        "tokens": tokens,
        "padding": (batch["tokens"].size - tokens) / batch["tokens"].size,
        "flops": train_flops(run.model, *objective.flop_counts(batch["prompt_len"], batch["total_len"])),
    }
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state, state.frozen), metrics


def gradients(parts: StepParts, state: TrainState, noised: Noised) -> tuple[Any, dict[str, Array]]:
    """The gradients of the parameters that are trained, and the losses, summed over the microbatches."""
    # The parameters that are trained are the model's own, or adapters to be merged into it.
    merged, pull_back = jax.vjp(lambda params: lora.merge(lora.combine(params, state.frozen)), state.params)
    working = _working_copy(merged, parts.model.dtype)
    divided_by = divisors(noised)  # of the whole batch, so that the microbatches add up

    def of_part(part: Noised) -> tuple[Any, dict[str, Array]]:
        with jax.named_scope("loss_and_gradients"):
            grads, losses = jax.grad(microbatch_loss, has_aux=True)(working, part, divided_by, parts)
            grads = jax.lax.with_sharding_constraint(grads, parts.layout.shardings.base)
            grads = jax.tree.map(lambda g, param: g.astype(param.dtype), grads, merged)
            return pull_back(grads)[0], losses

    microbatches = parts.run.train.microbatches
    if microbatches == 1:
        return of_part(noised)
    split = jax.tree.map(functools.partial(_split_rows, count=microbatches, mesh=parts.layout.mesh), noised)
    first, rest = jax.tree.map(lambda x: x[0], split), jax.tree.map(lambda x: x[1:], split)
    add = lambda sums, part: (jax.tree.map(jnp.add, sums, of_part(part)), None)  # noqa: E731
    return jax.lax.scan(add, of_part(first), rest)[0]


def microbatch_loss(
    params: Any, noised: Noised, divided_by: tuple[Array, Array], parts: StepParts
) -> tuple[Array, dict[str, Array]]:
    """The loss of a microbatch as its share of the whole batch's, and its parts; see `loss_of_states`."""
    model, run = parts.model, parts.run
    states, _ = model.apply(
        {"params": params},
        noised.tokens,
        noised.positions,
        **parts.objective.attention_kwargs(noised),
        method="hidden",
    )
    head = model.apply({"params": params}, method="unembedding")
    weight, chunks = run.diffusion.diffusion_weight, run.train.loss_chunks
    return loss_of_states(states, head, noised, weight, divided_by, chunks)


def _split_rows(x: Array, count: int, mesh: Mesh) -> Array:
    """[B, ...] as `count` microbatches, [count, B / count, ...].

    Part i takes the rows whose number is i modulo `count`: each device splits its own rows, so all devices
      are busy
    in every part and no row moves.
    """
    parts = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(parts, sharding.batch_sharding(mesh, leading=1))


def _working_copy(params: Any, dtype: Any) -> Any:
    """Parameters in the dtype of matrix products, cast once per step and not at each use.

    The embedding stays as it is: its gradient sums one term per mask token of the batch, too many for
      bfloat16.
    """
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params) | {"embedding": params["embedding"]}


def _check_divides(run: RunConfig, mesh: Mesh) -> None:
    """Raises BadInput unless rows split over microbatches and devices, and lengths over loss_chunks."""
    parts = run.train.microbatches * sharding.batch_shards(mesh)
    if run.train.batch_size % parts:
        raise BadInput(
            f"train.batch_size must be a multiple of {parts}, the microbatches times the devices that "
            f"share the rows, got {run.train.batch_size}"
        )
    if run.data.max_length % run.train.loss_chunks:
        lengths = f"data.max_length {run.data.max_length}"
        raise BadInput(f"train.loss_chunks must divide {lengths}, got {run.train.loss_chunks}")


def _model(run: RunConfig, platform: str, causal: bool) -> Transformer:
    """The model as it trains on `platform`."""
    dtype = jnp.dtype(run.train.dtype)
    return Transformer(
        run.model,
        dtype,
        jnp.float32,
        run.train.scan_layers,
        run.train.remat,
        kernel=fitting_kernel(platform, dtype, run.model.head_dim, run.data.max_length),
        max_segments=run.data.max_examples_per_row + 1,  # and one of padding
        causal=causal,
    )


def _abstract_batch(run: RunConfig, rows: NamedSharding) -> Batch:
    size, packing = run.train.batch_size, run.data.packing
    examples = (size, run.data.max_examples_per_row) if packing else (size,)
    shapes = dict.fromkeys(("prompt_len", "total_len", "example_id"), examples)
    shapes["tokens"] = (size, run.data.max_length)
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for name, shape in shapes.items()}


def noise_key(run: RunConfig, step: Array) -> Array:
    """The key of the noise of the update that follows `step` updates."""
    return jax.random.fold_in(_keys(run)[1], step)


def _keys(run: RunConfig) -> Array:
    """The keys of the parameters and of the noise."""
    return jax.random.split(jax.random.key(run.train.seed))
