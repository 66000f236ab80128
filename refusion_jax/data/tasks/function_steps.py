"""The steps of which the functions of the task `functions` are made: wordings, code and reference."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# Kind of value -> its variable in the code, and its name in a query.
VARIABLES = {"list": "xs", "text": "s", "number": "n"}
NOUNS = {"list": "a list xs of whole numbers", "text": "a string s", "number": "a whole number n"}


class Step(NamedTuple):
    """One step that transforms a value.

    Attributes:
      takes, gives: kinds of the input and the output, keys of VARIABLES.
      code: Python expression in the variable of the input; `{k}` stands for the parameter.
      run: the same computation, (value, k) -> value.
      choices: possible values of k; (None,) for a step without a parameter.
      wordings: descriptions of the step in a query.
    """

    takes: str
    gives: str
    code: str
    run: Callable[[Any, Any], Any]
    choices: Sequence[Any]
    wordings: Sequence[str]


_NONE = (None,)
_SMALL, _LOW = range(2, 10), range(1, 4)
_LETTERS = "aeilnorst"
_VOWELS = "aeiou"

# fmt: off
STEPS = {
    # list -> list
    "even": Step("list", "list", "[x for x in xs if x % 2 == 0]",
        lambda xs, k: [x for x in xs if x % 2 == 0],
        _NONE, ("keep the even numbers", "drop the odd numbers")),
    "odd": Step("list", "list", "[x for x in xs if x % 2 == 1]",
        lambda xs, k: [x for x in xs if x % 2 == 1],
        _NONE, ("keep the odd numbers", "drop the even numbers")),
    "above": Step("list", "list", "[x for x in xs if x > {k}]",
        lambda xs, k: [x for x in xs if x > k],
        range(10), ("keep the numbers above {k}", "drop all numbers up to {k}")),
    "below": Step("list", "list", "[x for x in xs if x < {k}]",
        lambda xs, k: [x for x in xs if x < k],
        range(2, 13), ("keep the numbers below {k}", "drop all numbers from {k} up")),
    "multiples": Step("list", "list", "[x for x in xs if x % {k} == 0]",
        lambda xs, k: [x for x in xs if x % k == 0],
        range(3, 7), ("keep the multiples of {k}", "keep what {k} divides")),
    "not": Step("list", "list", "[x for x in xs if x != {k}]",
        lambda xs, k: [x for x in xs if x != k],
        range(1, 7), ("drop every {k}", "remove all numbers equal to {k}")),
    "add": Step("list", "list", "[x + {k} for x in xs]",
        lambda xs, k: [x + k for x in xs], _SMALL, ("add {k} to each", "raise every number by {k}")),
    "take": Step("list", "list", "[x - {k} for x in xs]",
        lambda xs, k: [x - k for x in xs], _SMALL, ("subtract {k} from each", "lower every number by {k}")),
    "times": Step("list", "list", "[x * {k} for x in xs]",
        lambda xs, k: [x * k for x in xs],
        _SMALL, ("multiply each by {k}", "make every number {k} times as large")),
    "squares": Step("list", "list", "[x * x for x in xs]",
        lambda xs, k: [x * x for x in xs], _NONE, ("square each", "replace every number by its square")),
    "negate": Step("list", "list", "[-x for x in xs]",
        lambda xs, k: [-x for x in xs], _NONE, ("negate each", "flip every sign")),
    "sizes": Step("list", "list", "[abs(x) for x in xs]",
        lambda xs, k: [abs(x) for x in xs], _NONE, ("take absolute values", "drop every minus sign")),
    "sort": Step("list", "list", "sorted(xs)",
        lambda xs, k: sorted(xs), _NONE, ("sort ascending", "sort from low to high")),
    "fall": Step("list", "list", "sorted(xs, reverse=True)",
        lambda xs, k: sorted(xs, reverse=True), _NONE, ("sort descending", "sort from high to low")),
    "turn": Step("list", "list", "xs[::-1]",
        lambda xs, k: xs[::-1], _NONE, ("reverse the list", "turn the order around")),
    "once": Step("list", "list", "list(dict.fromkeys(xs))",
        lambda xs, k: list(dict.fromkeys(xs)),
        _NONE, ("remove repeats", "keep each number only the first time")),
    "first": Step("list", "list", "xs[:{k}]",
        lambda xs, k: xs[:k], range(2, 6), ("keep the first {k} numbers", "cut the list after {k} numbers")),
    "last": Step("list", "list", "xs[-{k}:]",
        lambda xs, k: xs[-k:], range(2, 6), ("keep the last {k} numbers", "keep {k} numbers at the end")),
    "skip": Step("list", "list", "xs[{k}:]",
        lambda xs, k: xs[k:], _LOW, ("skip the first {k} of the list", "drop {k} from its start")),
    "second": Step("list", "list", "xs[::2]",
        lambda xs, k: xs[::2],
        _NONE, ("keep every second number, from the first on", "drop every other number")),
    # list -> number
    "sum": Step("list", "number", "sum(xs)",
        lambda xs, k: sum(xs), _NONE, ("add them up", "take the sum")),
    "count": Step("list", "number", "len(xs)",
        lambda xs, k: len(xs), _NONE, ("count the numbers", "take the length of the list")),
    "largest": Step("list", "number", "max(xs, default=0)",
        lambda xs, k: max(xs, default=0),
        _NONE, ("take the largest (0 if there is none)", "take the maximum, or 0 of nothing")),
    "smallest": Step("list", "number", "min(xs, default=0)",
        lambda xs, k: min(xs, default=0),
        _NONE, ("take the smallest (0 if there is none)", "take the minimum, or 0 of nothing")),
    "distinct": Step("list", "number", "len(set(xs))",
        lambda xs, k: len(set(xs)), _NONE, ("count the different numbers", "count numbers without repeats")),
    "matches": Step("list", "number", "xs.count({k})",
        lambda xs, k: xs.count(k), _SMALL, ("count how often {k} is there", "count the {k}s")),
    # number -> number
    "plus": Step("number", "number", "n + {k}",
        lambda n, k: n + k, _SMALL, ("add {k}", "go up by {k}")),
    "minus": Step("number", "number", "n - {k}",
        lambda n, k: n - k, _SMALL, ("subtract {k}", "go down by {k}")),
    "fold": Step("number", "number", "n * {k}",
        lambda n, k: n * k, _SMALL, ("multiply by {k}", "take {k} times it")),
    "over": Step("number", "number", "n // {k}",
        lambda n, k: n // k, _SMALL, ("divide by {k} and round down", "floor-divide by {k}")),
    "rest": Step("number", "number", "n % {k}",
        lambda n, k: n % k, _SMALL, ("take the remainder modulo {k}", "reduce it modulo {k}")),
    "square": Step("number", "number", "n * n",
        lambda n, k: n * n, _NONE, ("square it", "multiply it by itself")),
    "size": Step("number", "number", "abs(n)",
        lambda n, k: abs(n), _NONE, ("take the absolute value", "drop its minus sign")),
    "least": Step("number", "number", "max(n, {k})",
        lambda n, k: max(n, k), _SMALL, ("make it at least {k}", "raise it to {k} if it is less")),
    "most": Step("number", "number", "min(n, {k}0)",
        lambda n, k: min(n, 10 * k), _SMALL, ("make it at most {k}0", "lower it to {k}0 if it is more")),
    # number -> list
    "digits": Step("number", "list", "[int(d) for d in str(abs(n))]",
        lambda n, k: [int(d) for d in str(abs(n))],
        _NONE, ("list its digits", "split it into its digits, without the sign")),
    # text -> text
    "upper": Step("text", "text", "s.upper()",
        lambda s, k: s.upper(), _NONE, ("make it upper case", "capitalise all")),
    "back": Step("text", "text", "s[::-1]",
        lambda s, k: s[::-1], _NONE, ("reverse it", "write it backwards")),
    "start": Step("text", "text", "s[:{k}]",
        lambda s, k: s[:k], range(2, 9), ("keep the first {k} characters", "cut it after {k} characters")),
    "end": Step("text", "text", "s[-{k}:]",
        lambda s, k: s[-k:], range(2, 9), ("keep the last {k} characters", "keep {k} characters at the end")),
    "behead": Step("text", "text", "s[{k}:]",
        lambda s, k: s[k:], _LOW, ("skip the first {k} characters", "drop {k} characters from the start")),
    "without": Step("text", "text", 's.replace("{k}", "")',
        lambda s, k: s.replace(k, ""), _LETTERS, ('remove every "{k}"', 'delete the letter "{k}"')),
    "star": Step("text", "text", 's.replace("{k}", "*")',
        lambda s, k: s.replace(k, "*"), _LETTERS, ('replace "{k}" by "*"', 'write "*" for every "{k}"')),
    "consonants": Step("text", "text", '"".join(c for c in s if c not in "aeiou")',
        lambda s, k: "".join(c for c in s if c not in _VOWELS),
        _NONE, ("remove the vowels a, e, i, o, u", "drop all lower-case vowels")),
    "double": Step("text", "text", '"".join(c + c for c in s)',
        lambda s, k: "".join(c + c for c in s),
        _NONE, ("double every character", "write each character twice")),
    "repeat": Step("text", "text", "s * {k}",
        lambda s, k: s * k, range(2, 4), ("repeat it {k} times", "write it {k} times in a row")),
    "words": Step("text", "text", '" ".join(s.split()[::-1])',
        lambda s, k: " ".join(s.split()[::-1]),
        _NONE, ("reverse the order of its words", "put its last word first and so on")),
    "ordered": Step("text", "text", '"".join(sorted(s))',
        lambda s, k: "".join(sorted(s)), _NONE, ("sort its characters", "put its characters in order")),
    "dense": Step("text", "text", 's.replace(" ", "")',
        lambda s, k: s.replace(" ", ""), _NONE, ("remove the spaces", "close all gaps")),
    # text -> number
    "length": Step("text", "number", "len(s)",
        lambda s, k: len(s), _NONE, ("count its characters", "take its length")),
    "letter": Step("text", "number", 's.count("{k}")',
        lambda s, k: s.count(k), _LETTERS, ('count every "{k}"', 'count how often "{k}" is there')),
    "parts": Step("text", "number", "len(s.split())",
        lambda s, k: len(s.split()), _NONE, ("count its words", "take the number of words")),
    # text -> list
    "lengths": Step("text", "list", "[len(w) for w in s.split()]",
        lambda s, k: [len(w) for w in s.split()],
        _NONE, ("list the lengths of its words", "replace each word by its length")),
}
# fmt: on
