"""The Jinja environment of chat templates: what they may call, and how much they may make.

A template is a program that comes with a checkpoint. Jinja's sandbox keeps it from the interpreter and from
files. The limits here keep an expression such as `'a' * 10 ** 10` from filling the memory or the time of a
process.
"""

import functools
import json
import re
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from jinja2.sandbox import SecurityError

LARGEST = 1_000_000  # number in a call, and length of a repeated text or list
MOST_BITS = 4096  # of a product or power
MOST_STEPS = 100_000  # of all `range`s of a rendering
_WIDE = re.compile(r"[0-9]{6}")  # a width in a format


class Range:
    """`range` for one rendering, limited in total."""

    def __init__(self):
        self._left = MOST_STEPS

    def __call__(self, *bounds: int) -> range:
        steps = range(*bounds)
        self._left -= min(len(steps), MOST_STEPS + 1)
        if self._left < 0:
            raise SecurityError(f"range: more than {MOST_STEPS:,} steps in all")
        return steps


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits on repetition, powers, widths and numbers given to functions."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.filters = {name: _limited(function) for name, function in self.filters.items()}
        del self.globals["lipsum"]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%":
            if isinstance(left, str):
                _check_format(left, right)
        else:
            _check_size(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check_numbers(args, kwargs)
        return super().call(context, function, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        if formatted is None:  # not the method `format` of a text
            return None

        def limited(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__)
            return formatted(*args, **kwargs)

        return limited


class _Generation(jinja2.ext.Extension):
    """The tag `{% generation %}...{% endgeneration %}`: marks text of the model without changing it."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)  # variables set in the block are local to it


def environment() -> Sandbox:
    """The Jinja environment that published templates expect.

    Unlike in `transformers`, today's date (`strftime_now`) is undefined, so that the prompt of a request does
    not depend on the day. Templates allow for that (Llama 3 uses a fixed date). A caller who wants a date
    passes it as an option: `date_string`, or a function `strftime_now`.
    """
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation])
    sandbox.filters["tojson"] = _tojson
    sandbox.globals["raise_exception"] = _raise_exception
    return sandbox


def _limited(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses large numbers, and large widths in the format that is its first argument."""

    @functools.wraps(function)  # keeps Jinja's marks of what is passed
    def limited(*args: Any, **kwargs: Any) -> Any:
        _check_numbers(args[1:], kwargs)
        if function.__name__ == "do_format":
            _check_format(str(args[0]))
        return function(*args, **kwargs)

    return limited


def _check_numbers(args: Any, kwargs: Any) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int | float) and abs(value) > LARGEST:
            raise SecurityError(f"a number above {LARGEST:,} is passed to a function")


def _check_format(text: str, values: Any = ()) -> None:
    _check_numbers(values if isinstance(values, tuple) else (values,), {})
    if _WIDE.search(text):
        raise SecurityError("a format is too wide")


def _check_size(operator: str, left: Any, right: Any) -> None:
    """Raises SecurityError if left * right or left ** right is too large to be meant."""
    if isinstance(left, int) and isinstance(right, int):
        left_bits, right_bits = left.bit_length(), right.bit_length()
        bits = left_bits + right_bits if operator == "*" else left_bits * max(right, 0)
        if bits > MOST_BITS:
            raise SecurityError(f"a number of more than {MOST_BITS:,} bits")
    for several, times in ((left, right), (right, left)):
        repeats = operator == "*" and isinstance(several, str | list | tuple) and isinstance(times, int)
        if repeats and len(several) * times > LARGEST:
            raise SecurityError(f"a repetition of more than {LARGEST:,} elements")


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own tojson escapes HTML characters, which must stay unchanged in a prompt.
    if isinstance(indent, int):
        _check_numbers((indent * 1000,), {})
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)
