"""Mutated files and hostile completions for benchmarks.faults, as functions of given random numbers."""

import json
import random
from typing import Any

ODD = (None, True, -1, 0, 3, 1e308, 2**63, 1.5, "", "none", "x" * 5000, [], {}, [[]], {"a": 1}, float("nan"))


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The content with one mutation: changed bytes or, for JSON, a changed value or name."""
    while True:
        other = _json_lines(content, draw) if draw.random() < 0.5 else None
        other = _bytes(content, draw) if other is None else other
        if other != content:
            return other


def _bytes(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    end = min(len(content), at + draw.choice((1, 4, 64, len(content) // 4 + 1)))
    kind = draw.choice(("flip", "flip", "byte", "insert", "delete", "cut", "repeat", "zero"))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    middle = {
        "byte": draw.randbytes(1) + content[at + 1 : end],
        "insert": draw.randbytes(draw.choice((1, 8))) + content[at:end],
        "delete": b"",
        "cut": b"",
        "repeat": 2 * content[at:end],
        "zero": bytes(end - at),
    }[kind]
    return content[:at] + middle + (b"" if kind == "cut" else content[end:])


def _json_lines(content: bytes, draw: random.Random) -> bytes | None:
    """Change one value or name of a JSON file, or of one line; None if it is not JSON."""
    lines = content.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    for first, last in ((0, len(lines)), (at, at + 1)):
        try:
            value = json.loads(b"".join(lines[first:last]))
        except ValueError:
            continue
        if isinstance(value, dict | list) and value:
            text = "[" * 100_000 if draw.random() < 0.03 else json.dumps(_altered(value, draw))
            return b"".join([*lines[:first], text.encode() + b"\n", *lines[last:]])
    return None


def _altered(value: Any, draw: random.Random) -> Any:
    """The same with one part changed."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.1:
        return draw.choice(ODD)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, copy = draw.choice(keys), value.copy()
    kind = draw.choice(("inside", "inside", "inside", "drop", "rename", "digit"))
    if kind == "drop":
        del copy[key]
    elif kind == "rename" and isinstance(key, str):
        copy[f"{key}_"] = copy.pop(key)
    elif kind == "digit" and isinstance(value[key], int | float):
        copy[key] = value[key] * 2 + 1
    else:
        copy[key] = _altered(value[key], draw)
    return copy


PIECES = (
    *("####", "\\boxed{", "}", "{", "<answer>", "</answer>", "<think>", "</think>", "answer is", "The answer is ("),
    *("Answer:", "Final answer", "True", "Unknown", "A", "(B)", "**", "$", "%", ",", ".", "-", "−", "+", "*", "//"),
    *("1/0", "(", ")", "1e999", "٣", "½", "²", "0" * 400, "9" * 5000, "\n", "\r\n", "\t", " " * 200, "\x00", "\u2028"),
    *("é", "\ud800", "\U0001f600", "=", "1 2 3", "(1+2)*3", "\\frac{1}{2}", "\\text{", "``", "=" * 50, "nan", "0x1F"),
)
LONGEST = 20_000  # characters: a thousand tokens are rarely more


def hostile_completion(draw: random.Random, pieces: tuple[str, ...] = PIECES) -> str:
    """Text that no model should write but some will: endless markers, power towers, digits of any script."""
    return _hostile(draw, pieces)[:LONGEST]


def _hostile(draw: random.Random, pieces: tuple[str, ...]) -> str:
    kind = draw.randrange(4)
    if kind == 0:
        return draw.choice(pieces) * draw.choice((1, 10, 1000, 4000))
    if kind == 1:
        return "".join(draw.choices(pieces, k=draw.choice((3, 30, 300))))
    if kind == 2:
        return (draw.choice(pieces) + draw.choice(pieces)) * draw.choice((10, 1000)) + draw.choice(pieces)
    depth, (left, right) = draw.choice((5, 100, 3000)), draw.choice((("(", ")"), ("{", "}"), ("<answer>", "</answer>")))
    return draw.choice(pieces) + left * depth + draw.choice(pieces) + right * draw.choice((depth, depth - 1))
