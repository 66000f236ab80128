"""Continuous batching: rows decode together, and a waiting request takes the row of one that is done."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from refusion_jax.baselines.decoders import ar, bd3, mdm
from refusion_jax.decode import loop
from refusion_jax.decode.batch import Shape, padded_column
from refusion_jax.decode.decoder import NO_LIMIT, Decoder, State
from refusion_jax.decode.inputs import filled_up
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
    """One padded shape that holds all the requests, so that they share one compilation.

    Args:
      requests: at least one, all of one method.
      batch_size: the number of rows, requests decoded together.
      ahead: as in Shape; None chooses by batch size and device (`filled_up`).

    Raises:
      BadInput: a prompt that the method cannot continue.
    """
    prompts, configs = [r.prompt for r in requests], [r.config for r in requests]
    exact = DECODERS[type(configs[0])].exact_shape
    return filled_up(exact(prompts, configs).padded(batch_size, any(r.trace for r in requests)), ahead)


def serve(
    model,
    params,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    shape: Shape,
    stop: Sequence[str] = (),
    watch: Callable[[State], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields the result of each request (see `results.result`), in the order of the requests.

    `shape.rows` requests are decoded at a time. Waiting requests take the rows of finished ones.

    Args:
      stop: texts that end an answer; its text is cut before the first of them.
      watch: called with the state after every forward pass, to show the decode while it happens.
    """
    return in_order(served(model, params, tokenizer, requests, shape, stop, watch))


def served(
    model,
    params,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    shape: Shape,
    stop: Sequence[str] = (),
    watch: Callable[[State], None] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (index of a request, its result) as requests finish. Arguments are those of `serve`."""
    for index, samples in decoded(model, params, requests, shape, watch):
        yield index, result(requests[index], samples, tokenizer, stop)


def in_order(numbered: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yields the results with the indices 0, 1, 2, …, each as soon as those before it are there."""
    results: dict[int, dict[str, Any]] = {}
    next_index = 0
    for index, answer in numbered:
        results[index] = answer
        while next_index in results:
            yield results.pop(next_index)
            next_index += 1


def decoded(
    model,
    params,
    requests: Sequence[Request],
    shape: Shape,
    watch: Callable[[State], None] | None = None,
) -> Iterator[tuple[int, Samples]]:
    """Yields (index of a request, its Samples without batch axis) as requests finish.

    The requests with the largest gen_length start first, so that few rows are idle at the end. A finished
    request is yielded after the next passes are dispatched, so that the caller's work overlaps with them.
    """
    decoder = DECODERS[type(requests[0].config)]
    # Requests start an eighth of the rows at a time: each start costs a pass over their prompts.
    intake = dataclasses.replace(shape, rows=max(1, shape.rows // 8))
    blank = decoder.prepare(model, [requests[0].prompt], [requests[0].config], shape)
    prompts, settings, mask_id, eos_ids = _on_devices_of(params, blank.inputs)
    state = decoder.init(model, prompts, settings, shape=shape)
    by_length = sorted(enumerate(requests), key=lambda item: -item[1].config.gen_length)
    waiting = collections.deque(by_length)
    running: dict[int, int] = {}  # row -> index of the request in it
    leaving: list[tuple[int, Samples]] = []
    while waiting or running:
        while waiting and len(running) < shape.rows:
            taken = _next_requests(waiting, running, shape.rows, intake.rows)
            state = _start(decoder, model, params, state, taken, intake)
            running |= {row: index for row, index, _ in taken}
            if watch is not None:
                watch(state)
        until = max(0, len(running) - intake.rows)
        limit = NO_LIMIT if watch is None else 1
        state = decoder.resume(model, params, state, mask_id, eos_ids, until, limit, shape=shape)
        if watch is not None:
            watch(state)
        yield from leaving
        done, samples = jax.device_get(_answers(decoder, state, eos_ids, shape)).unpack()
        ended = [row for row in running if done[row]]
        leaving = [(running.pop(row), jax.tree.map(lambda x, row=row: x[row], samples)) for row in ended]
    yield from leaving


def _next_requests(
    waiting: collections.deque[tuple[int, Request]], running: Mapping[int, int], rows: int, most: int
) -> list[tuple[int, int, Request]]:
    """(row, index of a request, request) for up to `most` waiting requests, as far as there are free rows."""
    free = (row for row in range(rows) if row not in running)
    return [(row, *waiting.popleft()) for row in itertools.islice(free, min(most, len(waiting)))]


def _start(
    decoder: Decoder, model, params, state: State, taken: Sequence[tuple[int, int, Request]], intake: Shape
) -> State:
    """The state with the requests `taken` started in their rows."""
    rows, _, asked = zip(*taken, strict=True)
    batch = decoder.prepare(model, [r.prompt for r in asked], [r.config for r in asked], intake)
    padded_rows = padded_column(rows, intake.rows, np.int32, padding=len(state.done))
    return _inserted(decoder, model, params, state, Packed.pack((padded_rows, batch.inputs)), intake)


def _on_devices_of(params, tree: Any) -> Any:
    """`tree` with its arrays on the devices of `params`, replicated.

    Otherwise jit compiles once for the uncommitted first state and again for its committed outputs.
    """
    where = jax.tree.leaves(params)[0].sharding
    return jax.device_put(tree, replicated(where.mesh) if isinstance(where, NamedSharding) else where)


# For a small model a call to the device or a transfer costs as much as a forward pass, so there are as few as
# possible. The state is donated and keeps its buffers, because CUDA graphs are slow to update when arrays
# move to other addresses.


@functools.partial(jax.jit, static_argnames=("decoder", "model", "shape"), donate_argnames=("state",))
def _inserted(decoder: Decoder, model, params, state: State, packed: Packed, shape: Shape) -> State:
    """The state with some rows replaced by a batch after its first pass.

    Args:
      packed: (the rows, int32 [A]; the arguments of `Decoder.begin` for A requests).
    """
    rows, inputs = packed.unpack()
    return insert_rows(state, decoder.begin(model, params, *inputs, shape=shape), rows)


@functools.partial(jax.jit, static_argnames=("decoder", "shape"))
def _answers(decoder: Decoder, state: State, eos_ids: jax.Array, shape: Shape) -> Packed:
    """(bool [B], the rows that are done; the Samples of all rows), packed for one transfer."""
    return Packed.pack((state.done, decoder.finish(state, eos_ids, shape)))


def warm_up(model, params, tokenizer: Tokenizer, like: Request, shape: Shape) -> None:
    """Compiles every program that decoding at `shape` runs, by decoding one token."""
    least = {"gen_length": 1, "slot_size": 1, "num_blocks": 1, "block_len": 1}
    fields = {field.name for field in dataclasses.fields(like.config)}
    config = dataclasses.replace(like.config, **{k: v for k, v in least.items() if k in fields})
    request = Request(like.id, [config.mask_id], config)
    list(serve(model, params, tokenizer, [request], shape))
