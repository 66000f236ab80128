"""Times the training step of a configuration.

After three warm-up steps, the step is timed one by one, with a wait after each (step_ms is their median), and
then as many steps in a row without waiting, as `train` runs them (tokens/s and MFU). Memory figures are the
compiler's plan.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refusion_jax import sharding
from refusion_jax.benchmarks.decode import arbitrary_params
from refusion_jax.data.pipeline import batch_iterator
from refusion_jax.devices import peak_flops
from refusion_jax.diffusion.segments import Batch
from refusion_jax.training.objectives import OBJECTIVES
from refusion_jax.training.run import RunConfig, mask_id, run_examples, run_tokenizer
from refusion_jax.training.step import Program, TrainState, make_program, noise_key

WARM_UP = 3
MASK_ID = 5  # any token: the data are random
COLUMNS = {  # name -> format; `measure` says what each is
    "devices": "d",
    "rows": "d",
    "step_ms": ".1f",
    "tokens_per_second_per_device": ",.0f",
    "mfu": ".1%",
    "padding": ".1%",
    "noise_ms": ".2f",
    "held_gb": ".1f",
    "temporary_gb": ".1f",
    "compile_s": ".0f",
}


def measure(run: RunConfig, devices: Sequence[jax.Device], steps: int, real_data: bool) -> dict[str, Any]:
    """Figures of the training step on some devices, with `train.batch_size` rows per device.

    Args:
      run: the configuration.
      devices: the devices to use.
      steps: timed steps.
      real_data: whether to use the configured data instead of random tokens.

    Returns:
      chip, jax: names of the device and of the JAX version, and COLUMNS:
        devices, rows: their numbers.
        step_ms: median milliseconds per step, with a wait after each step.
        tokens_per_second_per_device: without padding, of steps in a row.
        mfu: model FLOPs utilization of steps in a row; None for a device without a known peak.
        padding: share of the tokens that are padding.
        noise_ms: milliseconds of drawing the noise and rearranging the tokens, timed alone.
        held_gb, temporary_gb: gigabytes per device of state and batch, and of the compiler's temporaries.
        compile_s: seconds to compile.

    Raises:
      BadInput: the configuration does not fit the devices, or its data cannot be read.
    """
    rows = run.train.batch_size * len(devices)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, batch_size=rows))
    mesh = sharding.make_mesh(run.mesh, devices)
    mask = mask_id(run, run_tokenizer(run)) if real_data else MASK_ID
    program = make_program(run, mesh, mask)
    batch = jax.device_put(
        _real_batch(run) if real_data else _random_batch(run, program.batch), program.batch_sharding
    )
    start = time.perf_counter()
    step = program.step.lower(program.state, program.batch, *program.teacher).compile()
    compile_s = time.perf_counter() - start
    state, teacher = _some_state(program), tuple(map(arbitrary_params, program.teacher))
    seconds = []
    for number in range(WARM_UP + steps):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, batch, *teacher))
        seconds += [time.perf_counter() - start] * (number >= WARM_UP)
    flops, padding, tokens = (float(metrics[name]) for name in ("flops", "padding", "tokens"))
    start = time.perf_counter()
    for _ in range(steps):
        state, metrics = step(state, batch, *teacher)
    jax.block_until_ready((state, metrics))
    rate = steps / (time.perf_counter() - start) / len(devices)
    peak, memory = peak_flops(devices[0].device_kind), step.memory_analysis()
    return {
        "chip": devices[0].device_kind,
        "jax": jax.__version__,
        "devices": len(devices),
        "rows": rows,
        "step_ms": 1e3 * statistics.median(seconds),
        "tokens_per_second_per_device": tokens * rate,
        "mfu": flops * rate / peak if peak else None,
        "padding": padding,
        "noise_ms": 1e3 * _noise_seconds(run, mesh, batch, steps),
        "held_gb": memory.argument_size_in_bytes / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "compile_s": compile_s,
    }


def _noise_seconds(run: RunConfig, mesh: Any, batch: Batch, steps: int) -> float:
    """Median seconds of drawing the noise and rearranging the tokens, without the rest of the step."""
    corrupt = OBJECTIVES[run.objective].corrupt
    noise = jax.jit(
        lambda step, batch: corrupt(noise_key(run, step), batch, run.diffusion, MASK_ID),
        out_shardings=sharding.batch_sharding(mesh),
    )
    seconds = []
    for number in range(WARM_UP + steps):
        start = time.perf_counter()
        jax.block_until_ready(noise(jnp.int32(number), batch))
        seconds += [time.perf_counter() - start] * (number >= WARM_UP)
    return statistics.median(seconds)


def _random_batch(run: RunConfig, abstract: Batch) -> Batch:
    """Full rows of random tokens; each row is one example, one eighth of it prompt."""
    batch = {name: np.zeros(leaf.shape, np.int32) for name, leaf in abstract.items()}
    length = run.data.max_length
    batch["tokens"] += np.random.default_rng(0).integers(
        0, run.model.vocab_size, batch["tokens"].shape, np.int32
    )
    batch["example_id"] += np.arange(batch["example_id"].size, dtype=np.int32).reshape(
        batch["example_id"].shape
    )
    for name, value in (("prompt_len", length // 8), ("total_len", length)):
        batch[name].reshape(len(batch[name]), -1)[:, 0] = value  # further examples of a packed row stay empty
    return batch


def _real_batch(run: RunConfig) -> Batch:
    """The first batch of the configured data."""
    return next(batch_iterator(run_examples(run, run_tokenizer(run)), run.train.batch_size))


def _some_state(program: Program) -> TrainState:
    """A training state with meaningless parameters."""
    return jax.block_until_ready(program.start(arbitrary_params(program.state.base)))
