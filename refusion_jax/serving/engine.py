"""Continuous batching: rows decode together, and waiting requests take the rows of those that are done."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from refusion_jax.baselines.decoders import ar, bd3, mdm
from refusion_jax.decode import loop
from refusion_jax.decode.batch import Shape, padded_column
from refusion_jax.decode.decoder import NO_LIMIT, Decoder, State
from refusion_jax.decode.inputs import tokens_ahead
from refusion_jax.decode.kv_cache import insert_rows
from refusion_jax.decode.samples import Samples
from refusion_jax.serving.methods import METHODS, Config
from refusion_jax.serving.packed_transfer import Packed
from refusion_jax.serving.requests import Request
from refusion_jax.serving.results import result
from refusion_jax.sharding import replicated
from refusion_jax.tokenizer import Tokenizer

DECODERS: dict[type[Config], Decoder] = {
    METHODS["refusion"]: loop.DECODER,
    METHODS["ar"]: ar.DECODER,
    METHODS["mdm"]: mdm.DECODER,
    METHODS["bd3"]: bd3.DECODER,
}


def fitting_shape(requests: Sequence[Request], batch_size: int, ahead: int | None = None) -> Shape:
    """One padded shape for all the requests, so that one compilation serves them.

    Args:
      batch_size: how many are decoded together.
      ahead: as in Shape; None chooses by the device.
    """
    prompts, configs = [r.prompt for r in requests], [r.config for r in requests]
    exact = DECODERS[type(configs[0])].exact_shape
    if ahead is None:
        ahead = tokens_ahead(batch_size)
    return exact(prompts, configs).padded(batch_size, any(r.trace for r in requests), ahead)


def serve(
    model,
    params,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    shape: Shape,
    stop: Sequence[str] = (),
    watch: Callable[[State], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Results in the order of the requests, as `results.result` makes them.

    `shape.rows` requests are decoded at a time; as rows finish, waiting requests take their place.

    Args:
      stop: the text of an answer ends before the first of these.
      watch: is called with the state after every forward pass, for a view of the decode while it happens.
    """
    finished: dict[int, dict[str, Any]] = {}
    due = 0
    for number, samples in decoded(model, params, requests, shape, watch):
        finished[number] = result(requests[number], samples, tokenizer, stop)
        while due in finished:
            yield finished.pop(due)
            due += 1


def decoded(
    model,
    params,
    requests: Sequence[Request],
    shape: Shape,
    watch: Callable[[State], None] | None = None,
) -> Iterator[tuple[int, Samples]]:
    """(number of a request, its row of samples), as they finish.

    The longest requests begin first, so that few rows are idle at the end. Finished answers are yielded after
    the device was given its next passes.
    """
    decoder = DECODERS[type(requests[0].config)]
    # Rows are taken in a few at a time: each intake costs a pass over their prompts.
    intake = dataclasses.replace(shape, rows=max(1, shape.rows // 8))
    blank = decoder.prepare(model, [requests[0].prompt], [requests[0].config], shape)
    prompts, settings, mask_id, eos_id = _beside(params, blank.inputs)
    state = decoder.init(model, prompts, settings, shape=shape)
    by_length = sorted(enumerate(requests), key=lambda item: -item[1].config.gen_length)
    waiting = collections.deque(by_length)
    running: dict[int, int] = {}  # row -> number of the request in it
    leaving: list[tuple[int, Samples]] = []
    while waiting or running:
        while waiting and len(running) < shape.rows:
            taken = _next_requests(waiting, running, shape.rows, intake.rows)
            state = _take_in(decoder, model, params, state, taken, intake)
            running |= {row: number for row, number, _ in taken}
            if watch is not None:
                watch(state)
        until = max(0, len(running) - intake.rows)
        limit = NO_LIMIT if watch is None else 1
        state = decoder.resume(model, params, state, mask_id, eos_id, until, limit, shape=shape)
        if watch is not None:
            watch(state)
        yield from leaving
        done, samples = jax.device_get(_answers(decoder, state, eos_id, shape)).unpack()
        ended = [row for row in running if done[row]]
        leaving = [(running.pop(row), jax.tree.map(lambda x, row=row: x[row], samples)) for row in ended]
    yield from leaving


def _next_requests(
    waiting: collections.deque[tuple[int, Request]], running: Mapping[int, int], rows: int, most: int
) -> list[tuple[int, int, Request]]:
    """(row, number of a request, request) of up to `most` waiting requests and as many free rows."""
    free = (row for row in range(rows) if row not in running)
    return [(row, *waiting.popleft()) for row in itertools.islice(free, min(most, len(waiting)))]


def _take_in(
    decoder: Decoder, model, params, state: State, taken: Sequence[tuple[int, int, Request]], intake: Shape
) -> State:
    """The state with requests begun in the rows they were given."""
    rows, _, asked = zip(*taken, strict=True)
    batch = decoder.prepare(model, [r.prompt for r in asked], [r.config for r in asked], intake)
    into = padded_column(rows, intake.rows, np.int32, padding=len(state.done))
    return _inserted(decoder, model, params, state, Packed.pack((into, batch.inputs)), intake)


def _beside(params, tree: Any) -> Any:
    """The arrays of `tree` where those of `params` are, whole on each device.

    Otherwise jit compiles once for the uncommitted first state and again for its committed outputs.
    """
    place = jax.tree.leaves(params)[0].sharding
    return jax.device_put(tree, replicated(place.mesh) if isinstance(place, NamedSharding) else place)


# For a small model, a call to the device or a transfer costs as much as a forward pass, so there are as few
# as possible. A state is never allocated again: CUDA graphs are slow to follow arrays to another address.


@functools.partial(jax.jit, static_argnames=("decoder", "model", "shape"), donate_argnames=("state",))
def _inserted(decoder: Decoder, model, params, state: State, packed: Packed, shape: Shape) -> State:
    """The state with some rows taken over by a batch that begins; `packed` has (the rows, its inputs)."""
    rows, inputs = packed.unpack()
    return insert_rows(state, decoder.begin(model, params, *inputs, shape=shape), rows)


@functools.partial(jax.jit, static_argnames=("decoder", "shape"))
def _answers(decoder: Decoder, state: State, eos_id: jax.Array, shape: Shape) -> Packed:
    """Which rows are done, and the Samples of all."""
    return Packed.pack((state.done, decoder.finish(state, eos_id, shape)))


def warm_up(model, params, tokenizer: Tokenizer, like: Request, shape: Shape) -> None:
    """Compiles what decoding at `shape` takes, by decoding one token."""
    least = {"gen_length": 1, "slot_size": 1, "num_blocks": 1, "block_len": 1}
    fields = {field.name for field in dataclasses.fields(like.config)}
    config = dataclasses.replace(like.config, **{k: v for k, v in least.items() if k in fields})
    request = Request(like.id, [config.mask_id], config)
    list(serve(model, params, tokenizer, [request], shape))
