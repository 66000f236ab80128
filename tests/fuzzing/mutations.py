"""Seeded mutations of bytes, texts and JSON values that know the structure of what they damage."""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

NUMBERS = (
    *(0, -1, 1, 2, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63)),
    *(10**12, 10**30, 10**400, -(10**400), 0.5, -0.0, 3.0, 1e-300, 1e308, -1e308),
    *(float("nan"), float("inf"), -float("inf")),
)
TEXTS = (
    *("", " ", ".", "..", "../../../etc/passwd", "/etc/passwd", "../outside", "a/../../outside", "\\", "\n"),
    *(
        "\x00",
        "a\x00b",
        "\ud800",
        "\udfff!",
        "\ufeff",
        "🙂",
        "e\u0301",
        "x" * 20_000,
        "%s%n",
        "{0}",
        "{{",
        "##",
    ),
    *(
        "nan",
        "1e999",
        "-1",
        "0x10",
        "true",
        "null",
        "F64",
        "I8",
        "F8_E4M3",
        "model.safetensors",
        "config.json",
    ),
)
DEEP = "@deeply nested@"  # replaced in the JSON text, since no Python object nests as deeply
TWICE = "@twice@"  # removed from keys in the JSON text, which leaves a key there twice


def mutate_json(rng: random.Random, value: Any) -> str:
    """The text of a JSON value with one to three changes."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _changed(rng, value)
    text = json.dumps(value).replace(TWICE, "")
    if DEEP in text:
        depth = rng.choice((100, 900, 3000, 30_000))
        left, right = rng.choice((("[", "]"), ('{"a":', "}")))
        text = text.replace(f'"{DEEP}"', left * depth + "1" + right * depth)
    return text


def _changed(rng: random.Random, value: Any) -> Any:
    """The value with one node changed. Its containers are changed in place."""
    places = _places(value)
    if not places:
        return junk(rng)
    parent, key = rng.choice(places)
    change = rng.randrange(9)
    if change <= 2:
        parent[key] = junk(rng)
    elif change == 3:
        del parent[key]
    elif change == 4 and isinstance(parent, dict):
        parent[rng.choice((TWICE + key, key + "x", *TEXTS))] = rng.choice((parent[key], junk(rng)))
    elif change == 4:
        parent.insert(rng.randrange(len(parent) + 1), parent[key])
    elif change == 5:
        other, place = rng.choice(places)
        # Deep copies: a node must not come to contain itself.
        parent[key] = json.loads(json.dumps(other[place])) if place in _keys(other) else None
    elif change == 6:
        parent[key] = _near(rng, parent[key])
    elif change == 7:
        parent[key] = rng.choice(
            ([parent[key]], {"content": parent[key]}, [parent[key]] * 2, str(parent[key]))
        )
    else:
        parent[key] = DEEP if rng.random() < 0.2 else junk(rng)
    return value


def _keys(container: Any) -> Any:
    return container if isinstance(container, dict) else range(len(container))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every node below the root; of long containers a start, a middle and an end."""
    places, left = [], [value]
    while left:
        node = left.pop()
        if isinstance(node, dict | list):
            keys = list(_keys(node))
            if len(keys) > 40:
                keys = keys[:6] + keys[len(keys) // 2 :][:3] + keys[-6:]
            places += [(node, key) for key in keys]
            left += [node[key] for key in keys]
    return places


def _near(rng: random.Random, value: Any) -> Any:
    """A value close to a valid one."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int) and abs(value) > 2**64:
        return -value
    if isinstance(value, int | float):
        return rng.choice((value + 1, value - 1, -value, value * 2, value + 0.5, float(value), value * 10**9))
    if isinstance(value, str):
        return mutate_text(rng, value)
    return value[:-1] if isinstance(value, list) else dict(list(value.items())[:-1])


def junk(rng: random.Random) -> Any:
    """A JSON value that rarely fits."""
    kind = rng.randrange(8)
    if kind <= 2:
        return rng.choice(NUMBERS)
    if kind <= 4:
        return rng.choice(TEXTS)
    return rng.choice((None, True, False, [], {}, [None], [[]], {"a": 1}, [1, "a"], {"": {}}, [0] * 1000))


def mutate_text(rng: random.Random, text: str, snippets: tuple[str, ...] = TEXTS) -> str:
    """A text with a part deleted, repeated, moved or replaced, or a snippet inserted."""
    start = rng.randrange(len(text) + 1)
    end = min(len(text), start + rng.choice((1, 1, 2, 5, 20, len(text))))
    part = text[start:end]
    change = rng.randrange(5)
    if change == 0:
        return text[:start] + text[end:]
    if change == 1:
        return text[:end] + part * rng.choice((1, 2, 10)) + text[end:]
    if change == 2:
        place = rng.randrange(len(text) + 1)
        return text[:place] + part + text[place:]
    if change == 3:
        return text[:start] + rng.choice(snippets) + text[start:]
    return text[:start] + chr(rng.choice((0, 9, 10, 34, 37, 123, 125, 127, 0x2028, 0x1F642))) + text[end:]


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes with one to four changes: cut, flipped bits, numbers overwritten, parts deleted or repeated."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = rng.choice(_BYTES)(rng, data)
    return data


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _flip(rng: random.Random, data: bytes) -> bytes:
    if not data:
        return b"\xff"
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def _overwrite(rng: random.Random, data: bytes) -> bytes:
    new = rng.choice(
        [
            *(struct.pack("<Q", value) for value in (0, 1, 2**16, 2**31, 2**40, 2**63, 2**64 - 1)),
            *(struct.pack("<I", value) for value in (0, 1, 2**16, 2**31, 2**32 - 1)),
            *(b"\xff", b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\xc3", b"\xef\xbb\xbf"),
        ]
    )
    place = rng.randrange(len(data) + 1)
    return data[:place] + new + data[place + len(new) :]


def _delete(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + data[place + rng.choice((1, 4, 8, 64)) :]


def _repeat(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + data[place : place + rng.choice((1, 8, 64))] * 2 + data[place:]


def _insert(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.randbytes(rng.choice((1, 4, 8))) + data[place:]


_BYTES: tuple[Callable[[random.Random, bytes], bytes], ...] = (_cut, _flip, _flip, _overwrite, _overwrite)
_BYTES += (_delete, _repeat, _insert)
