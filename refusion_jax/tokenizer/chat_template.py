"""Chat templates: render conversations to prompt text, with Jinja's sandbox."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2

from refusion_jax.errors import BadInput
from refusion_jax.tokenizer.template_sandbox import environment
from refusion_jax.tokenizer.template_sandbox import variables as own_variables

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
    text = _default_template(template)
    try:
        compiled = environment().from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise BadInput(f"chat_template: line {error.lineno}: {error.message}") from error
    # Templates become Python code, whose compiler refuses what nests too deeply, with several exceptions.
    except Exception as error:
        raise BadInput(f"chat_template does not compile: {type(error).__name__}: {error}") from error

    def render(messages: Sequence[Message], **variables: Any) -> str:
        messages = check_messages(messages)
        if not messages:
            raise BadInput("messages is empty, expected at least one")
        try:
            given = {**_ALWAYS_GIVEN, **own_variables(), **variables, "messages": messages}
            return compiled.render(given)
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
