"""Chat templates: conversations to prompt text, with Jinja in its sandbox."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from refusion_jax.errors import BadInput

Message = Mapping[str, str]  # {"role": ..., "content": ...}


def check_messages(messages: Sequence[Message]) -> list[Message]:
    """The messages as a list; raises BadInput unless each has a role and a content, both text."""
    for number, message in enumerate(messages):
        for field in "role", "content":
            value = message.get(field) if isinstance(message, Mapping) else None
            if not isinstance(value, str):
                raise BadInput(f"messages[{number}].{field} is {value!r}, expected text")
    return list(messages)


def compile_template(template: Any) -> Callable[..., str]:
    """A function `(messages, **variables) -> text` from the value of a `chat_template` setting.

    The value is text, or a list of `{"name": ..., "template": ...}` of which "default" (or the only
    one) is taken. Raises BadInput when it is neither, when it does not parse, and, in rendering,
    for whatever the template itself raises.
    """
    try:
        compiled = _environment().from_string(_default_template(template))
    except jinja2.TemplateSyntaxError as error:
        raise BadInput(f"chat_template: line {error.lineno}: {error.message}") from error

    def render(messages: Sequence[Message], **variables: Any) -> str:
        messages = check_messages(messages)
        try:
            return compiled.render(messages=messages, **variables)
        # The template is a program that came with the checkpoint: whatever it raises, it is input.
        except Exception as error:
            raise BadInput(f"chat_template failed: {type(error).__name__}: {error}") from error

    return render


def _default_template(template: Any) -> str:
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default", next(iter(named.values())) if len(named) == 1 else None)
    if not isinstance(template, str):
        raise BadInput("chat_template: expected text, or a list of {name, template} with a 'default'")
    return template


def _environment() -> jinja2.Environment:
    """The settings and names that published templates are written for.

    Today's date (`strftime_now`) is left undefined, which templates allow for: the prompt of a
    request must not depend on the day it is run.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # jinja's own tojson escapes HTML characters, which a prompt must keep.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)
