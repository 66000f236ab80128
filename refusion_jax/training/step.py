"""One training step as a compiled function of (state, batch), and the configuration it follows.

    noise (whole batch) -> microbatches: model, loss, gradients -> sum -> AdamW

Its randomness is a function of (seed, step, example), so a run that was interrupted, or moved to another
mesh, draws what it would have drawn.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding

from refusion_jax import sharding
from refusion_jax.data.pipeline import DataConfig
from refusion_jax.diffusion import slot_diffusion as diffusion
from refusion_jax.diffusion.slot_diffusion import DiffusionConfig, Noised
from refusion_jax.errors import BadInput
from refusion_jax.model.attention import fitting_kernel
from refusion_jax.model.transformer import REMAT_POLICIES, ModelConfig, Transformer
from refusion_jax.sharding import Layout, MeshConfig
from refusion_jax.training.flops import train_flops
from refusion_jax.training.objectives import OBJECTIVES, Batch, Objective, make_objective
from refusion_jax.training.optimizer import OptimizerConfig
from refusion_jax.weights import lora
from refusion_jax.weights.lora import LoraConfig

Array = jax.Array

# Of the step, by platform; measured on one H200 (docs/training.md).
COMPILER_OPTIONS = {
    "gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_latency_hiding_scheduler": True},
}

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The run.

    Attributes:
      steps: updates in all.
      batch_size: rows an update, over all devices: of one example each, or of several with data.packing.
      save_every: steps between checkpoints; the last step is always saved.
      log_every: steps between rows of metrics.csv; the last step always has one.
      microbatches: parts a batch is computed in, one after the other, to save memory.
      keep: newest checkpoints that are kept.
      seed: of parameters, data order and noise.
      dtype: of activations and matrix products, "float32" or "bfloat16"; parameters are float32.
      remat: what a layer keeps for the backward pass, "none" (everything), "dots" or "full" (nothing).
      loss_chunks: parts the logits of a row are computed in, to save memory; divides data.max_length.
      scan_layers: compile one layer and loop over it, instead of all layers in a row.
      init_from: Hugging Face model folder to start from; empty starts from random parameters.
      tokenizer: folder with the tokenizer; empty takes that of init_from, or bytes without one.
      wandb_project: of Weights & Biases, where metrics go too; empty leaves that out.
    """

    steps: int
    batch_size: int
    save_every: int
    log_every: int
    microbatches: int = 1
    keep: int = 3
    seed: int = 0
    dtype: str = "float32"
    remat: str = "none"
    loss_chunks: int = 1
    scan_layers: bool = False
    init_from: str = ""
    tokenizer: str = ""
    wandb_project: str = ""

    def __post_init__(self):
        for name in ("steps", "batch_size", "save_every", "log_every", "microbatches", "keep", "loss_chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, known in (("dtype", DTYPES), ("remat", REMAT_POLICIES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A configuration file: its sections, and what stands above them.

    Attributes:
      objective: what the model is trained to do, "refusion", or one of the baselines "ar", "mdm" and "bd3".
    """

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    diffusion: DiffusionConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    objective: str = "refusion"

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise BadInput(f"objective: must be one of {', '.join(OBJECTIVES)}, found {self.objective!r}")
        filled, block_len = self.data.eos_multiple, self.diffusion.block_len
        if self.objective == "bd3" and filled != 1 and filled % block_len:
            raise BadInput(
                f"data.eos_multiple: must be 1 or a multiple of diffusion.block_len, {block_len}, "
                f"found {filled}"
            )
        if self.lora.rank and not self.train.init_from:
            raise BadInput(
                f"lora.rank: is {self.lora.rank}, which needs train.init_from, the model to adapt; found none"
            )


class TrainState(struct.PyTreeNode):
    """All that a step needs and gives. No key is in it: a step's randomness comes from its number."""

    step: Array  # int32 [], updates done
    params: Any  # those that are trained
    opt_state: Any
    frozen: Any  # the others, see lora.split

    @property
    def base(self) -> Any:
        """The model's own parameters, without what adapts them."""
        return self.frozen["base"] if self.frozen else self.params


class Program(NamedTuple):
    """The functions of a run, to be compiled when first called, and what they work on.

    Attributes:
      state: TrainState of ShapeDtypeStructs with shardings.
      batch: the arrays of a batch, ShapeDtypeStructs with shardings.
      rows: where the arrays of a batch lie.
      init: () -> state with random parameters.
      start: the model's parameters, `state.base` -> state with them; uses them up.
      step: (state, batch) -> next state and metrics of this step; uses the state up.
    """

    state: TrainState
    batch: Batch
    rows: NamedSharding
    init: Callable[[], TrainState]
    start: Callable[[Any], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def objective_of(run: RunConfig, mask_id: int | None) -> Objective:
    """What a run trains for; `mask_id` may be None where that needs no mask token."""
    return make_objective(run.objective, run.diffusion, run.data.max_examples_per_row, mask_id)


def make_program(run: RunConfig, mesh: Mesh, mask_id: int | None) -> Program:
    """Plans a run on a mesh; computes and compiles nothing yet. `mask_id` as in `objective_of`.

    Raises:
      BadInput: the batch cannot be split evenly over microbatches and devices.
    """
    parts = run.train.microbatches * sharding.batch_shards(mesh)
    if run.train.batch_size % parts:
        raise BadInput(
            f"train.batch_size must be a multiple of {parts}, the microbatches times the devices that "
            f"share the rows, got {run.train.batch_size}"
        )
    if run.data.max_length % run.train.loss_chunks:
        lengths = f"data.max_length {run.data.max_length}"
        raise BadInput(f"train.loss_chunks must divide {lengths}, got {run.train.loss_chunks}")
    dtype = DTYPES[run.train.dtype]
    platform = mesh.devices.flat[0].platform
    objective = objective_of(run, mask_id)
    model = Transformer(
        run.model,
        dtype,
        jnp.float32,
        run.train.scan_layers,
        run.train.remat,
        kernel=fitting_kernel(platform, dtype, run.model.head_dim, run.data.max_length),
        max_segments=run.data.max_examples_per_row + 1,  # and one of padding
        causal=objective.causal,
    )
    optimizer = run.optimizer.transformation(run.train.steps)

    def start(params: Any) -> TrainState:
        params, frozen = lora.split(lora.init(run.lora, _keys(run)[0], params, dtype))
        return TrainState(jnp.int32(0), params, optimizer.init(params), frozen)

    def init() -> TrainState:
        nothing = jnp.zeros((1, 1), jnp.int32)
        # One token is no length for a kernel, and parameters do not depend on it.
        return start(model.clone(kernel="dense").init(_keys(run)[0], nothing, nothing)["params"])

    boxed = jax.eval_shape(init)
    layout = sharding.layout(boxed, mesh)
    rows, shardings = sharding.batch_sharding(mesh), layout.shardings
    return Program(
        state=sharding.with_shardings(sharding.unbox(boxed), shardings),
        batch=_abstract_batch(run, rows),
        rows=rows,
        init=jax.jit(lambda: sharding.unbox(init()), out_shardings=shardings),
        start=jax.jit(start, in_shardings=(shardings.base,), out_shardings=shardings, donate_argnums=0),
        step=jax.jit(
            make_train_step(run, model, optimizer, layout, objective),
            in_shardings=(shardings, rows),
            out_shardings=(shardings, sharding.replicated(mesh)),
            donate_argnums=0,
            compiler_options=COMPILER_OPTIONS.get(platform),
        ),
    )


def make_train_step(
    run: RunConfig,
    model: Transformer,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    objective: Objective,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The function (state, batch) -> (next state, metrics) of one update.

    Metrics are float32 scalars "loss", "ar_loss" and "diffusion_loss" of the parameters given,
    "grad_norm" before clipping, "learning_rate", "flops" (see flops.py) and "padding", the share of the batch
    that is, and int32 "tokens" of the batch without padding.
    """
    schedule = run.optimizer.schedule(run.train.steps)

    def split(x: Array) -> Array:
        # Part i takes the rows whose number is i modulo the number of parts. So each device cuts up the
        # rows it has: all devices are busy in every part, and no row moves.
        parts = x.reshape(-1, run.train.microbatches, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(parts, sharding.batch_sharding(layout.mesh, leading=1))

    def gradients(params: Any, frozen: Any, noised: Noised) -> tuple[Any, dict[str, Array]]:
        divided_by = diffusion.divisors(noised)  # of the whole batch, so that the parts add up

        def loss(params: Any, part: Noised) -> tuple[Array, dict[str, Array]]:
            variables = {"params": params}
            states, _ = model.apply(
                variables, part.tokens, part.positions, **objective.seen(part), method="hidden"
            )
            head = model.apply(variables, method="unembedding")
            weight, chunks = run.diffusion.diffusion_weight, run.train.loss_chunks
            return diffusion.loss_of_states(states, head, part, weight, divided_by, chunks)

        def of_part(part: Noised) -> tuple[Any, dict[str, Array]]:
            grads, losses = jax.grad(loss, has_aux=True)(working, part)
            grads = jax.lax.with_sharding_constraint(grads, layout.shardings.base)
            grads = jax.tree.map(lambda g, param: g.astype(param.dtype), grads, model_params)
            return pull_back(grads)[0], losses

        # The parameters that are trained are the model's own, or adapters to be merged into it.
        model_params, pull_back = jax.vjp(lambda params: lora.merge(lora.combine(params, frozen)), params)
        working = _working_copy(model_params, model.dtype)
        if run.train.microbatches == 1:
            return of_part(noised)
        first, rest = (lambda x: x[0]), (lambda x: x[1:])
        parts = jax.tree.map(split, noised)
        add = lambda sums, part: (jax.tree.map(jnp.add, sums, of_part(part)), None)  # noqa: E731
        sums, _ = jax.lax.scan(add, of_part(jax.tree.map(first, parts)), jax.tree.map(rest, parts))
        return sums

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        with layout.scope():
            noised = objective.noise(noise_key(run, state.step), batch)
            grads, losses = gradients(state.params, state.frozen, noised)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        tokens = jnp.sum(batch["total_len"])
        metrics = losses | {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step),
            "tokens": tokens,
            "padding": (batch["tokens"].size - tokens) / batch["tokens"].size,
            "flops": train_flops(run.model, *objective.work(batch["prompt_len"], batch["total_len"])),
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, state.frozen), metrics

    return train_step


def _working_copy(params: Any, dtype: Any) -> Any:
    """Parameters in the dtype of matrix products, cast once a step and not at each use.

    The embedding stays as it is: its gradient sums up as many terms as the mask token has places in the
    batch, too many for bfloat16.
    """
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params) | {"embedding": params["embedding"]}


def _abstract_batch(run: RunConfig, rows: NamedSharding) -> Batch:
    examples = (
        (run.train.batch_size, run.data.max_examples_per_row) if run.data.packing else (run.train.batch_size,)
    )
    shapes = dict.fromkeys(("prompt_len", "total_len", "example_id"), examples)
    shapes["tokens"] = (run.train.batch_size, run.data.max_length)
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for name, shape in shapes.items()}


def noise_key(run: RunConfig, step: Array) -> Array:
    """The key of the noise of the update that follows `step` updates."""
    return jax.random.fold_in(_keys(run)[1], step)


def _keys(run: RunConfig) -> Array:
    """The keys of the parameters and of the noise."""
    return jax.random.split(jax.random.key(run.train.seed))
