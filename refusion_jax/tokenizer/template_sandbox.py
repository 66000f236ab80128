"""The Jinja environment of chat templates: what they may call, and how much they may make.

A template is a program that comes with a checkpoint. Jinja's sandbox keeps it from the interpreter and from
files. The limits here keep an expression such as `'a' * 10 ** 10` from filling the memory or the time of a
process.
"""

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

LARGEST = 1_000_000  # number in a call
MOST_BITS = 4096  # of a product or power
MOST_ELEMENTS = 10_000_000  # of all repetitions, replacements and joins of one rendering
STEP = 100  # elements that a step of `range` counts as
BUDGET = "__budget"  # the variable that holds a rendering's Budget
_WIDE = re.compile(r"[0-9]{6}")  # a width in a format


class Budget:
    """The elements that one rendering may still make."""

    def __init__(self):
        self._left = MOST_ELEMENTS

    def spend(self, elements: int, what: str) -> None:
        self._left -= max(elements, 0)
        if self._left < 0:
            raise SecurityError(f"{what}: too many elements")

    def range(self, *bounds: int) -> range:
        steps = range(*bounds)
        self.spend(STEP * len(steps), "range")
        return steps

    def spend_on_method(self, text: str, method: str, args: Any) -> None:
        """Pays for `text.replace(...)` or `text.join(...)` before it is called."""
        if method == "replace" and len(args) > 1 and all(isinstance(arg, str) for arg in args[:2]):
            self.spend(text.count(args[0]) * len(args[1]), "replace")
        elif method == "join" and args and isinstance(args[0], list | tuple | range):
            self.spend(len(text) * len(args[0]), "join")


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits on repetition, powers, widths and numbers given to functions.

    Templates are rendered with `variables()`.
    """

    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.filters = {name: _limited(name, function) for name, function in self.filters.items()}
        del self.globals["lipsum"]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%":
            if isinstance(left, str):
                _check_format(left, right)
        else:
            _check_bits(operator, left, right)
            for several, times in ((left, right), (right, left)):
                is_repetition = isinstance(several, str | list | tuple) and isinstance(times, int)
                if operator == "*" and is_repetition:
                    context[BUDGET].spend(len(several) * times, "repetition")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check_numbers(args, kwargs)
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            context[BUDGET].spend_on_method(owner, function.__name__, args)
        return super().call(context, function, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        if formatted is None:  # not the method `format` of a text
            return None

        def limited(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__)
            return formatted(*args, **kwargs)

        return limited


def variables() -> dict[str, Any]:
    """The variables of the sandbox itself for one rendering."""
    budget = Budget()
    return {BUDGET: budget, "range": budget.range}


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


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses large numbers, wide formats, and to replace or join more than the budget."""
    passed = getattr(function, "jinja_pass_arg", None)  # what Jinja passes before the value

    @jinja2.pass_context
    def limited(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        _check_numbers(args, kwargs)
        if name == "format":
            _check_format(str(value))
        elif name == "replace" and len(args) > 1:
            context[BUDGET].spend_on_method(str(value), name, args)
        elif name == "join" and args:
            context[BUDGET].spend_on_method(str(args[0]), name, (value,))
        first = {
            "context": (context,),
            "eval_context": (context.eval_ctx,),
            "environment": (context.environment,),
        }
        return function(*first.get(passed.name, ()) if passed else (), value, *args, **kwargs)

    return limited


def _check_numbers(args: Any, kwargs: Any) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int | float) and abs(value) > LARGEST:
            raise SecurityError(f"a number above {LARGEST:,} is passed to a function")


def _check_format(text: str, values: Any = ()) -> None:
    _check_numbers(values if isinstance(values, tuple) else (values,), {})
    if _WIDE.search(text):
        raise SecurityError("a format is too wide")


def _check_bits(operator: str, left: Any, right: Any) -> None:
    """Raises SecurityError if the integer left * right or left ** right is too large to be meant."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        bits = bits + right.bit_length() if operator == "*" else bits * max(right, 0)
        if bits > MOST_BITS:
            raise SecurityError(f"a number of more than {MOST_BITS:,} bits")


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own tojson escapes HTML characters, which must stay unchanged in a prompt.
    if isinstance(indent, int):
        _check_numbers((indent * 1000,), {})
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)
