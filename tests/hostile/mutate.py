"""Valid values and files made hostile, by a seeded generator: bytes, trees of values, odd values."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

LONG = "x" * 70_000
URLS = ("http://127.0.0.1:9/x", "file:///etc/passwd", "/dev/zero", "@/dev/zero", "../..", "~x", "~root/x", "x" * 300)
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3.5, 10**30, -(10**30), 1e308, 5e-324, float("nan"), float("inf"), -float("inf")),
    *("", " ", "\n", "\0", "\ud83d", "\ufeff", "\u202ex", "\x1b]0;owned\x07", "[/]", "$\\frac{ $"),
    *("{{ 7 * 7 }}", "%s%n", "none", "auto", "self", *URLS),
    *("nan", "inf", "-inf", "1e999", "9" * 5000, "2001-99-99", "0x10", "null", "true", "a:b", "a=b", LONG, "@"),
    *([], {}, [[]], [None], {"": None}, {"a": []}, ["x", 1], {"$ref": "#"}, {"$ref": URLS[0]}, [LONG]),
)
PIECES = (
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\0", b"\xff", b"\xed\xa0\x80", b"\r", b"\n", b"\t", b"#"),
    *(b"null", b"NaN", b"1e999", b"-0", b"\\ud83d", b"&a", b"*a", b"!!int x", b"<<: *a", b"${x}", b"\n---\n"),
    *(b"\xef\xbb\xbf", b"version https://git-lfs.github.com/spec/v1\n", b"<html>", b"PK\x03\x04", b"\x1f\x8b"),
    *(b"9" * 5000, b"[" * 3000),
)


def deep(depth: int) -> Any:
    """A list within a list within a list ..."""
    out: Any = []
    for _ in range(depth):
        out = [out]
    return out


def odd_value(rng: random.Random) -> Any:
    return deep(rng.choice((50, 500))) if rng.random() < 0.03 else copy.deepcopy(rng.choice(ODD))


def odd_text(rng: random.Random) -> str:
    """A value as it may be typed on a command line."""
    value = odd_value(rng)
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("\0", "")  # no argument holds one


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """A copy of nested lists and mappings with one to three places changed."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            return odd_value(rng)
        holder, key = rng.choice(places)
        _change(rng, holder, key)
    return tree


def _places(tree: Any) -> Any:
    if isinstance(tree, dict):
        for key in tree:
            yield tree, key
            yield from _places(tree[key])
    elif isinstance(tree, list):
        for i in range(len(tree)):
            yield tree, i
            yield from _places(tree[i])


def _change(rng: random.Random, holder: Any, key: Any) -> None:
    how = rng.random()
    if how < 0.6:
        holder[key] = odd_value(rng)
    elif how < 0.75:
        del holder[key]
    elif how < 0.85 and isinstance(holder, dict):
        holder[rng.choice((f"{key}x", "", "\ud800", "__class__", "$ref", key.upper()))] = holder.pop(key)
    elif how < 0.93:
        holder[key] = [holder[key]]
    else:
        holder[key] = {"a": holder[key]}


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four places of a file changed, or its end cut off."""
    for _ in range(rng.randint(1, 4)):
        at, to = sorted(rng.randint(0, len(data)) for _ in range(2))
        how = rng.randrange(7)
        if how == 0:
            data = data[:at]
        elif how == 1:
            data = data[:at] + data[min(to, at + 40) :]
        elif how == 2:
            data = data[:to] + data[at : at + 2000] + data[to:]
        elif how == 3 and data:
            data = data[: max(0, at - 1)] + bytes([rng.randrange(256)]) + data[at:]
        else:
            data = data[:at] + rng.choice(PIECES) + data[at + rng.choice((0, 1, 5)) :]
    if rng.random() < 0.04:
        data = data.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32", "latin-1")), "replace")
    return data
