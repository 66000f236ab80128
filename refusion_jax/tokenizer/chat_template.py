"""Chat templates: render conversations to prompt text, with Jinja's sandbox."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from refusion_jax.errors import BadInput

Message = Mapping[str, str]  # {"role": ..., "content": ...}

# Variables that templates test for none without testing whether they are defined.
_ALWAYS_GIVEN = {"tools": None, "documents": None, "add_generation_prompt": True}


def check_messages(messages: Sequence[Message]) -> list[Message]:
    """The messages as a list. Raises BadInput unless each has a role and a content, both text."""
    for number, message in enumerate(messages):
        for field in "role", "content":
            value = message.get(field) if isinstance(message, Mapping) else None
            if not isinstance(value, str):
                raise BadInput(f"messages[{number}].{field} is {value!r}, expected text")
    return list(messages)


def compile_template(template: Any) -> Callable[..., str]:
    """Compiles a `chat_template` setting to a function `(messages, **variables) -> text`.

    Args:
      template: a template as text, or a list of `{"name": ..., "template": ...}`, from which "default" (or
        the only one) is taken.

    Raises:
      BadInput: `template` is neither, or does not parse. The returned function raises it for any error that
        the template raises.
    """
    try:
        compiled = _environment().from_string(_default_template(template))
    except jinja2.TemplateSyntaxError as error:
        raise BadInput(f"chat_template: line {error.lineno}: {error.message}") from error

    def render(messages: Sequence[Message], **variables: Any) -> str:
        messages = check_messages(messages)
        if not messages:
            raise BadInput("messages is empty, expected at least one")
        try:
            return compiled.render(**{**_ALWAYS_GIVEN, **variables, "messages": messages})
        # The template is a program that comes with the checkpoint, so any exception is an error of the input.
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


class _Generation(jinja2.ext.Extension):
    """The tag `{% generation %}...{% endgeneration %}`: marks text of the model without changing it."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)  # variables set in the block are local to it


def _environment() -> jinja2.Environment:
    """The Jinja environment that published templates expect.

    Unlike in `transformers`, today's date (`strftime_now`) is undefined, so that the prompt of a request does
    not depend on the day. Templates allow for that (Llama 3 uses a fixed date). A caller who wants a date
    passes it as an option: `date_string`, or a function `strftime_now`.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own tojson escapes HTML characters, which must stay unchanged in a prompt.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)
