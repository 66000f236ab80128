"""Lowers and compiles programs for TPUs that are not attached, and reads the compiler's report on them."""

import math
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from refusion_jax import sharding
from refusion_jax.decode.config import DecodeConfig
from refusion_jax.decode.inputs import filled_up
from refusion_jax.decode.loop import DECODER
from refusion_jax.loader import boxed_params, decoding_model
from refusion_jax.model.config import ModelConfig
from refusion_jax.sharding import MeshConfig
from refusion_jax.tpu import collectives
from refusion_jax.tpu.slices import Topology
from refusion_jax.training.run import RunConfig
from refusion_jax.training.step import make_program

_MASK_ID = 0  # any token; it affects no shape


class Lowered(NamedTuple):
    """A program ready to be compiled.

    Attributes:
      stages: result of `jit(...).lower(...)`.
      arguments: group of arguments -> bytes on each device.
    """

    stages: Any
    arguments: dict[str, int]


class Compiled(NamedTuple):
    """Result of compiling, per device.

    Attributes:
      needed: peak memory in bytes; NaN if the program does not fit and the compiler gives no number.
      seconds: compilation time.
      memory: the compiler's memory analysis, None if the program does not fit.
      traffic: collectives of the program, None if it does not fit.
    """

    needed: float
    seconds: float
    memory: Any = None
    traffic: collectives.Traffic | None = None

    @property
    def fits(self) -> bool:
        return self.memory is not None


def lower_training(run: RunConfig, topology: Topology) -> Lowered:
    """Lowers the training step of a run for a topology.

    Raises:
      BadInput: the run's mesh or batch size does not fit the number of devices.
    """
    mesh = sharding.make_mesh(run.mesh, topology.devices())
    program = make_program(run, mesh, _MASK_ID)
    arguments = {
        "parameters": program.state.params,
        "frozen parameters": program.state.frozen,
        "optimiser state": (program.state.step, program.state.opt_state),
        "batch": program.batch,
        "teacher": program.teacher,
    }
    return Lowered(program.step.lower(program.state, program.batch, *program.teacher), _bytes_each(arguments))


class Decoding(NamedTuple):
    """Settings that a decoder is compiled for; other fields as in DecodeConfig.

    Attributes:
      prompt_length: tokens per prompt.
      batch_size: requests decoded together.
      int8: whether the weights are int8 instead of bfloat16.
    """

    prompt_length: int
    gen_length: int
    slot_size: int
    num_blocks: int
    batch_size: int
    verify: str = "threshold"
    draft_length: int = 64
    int8: bool = False

    @property
    def weights(self) -> str:
        return "int8" if self.int8 else "bfloat16"


def lower_decoding(model: ModelConfig, topology: Topology, asked: Decoding) -> Lowered:
    """Lowers the slot decoder, with every matrix product split over all devices.

    Raises:
      BadInput: the decoding settings do not fit together.
    """
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=-1), topology.devices())
    decoder = decoding_model(model, jnp.bfloat16, "tpu", asked.int8)
    boxed = boxed_params(decoder)
    params = sharding.with_shardings(sharding.unbox(boxed), sharding.layout(boxed, mesh).shardings)
    names = ("gen_length", "slot_size", "num_blocks", "verify", "draft_length")
    settings = DecodeConfig(_MASK_ID, _MASK_ID, **{name: getattr(asked, name) for name in names})
    *inputs, shape = DECODER.prepare(decoder, [[0] * asked.prompt_length] * asked.batch_size, settings)
    kind = mesh.devices.flat[0].device_kind
    shape = filled_up(shape, device_kind=kind)
    everywhere = sharding.replicated(mesh)
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), inputs)
    arguments = {"parameters": params, "requests": inputs}
    program = jax.jit(DECODER.decode, static_argnames=("model", "shape"))
    return Lowered(program.lower(decoder, params, *inputs, shape=shape), _bytes_each(arguments))


def _bytes_each(arguments: dict[str, Any]) -> dict[str, int]:
    def held(leaf: jax.ShapeDtypeStruct) -> int:
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return {name: sum(map(held, jax.tree.leaves(tree))) for name, tree in arguments.items()}


def compile_for(lowered: Lowered) -> Compiled:
    """Compiles a program; a program that needs too much memory is a result, not an error."""
    start = time.perf_counter()
    try:
        compiled = lowered.stages.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = bytes_needed(str(error))
        if needed is None:
            raise
        return Compiled(needed, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return Compiled(memory.peak_memory_in_bytes, seconds, memory, collectives.count(compiled.as_text()))


def bytes_needed(message: str) -> float | None:
    """Bytes that a program needs, from the compiler's error message about too little HBM.

    NaN if the message gives no number. None if it is about something else, for example a kernel's memory.
    """
    if "RESOURCE_EXHAUSTED" not in message or "hbm" not in message.lower():
        return None
    size = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"\({size}\) exceeds available HBM|Used {size} of {size} hbm", message)
    if found is None:
        return math.nan
    number, unit = [group for group in found.groups() if group is not None][:2]
    return float(number) * 1024 ** " KMGT".index(unit or " ")


def kinds(memory: Any) -> dict[str, int]:
    """Peak memory of a device by the compiler's analysis: kind -> bytes."""
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    arguments, program = memory.argument_size_in_bytes, memory.generated_code_size_in_bytes
    # temp_size_in_bytes also counts temporaries that are not alive at the peak. In a program for many devices
    # a part of the program may be absent at the peak, so the difference can be negative.
    temporaries = max(0, memory.peak_memory_in_bytes - arguments - results - program)
    return {
        "arguments": arguments,
        "results beside them": results,
        "temporaries": temporaries,
        "program": program,
    }
