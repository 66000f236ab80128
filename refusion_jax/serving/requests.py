"""User requests: from JSON objects to checked requests with token ids.

A JSON request has an `id`, one of `prompt`, `messages` and `prompt_ids`, and optional settings that override
the defaults. Settings of other methods are ignored, so that one file serves all methods.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from refusion_jax.decode.batch import check_prompt
from refusion_jax.decode.config import quoted
from refusion_jax.errors import BadInput
from refusion_jax.serving.methods import METHODS, SETTINGS, Config
from refusion_jax.tokenizer import Tokenizer

PROMPTS = ("prompt", "messages", "prompt_ids")


@dataclasses.dataclass(frozen=True)
class Defaults:
    """The method, and the default settings of requests.

    Attributes:
      method: one of METHODS, the same for all requests.
      settings: the settings of the method.
      raw: feed a text prompt as it is, without the chat template.
      template: options of the chat template, such as `enable_thinking`.
      stop: texts that end an answer; its text is cut before the first of them.
      ahead: as in `decode.batch.Shape`; None chooses by batch size and device.
    """

    method: str
    settings: Mapping[str, Any]
    raw: bool = False
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stop: Sequence[str] = ()
    ahead: int | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked request.

    Attributes:
      id: text or an integer, repeated in the result.
      prompt: token ids.
      config: the settings of the method.
      trace: whether the result has a trace.
    """

    id: Any
    prompt: Sequence[int]
    config: Config
    trace: bool = False


def parse(raw: Any, defaults: Defaults, tokenizer: Tokenizer, vocab_size: int) -> Request:
    """The request in a JSON object.

    Args:
      raw: a parsed JSON value.
      vocab_size: of the model; prompt ids must be below it.

    Raises:
      BadInput: a field is missing, unknown or wrong; the message names it.
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
    own = {key: value for key, value in raw.items() if key not in ("id", "trace", *PROMPTS)}
    for key in own:
        if key not in SETTINGS:
            raise BadInput(f"unknown field {key!r}")
    known = {field.name for field in dataclasses.fields(METHODS[defaults.method])}
    settings = {key: value for key, value in {**defaults.settings, **own}.items() if key in known}
    # What feeds no masks never reads the logits of the one in a batch's padding, so EOS can replace it.
    needs_mask = tokenizer.mask_id is not None or feeds_masks(defaults.method, settings)
    mask_id = tokenizer.need_mask() if needs_mask else tokenizer.eos_id
    if "pad_id" in known:
        settings["pad_id"] = tokenizer.pad_id
    config = METHODS[defaults.method](mask_id=mask_id, eos_id=tokenizer.eos_ids, **settings)
    prompt = _encode(given[0], raw[given[0]], defaults, tokenizer)
    check_prompt(prompt, vocab_size)
    config.check_prompt(prompt)
    return Request(raw["id"], prompt, config, trace)


def feeds_masks(method: str, settings: Mapping[str, Any]) -> bool:
    """Whether a request with these settings feeds mask tokens to the model."""
    reads_masks = settings.get("first_token") == "mask" or settings.get("border") == "draft"
    looks_up = settings.get("verify") == "exact" and settings.get("draft_from") == "lookup"
    return reads_masks or (method != "ar" and not looks_up)


def is_id(value: Any) -> bool:
    """Whether a value can be the id of a request: text or an integer."""
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
