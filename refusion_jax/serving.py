"""Requests in, results out: what `sample` and `evaluate` do with a loaded model.

A request is a JSON object: `id`, one of `prompt`, `messages` and `prompt_ids`, and settings that
override the defaults. Settings of another method are passed over, so that one file serves them all. A
request that cannot be served gets a result with `error`, and the others go on.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from refusion_jax import decode
from refusion_jax.baselines import ar
from refusion_jax.errors import BadInput
from refusion_jax.requests import DecodeConfig, Shape, check_prompt, shown
from refusion_jax.samples import Samples
from refusion_jax.tokenizer import Tokenizer

PROMPTS = ("prompt", "messages", "prompt_ids")


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a request may leave out.

    Attributes:
      method: "refusion" or "ar", the same for all requests.
      settings: fields of DecodeConfig or ARConfig, without the special ids.
      raw: a text prompt is fed as it is, without the chat template.
      template: options of the chat template, as `enable_thinking`.
      stop: the answer's text ends before the first of these.
    """

    method: str
    settings: Mapping[str, Any]
    raw: bool = False
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stop: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Request:
    """A request that can be served: its id, prompt tokens, settings, and whether to trace it."""

    id: Any
    prompt: Sequence[int]
    config: DecodeConfig | ar.ARConfig
    trace: bool = False


def parse(raw: Any, defaults: Defaults, tokenizer: Tokenizer, vocab_size: int) -> Request:
    """A request from its JSON object.

    Raises:
      BadInput: naming the field that is missing, unknown or wrong.
    """
    if not isinstance(raw, dict):
        raise BadInput(f"a request must be a JSON object, found {type(raw).__name__}")
    if not is_id(raw.get("id")):
        raise BadInput(f"id must be text or a whole number, found {shown(raw.get('id'))}")
    given = [field for field in PROMPTS if field in raw]
    if len(given) != 1:
        raise BadInput(f"exactly one of {', '.join(PROMPTS)} is needed, found {given or 'none'}")
    trace = raw.get("trace", False)
    if not isinstance(trace, bool):
        raise BadInput(f"trace must be true or false, found {shown(trace)}")
    config_class = ar.ARConfig if defaults.method == "ar" else DecodeConfig
    own = {key: value for key, value in raw.items() if key not in ("id", "trace", *PROMPTS)}
    every = {field.name for cls in (DecodeConfig, ar.ARConfig) for field in dataclasses.fields(cls)}
    for key in own:
        if key not in every - {"mask_id", "eos_id"}:
            raise BadInput(f"unknown field {key!r}")
    fields = {field.name for field in dataclasses.fields(config_class)}
    settings = {key: value for key, value in {**defaults.settings, **own}.items() if key in fields}
    feeds_mask = config_class is DecodeConfig or settings.get("first_token") == "mask"
    # Where no mask is ever read any token serves as the one that is fed.
    mask_id = tokenizer.need_mask() if feeds_mask or tokenizer.mask_id is not None else tokenizer.eos_id
    config = config_class(mask_id=mask_id, eos_id=tokenizer.eos_id, **settings)
    prompt = _encode(given[0], raw[given[0]], defaults, tokenizer)
    check_prompt(prompt, vocab_size)
    if isinstance(config, ar.ARConfig):
        config.check_prompt(prompt)
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
            f"{kind} must be {'text' if wanted is str else 'a list of messages'}, found {shown(value)}"
        )
    return tokenizer.encode_prompt(value, raw=defaults.raw, **defaults.template)


def fitting_shape(requests: Sequence[Request], batch_size: int) -> Shape:
    """One padded shape for all the requests, so that one compilation serves them."""
    prompts, configs = [r.prompt for r in requests], [r.config for r in requests]
    exact = Shape.exact if isinstance(configs[0], DecodeConfig) else ar.exact_shape
    return exact(prompts, configs).padded(batch_size, trace=any(r.trace for r in requests))


def serve(
    model, params, tokenizer: Tokenizer, requests: Sequence[Request], shape: Shape, stop: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Results in the order of the requests, `shape.rows` decoded at a time."""
    for start in range(0, len(requests), shape.rows):
        batch = requests[start : start + shape.rows]
        method = decode if isinstance(batch[0].config, DecodeConfig) else ar
        samples = method.sample(
            model, params, [r.prompt for r in batch], [r.config for r in batch], shape=shape
        )
        samples = jax.device_get(samples)
        for row, request in enumerate(batch):
            yield result(request, jax.tree.map(lambda x, row=row: x[row], samples), tokenizer, stop)


def warm_up(model, params, config: DecodeConfig | ar.ARConfig, shape: Shape, streamed: bool = False) -> None:
    """Compiles what decoding at `shape` takes, by decoding one token; `streamed` as `decode.stream` does."""
    prompts = [[config.mask_id]]
    if isinstance(config, ar.ARConfig):
        config = dataclasses.replace(config, gen_length=1)
        jax.block_until_ready(ar.sample(model, params, prompts, config, shape=shape))
        return
    config = dataclasses.replace(config, gen_length=1, slot_size=1, num_blocks=1)
    if streamed:
        batch = decode.prepare(model, prompts, config, shape)
        *_, state = decode.stream(model, params, batch)
        jax.block_until_ready(decode.finish(state, batch))
    else:
        jax.block_until_ready(decode.sample(model, params, prompts, config, shape=shape))


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

    `confidences` are of the slots in the pool, by the position of their first token. Decoding left to
    right has no plans.
    """
    if samples.trace is None or isinstance(request.config, ar.ARConfig):
        return []
    steps, size = [], request.config.slot_size
    for i in range(int(samples.num_iterations)):
        step = jax.tree.map(lambda x, i=i: x[i], samples.trace)
        start = len(request.prompt) + int(step.block) * request.config.block_len
        pool = np.flatnonzero(step.confidence >= 0)
        steps.append(
            {
                "block": int(step.block),
                "planned": (start + size * np.flatnonzero(step.planned)).tolist(),
                "branch": "iterative" if step.iterative else "prefix",
                "rounds": int(step.rounds),
                "committed": (start + np.flatnonzero(step.committed)).tolist(),
                "confidences": {int(start + size * m): round(float(step.confidence[m]), 6) for m in pool},
                "forwards": int(step.forwards),
            }
        )
    return steps
