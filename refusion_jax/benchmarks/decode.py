"""Times decoding: seconds per forward pass against the time to read the weights, and tokens per second.

Each setting is compiled, run once to warm up, and then run `repeats` times; figures are medians. The limit of
a pass is the bytes of the weights and of a half-filled KV cache, divided by the bandwidth measured on the
same device by copying 2 GB.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refusion_jax import sharding
from refusion_jax.decode.decoder import NO_LIMIT
from refusion_jax.decode.inputs import filled_up
from refusion_jax.decode.replay import Course, replayed
from refusion_jax.loader import boxed_params, decoding_model
from refusion_jax.model.config import ModelConfig
from refusion_jax.serving.engine import DECODERS
from refusion_jax.serving.methods import Config

MASK_ID = 5  # any token: the weights are meaningless
NO_EOS = 2**31 - 1  # the EOS id; no token has it, so no row ends early
COLUMNS = {  # name -> format; `measure` says what each is
    "method": "",
    "batch": "d",
    "first_ms": ".1f",
    "pass_ms": ".2f",
    "limit_ms": ".2f",
    "passes": "d",
    "tokens": ",d",
    "per_pass": ".2f",
    "tokens_s": ",.0f",
    "of_limit": ".1%",
    "compile_s": ".0f",
    "again_s": ".1f",
}


class Work(NamedTuple):
    """One setting to time.

    Attributes:
      method: one of serving.METHODS.
      batch: rows decoded together.
      prompt_length: tokens per prompt; prompts are random.
      config: decoding settings of every row.
      courses: recorded courses that the rows replay in turn, method refusion only; empty for none.
      ahead: as in Shape; None for the device's default.
    """

    method: str
    batch: int
    prompt_length: int
    config: Config
    courses: Sequence[Course] = ()
    ahead: int | None = None


def measure(model, params, work: Work, repeats: int, bandwidth: float) -> dict[str, Any]:
    """Figures of one setting.

    Args:
      model, params: the model, ready for decoding.
      work: the setting.
      repeats: timed runs.
      bandwidth: bytes per second, from `memory_bandwidth`.

    Returns:
      the settings, and COLUMNS:
        first_ms, pass_ms: milliseconds of the first pass, prompt included, and of each later pass.
        limit_ms: the least time of a later pass, see the module's docstring.
        passes: forward passes of the row that takes most.
        tokens: tokens committed by all rows.
        per_pass: committed tokens per forward pass of one row.
        tokens_s: tokens per second of all rows, first pass included.
        of_limit: limit_ms / pass_ms.
        compile_s, again_s: seconds of the first run, without and with the compilation cache.
    """
    programs = _programs(model, params, work)
    compile_s = _timed(lambda: programs.resume(programs.begin()))[0]
    if jax.config.jax_compilation_cache_dir is not None:
        jax.clear_caches()
    again_s = _timed(lambda: programs.resume(programs.begin()))[0]
    runs = [_run_once(programs, work) for _ in range(repeats)]
    first_s, rest_s = (statistics.median(seconds) for seconds in zip(*[run[:2] for run in runs], strict=True))
    *_, row_passes, tokens, cache_bytes = runs[0]
    passes = int(row_passes.max())
    pass_s = rest_s / max(passes - 1, 1)
    num_devices = len(jax.tree.leaves(params)[0].sharding.device_set)
    limit_s = (weight_bytes(model, params) + cache_bytes / 2) / (bandwidth * num_devices)
    return {
        **{name: value for name, value in work._asdict().items() if name not in ("config", "courses")},
        **dataclasses.asdict(work.config),
        "first_ms": 1e3 * first_s,
        "pass_ms": 1e3 * pass_s,
        "limit_ms": 1e3 * limit_s,
        "passes": passes,
        "tokens": tokens,
        "per_pass": tokens / int(row_passes.sum()),
        "tokens_s": tokens / (first_s + rest_s),
        "of_limit": limit_s / pass_s,
        "compile_s": compile_s,
        "again_s": again_s,
    }


class _Programs(NamedTuple):
    """The compiled programs of a batch: the first pass, the remaining passes, and reading the results."""

    begin: Callable
    resume: Callable
    finish: Callable


def _programs(model, params, work: Work) -> _Programs:
    vocab, config = model.config.vocab_size, work.config
    random = np.random.default_rng(0)
    prompts = random.integers(0, vocab, (work.batch, work.prompt_length)).tolist()
    decoder = DECODERS[type(config)]
    batch = decoder.prepare(model, prompts, config)
    prompts, requests, mask_id, eos_ids = batch.inputs
    shape = batch.shape
    if work.method == "refusion":
        shape = filled_up(shape, work.ahead)
        if work.courses:
            requests = replayed(requests, work.courses, config, shape)
    return _Programs(
        lambda: decoder.begin(model, params, prompts, requests, mask_id, eos_ids, shape=shape),
        lambda state: decoder.resume(model, params, state, mask_id, eos_ids, 0, NO_LIMIT, shape=shape),
        lambda state: decoder.finish(state, eos_ids, shape),
    )


def _run_once(programs: _Programs, work: Work) -> tuple[float, float, np.ndarray, int, int]:
    """(seconds of the first pass, of the rest, passes [batch], tokens of all rows, bytes of the cache).

    The arrays of a run are freed before the next run, as when serving one request after another. The next
    run's arrays then get the same addresses, and CUDA graphs need no update.
    """
    first_s, state = _timed(programs.begin)
    rest_s, state = _timed(lambda: programs.resume(state))
    samples = jax.device_get(programs.finish(state))
    passes, tokens = samples.num_forwards[: work.batch], int(samples.num_raw.sum())
    return first_s, rest_s, passes, tokens, sum(x.nbytes for x in jax.tree.leaves(state.cache.layers))


def _timed(run: Callable) -> tuple[float, Any]:
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - start, result


def weight_bytes(model, params) -> int:
    """Bytes of the parameters that every pass reads: all but an untied embedding, which is only indexed."""
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return total - (0 if model.config.tie_embeddings else params["embedding"].nbytes)


def memory_bandwidth(num_bytes: int = 1 << 31) -> float:
    """Bytes per second, read and written, of copying an array on the default device.

    The median of 5 programs of 20 copies each, so that the time to start a program does not count.
    """
    array = jnp.ones(num_bytes // 4, jnp.float32)
    copies = 20
    negated = jax.jit(lambda x: jax.lax.fori_loop(0, copies, lambda _, y: -y, x))
    jax.block_until_ready(negated(array))
    return 2 * copies * num_bytes / statistics.median(_timed(lambda: negated(array))[0] for _ in range(5))


def arbitrary_model(config: ModelConfig, dtype, mesh=None, int8: bool = False) -> tuple[Any, dict[str, Any]]:
    """A model ready for decoding with meaningless parameters, on the default device or a mesh."""
    model = decoding_model(config, dtype, jax.default_backend(), int8)
    boxed = boxed_params(model)
    abstract = sharding.unbox(boxed)
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: here, abstract)
    else:
        shardings = sharding.layout(boxed, mesh).shardings
    return model, arbitrary_params(sharding.with_shardings(abstract, shardings))


def arbitrary_params(abstract: Any) -> Any:
    """Finite parameters of a model's shapes; faster to make than random ones.

    Args:
      abstract: tree of ShapeDtypeStruct with shardings.
    """

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.ndim == 1:
            return jnp.ones(leaf.shape, leaf.dtype)
        wave = jnp.sin(jax.lax.iota(jnp.float32, leaf.size) * 12.9898).reshape(leaf.shape)
        return (wave * (100 if leaf.dtype == jnp.int8 else 0.05)).astype(leaf.dtype)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(lambda: jax.tree.map(fill, abstract), out_shardings=shardings)()
