"""Input that nobody meant: messages and JSON with a few things changed, from a seed."""

from __future__ import annotations

import json

ODD = [
    None, True, -1, 0, 2**63, 2**70, 1e308, 1.5, "", "..", "../../etc/passwd", "/etc/passwd", "\ud800", "a" * 5000, [], {},
    [[]], {"x": 1}, "t@", "\x00",
]  # fmt: skip
NUMBERS = (
    b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",
    b"\xff" * 9 + b"\x01",
    b"\xff\xff\xff\xff\x07",
    b"\x80\x80\x80\x80\x10",
)
"""2**63, 2**64 - 1, 2**31 - 1, 2**32 as varints."""


def mutated_bytes(rng, raw):
    """A message with one to four places changed, bytes put in, cut out or repeated."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw) + 1)
        match rng.randrange(6):
            case 0 if raw:
                raw[at % len(raw)] = rng.randrange(256)
            case 1:
                raw[at:at] = rng.randbytes(rng.randint(1, 12))
            case 2:
                del raw[at : at + rng.randint(1, 12)]
            case 3:
                raw[at:at] = rng.choice(NUMBERS)
            case 4:
                raw += raw[: rng.randint(0, len(raw))]
            case _:
                raw = raw[: rng.randint(0, len(raw))]
    return bytes(raw)


def mutated_json(rng, values):
    """The values with one thing taken away, renamed, or replaced by something odd."""
    values = json.loads(json.dumps(values))
    path = rng.choice([each for each in _places(values) if each])
    holder = values
    for key in path[:-1]:
        holder = holder[key]
    match rng.randrange(4):
        case 0 if isinstance(holder, dict):
            del holder[path[-1]]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(("x", "..", "\ud800", "a/b", ""))] = holder.pop(path[-1])
        case _:
            holder[path[-1]] = rng.choice(ODD)
    return values


def _places(values, path=()):
    yield path
    children = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in children:
        yield from _places(value, (*path, key))
