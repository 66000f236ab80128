"""Requests in, results out: what `sample` and `evaluate` do with a loaded model.

A request is a JSON object: `id`, one of `prompt`, `messages` and `prompt_ids`, and settings that
override the defaults. Settings of another method are passed over, so that one file serves them all. A
request that cannot be served gets a result with `error`, and the others go on.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from refusion_jax.baselines.decoders import ar, bd3, mdm
from refusion_jax.decode import loop as decode
from refusion_jax.decode.batch import Shape, check_prompt, padded_column
from refusion_jax.decode.config import DecodeConfig, quoted
from refusion_jax.decode.inputs import tokens_ahead
from refusion_jax.decode.kv_cache import insert_rows
from refusion_jax.decode.samples import Samples
from refusion_jax.errors import BadInput
from refusion_jax.serving.packed_transfer import Packed
from refusion_jax.sharding import replicated
from refusion_jax.tokenizer import Tokenizer

PROMPTS = ("prompt", "messages", "prompt_ids")


class Method(NamedTuple):
    """A way to decode: the module, and the class of its settings."""

    decoder: ModuleType
    config: type

    @property
    def settings(self) -> dict[str, Any]:
        """What it can be told, special ids apart, and the defaults."""
        fields = dataclasses.fields(self.config)
        return {field.name: field.default for field in fields if field.name not in ("mask_id", "eos_id")}


METHODS = {
    "refusion": Method(decode, DecodeConfig),
    "ar": Method(ar, ar.ARConfig),
    "mdm": Method(mdm, mdm.MDMConfig),
    "bd3": Method(bd3, bd3.BD3Config),
}
DECODERS = {method.config: method.decoder for method in METHODS.values()}
SETTINGS = {name for method in METHODS.values() for name in method.settings}
Config = DecodeConfig | ar.ARConfig | mdm.MDMConfig | bd3.BD3Config


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a request may leave out.

    Attributes:
      method: one of METHODS, the same for all requests.
      settings: of the method.
      raw: a text prompt is fed as it is, without the chat template.
      template: options of the chat template, as `enable_thinking`.
      stop: the answer's text ends before the first of these.
      ahead: as in Shape; None is what suits the device.
    """

    method: str
    settings: Mapping[str, Any]
    raw: bool = False
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stop: Sequence[str] = ()
    ahead: int | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """A request that can be served: its id, prompt tokens, settings, and whether to trace it."""

    id: Any
    prompt: Sequence[int]
    config: Config
    trace: bool = False


def parse(raw: Any, defaults: Defaults, tokenizer: Tokenizer, vocab_size: int) -> Request:
    """A request from its JSON object.

    Raises:
      BadInput: naming the field that is missing, unknown or wrong.
    """
    if not isinstance(raw, dict):
        raise BadInput(f"a request must be a JSON object, found {type(raw).__name__}")
    if not is_id(raw.get("id")):
        raise BadInput(f"id must be text or a whole number, found {quoted(raw.get('id'))}")
    given = [field for field in PROMPTS if field in raw]
    if len(given) != 1:
        raise BadInput(f"exactly one of {', '.join(PROMPTS)} is needed, found {given or 'none'}")
    trace = raw.get("trace", False)
    if not isinstance(trace, bool):
        raise BadInput(f"trace must be true or false, found {quoted(trace)}")
    method = METHODS[defaults.method]
    own = {key: value for key, value in raw.items() if key not in ("id", "trace", *PROMPTS)}
    for key in own:
        if key not in SETTINGS:
            raise BadInput(f"unknown field {key!r}")
    asked = {**defaults.settings, **own}
    settings = {key: value for key, value in asked.items() if key in method.settings}
    feeds_mask = defaults.method != "ar" or settings.get("first_token") == "mask"
    # Where no mask is ever read any token serves as the one that is fed.
    mask_id = tokenizer.need_mask() if feeds_mask or tokenizer.mask_id is not None else tokenizer.eos_id
    config = method.config(mask_id=mask_id, eos_id=tokenizer.eos_id, **settings)
    prompt = _encode(given[0], raw[given[0]], defaults, tokenizer)
    check_prompt(prompt, vocab_size)
    method.decoder.exact_shape([prompt], [config])  # refuses a prompt that the method cannot continue
    return Request(raw["id"], prompt, config, trace)


def is_id(value: Any) -> bool:
    """Whether a value can name a request."""
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def _encode(kind: str, value: Any, defaults: Defaults, tokenizer: Tokenizer) -> Sequence[int]:
    if kind == "prompt_ids":
        if not isinstance(value, list):
            raise BadInput(f"prompt_ids must be a list of token ids, found {type(value).__name__}")
        return value
    wanted = str if kind == "prompt" else list
    if not isinstance(value, wanted):
        raise BadInput(
            f"{kind} must be {'text' if wanted is str else 'a list of messages'}, found {quoted(value)}"
        )
    return tokenizer.encode_prompt(value, raw=defaults.raw, **defaults.template)


def fitting_shape(requests: Sequence[Request], batch_size: int, ahead: int | None = None) -> Shape:
    """One padded shape for all the requests, so that one compilation serves them.

    Args:
      batch_size: how many are decoded together.
      ahead: as in Shape; None is what suits the device.
    """
    prompts, configs = [r.prompt for r in requests], [r.config for r in requests]
    exact = DECODERS[type(configs[0])].exact_shape
    if ahead is None:
        ahead = tokens_ahead(batch_size)
    return exact(prompts, configs).padded(batch_size, any(r.trace for r in requests), ahead)


def serve(
    model, params, tokenizer: Tokenizer, requests: Sequence[Request], shape: Shape, stop: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Results in the order of the requests.

    `shape.rows` are decoded at a time; as rows finish, waiting requests take their place.
    """
    finished: dict[int, dict[str, Any]] = {}
    due = 0
    for number, samples in decoded(model, params, requests, shape):
        finished[number] = result(requests[number], samples, tokenizer, stop)
        while due in finished:
            yield finished.pop(due)
            due += 1


def decoded(model, params, requests: Sequence[Request], shape: Shape) -> Iterator[tuple[int, Samples]]:
    """(number of a request, its row of samples), as they finish.

    The longest are begun first: at the end, when none waits, fewer rows stand idle. Answers are given out
    after the device was told to decode on with others.
    """
    method = DECODERS[type(requests[0].config)]
    # Rows are taken in a few at a time: each time costs a pass over their prompts.
    few = dataclasses.replace(shape, rows=max(1, shape.rows // 8))
    *blank, _ = method.prepare(model, [requests[0].prompt], [requests[0].config], shape)
    prompts, settings, mask_id, eos_id = _beside(params, blank)
    state = method.init(model, prompts, settings, shape=shape)
    by_length = sorted(enumerate(requests), key=lambda item: -item[1].config.gen_length)
    waiting = collections.deque(by_length)
    running: dict[int, int] = {}  # row -> number of the request in it
    leaving: list[tuple[int, Samples]] = []
    while waiting or running:
        free = (row for row in range(shape.rows) if row not in running)
        while waiting and len(running) < shape.rows:
            taken = [(row, *waiting.popleft()) for row in itertools.islice(free, min(few.rows, len(waiting)))]
            rows, numbers, asked = zip(*taken, strict=True)
            *inputs, _ = method.prepare(model, [r.prompt for r in asked], [r.config for r in asked], few)
            places = padded_column(rows, few.rows, np.int32, padding=shape.rows)
            state = _taken_in(method.begin, model, params, state, Packed.of((places, inputs)), few)
            running |= zip(rows, numbers, strict=True)
        until = max(0, len(running) - few.rows)
        state = method.resume(model, params, state, mask_id, eos_id, until, shape=shape)
        yield from leaving
        done, samples = jax.device_get(_answers(method.finish, state, eos_id, shape)).tree()
        ended = [row for row in running if done[row]]
        leaving = [(running.pop(row), jax.tree.map(lambda x, row=row: x[row], samples)) for row in ended]
    yield from leaving


def _beside(params, tree: Any) -> Any:
    """The arrays of `tree` where those of `params` are, whole on each device.

    Else programs are compiled for a state that may be anywhere, and again for what comes of it.
    """
    place = jax.tree.leaves(params)[0].sharding
    return jax.device_put(tree, replicated(place.mesh) if isinstance(place, NamedSharding) else place)


# Calls to the device and arrays that come or go cost a small model as much as passes, so there are as few as
# can be. A state is never made anew: CUDA graphs are slow to follow arrays to another address.


@functools.partial(jax.jit, static_argnames=("begin", "model", "shape"), donate_argnames=("state",))
def _taken_in(begin: Callable, model, params, state: Any, packed: Packed, shape: Shape) -> Any:
    """The state with some rows taken over by a batch that begins; `packed` has (the rows, its inputs)."""
    rows, inputs = packed.tree()
    return insert_rows(state, begin(model, params, *inputs, shape=shape), rows)


@functools.partial(jax.jit, static_argnames=("finish", "shape"))
def _answers(finish: Callable, state: Any, eos_id: jax.Array, shape: Shape) -> Packed:
    """Which rows are done, and the Samples of all."""
    return Packed.of((state.done, finish(state, eos_id, shape)))


def warm_up(model, params, tokenizer: Tokenizer, like: Request, shape: Shape) -> None:
    """Compiles what decoding at `shape` takes, by decoding one token."""
    least = {"gen_length": 1, "slot_size": 1, "num_blocks": 1, "block_len": 1}
    fields = {field.name for field in dataclasses.fields(like.config)}
    config = dataclasses.replace(like.config, **{k: v for k, v in least.items() if k in fields})
    request = Request(like.id, [config.mask_id], config)
    list(serve(model, params, tokenizer, [request], shape))


def result(request: Request, samples: Samples, tokenizer: Tokenizer, stop: Sequence[str]) -> dict[str, Any]:
    """The JSON object that answers a request, from its row of the samples."""
    num_raw, num_ids = int(samples.num_raw), int(samples.num_ids)
    raw_ids = samples.raw_ids[:num_raw].tolist()
    text = tokenizer.decode(raw_ids[:num_ids])
    reason = "eos" if num_ids < num_raw else "length"
    cuts = [text.index(s) for s in stop if s in text]
    if cuts:
        text, reason = text[: min(cuts)], "stop"
    answer = {
        "id": request.id,
        "text": text,
        "ids": raw_ids[:num_ids],
        "raw_ids": raw_ids,
        "finish_reason": reason,
        "num_tokens": num_raw,
        "num_forwards": int(samples.num_forwards),
        "tokens_per_forward": round(num_raw / max(int(samples.num_forwards), 1), 4),
        "num_iterations": int(samples.num_iterations),
    }
    if request.trace:
        answer["trace"] = trace_steps(request, samples)
    return answer


def trace_steps(request: Request, samples: Samples) -> list[dict[str, Any]]:
    """A request's plans as JSON; positions count from the start of the prompt.

    `start` is that of the block; `confidences` are of the slots in the pool, by the position of their first
    token; `accepted` says of each slot planned how many of its tokens were accepted when verified, and after
    each refill. Other methods have no plans.
    """
    if samples.trace is None:
        return []
    steps, size = [], request.config.slot_size
    for i in range(int(samples.num_iterations)):
        step = jax.tree.map(lambda x, i=i: x[i], samples.trace)
        start = len(request.prompt) + int(step.block) * request.config.block_len
        pool, planned = np.flatnonzero(step.confidence >= 0), np.flatnonzero(step.planned)
        accepted = [step.accepted[m * size : (m + 1) * size] for m in planned]
        steps.append(
            {
                "block": int(step.block),
                "start": start,
                "planned": (start + size * planned).tolist(),
                "branch": "iterative" if step.iterative else "prefix",
                "rounds": int(step.rounds),
                "committed": (start + np.flatnonzero(step.committed)).tolist(),
                "confidences": {int(start + size * m): round(float(step.confidence[m]), 6) for m in pool},
                "accepted": [a[a > 0].tolist() for a in accepted],
                "forwards": int(step.forwards),
            }
        )
    return steps
