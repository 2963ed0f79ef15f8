"""Untrusted text of models, files and servers made safe to display: no terminal control sequences, bounded length."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from unicodedata import category

_BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # they reorder a whole line
_PASSWORD = re.compile(r"(?<=//)[^/@\s'\"]*@")  # of a URL
LONGEST_LINE = 2000  # characters of one line of an error or a note
NAMES = 8  # in one message
MOST_REASONS = 10  # why rows were left out; the rows themselves are listed in findings.json
_NUMBER = re.compile(r"\d[\d,.]*")


def clean(text: str) -> str:
    """Text without control characters, unpaired surrogates and marks that reorder a line; line breaks and tabs stay."""
    return "".join(
        char for char in text if char in "\n\t" or not (category(char) in ("Cc", "Cs") or char in _BIDIRECTIONAL)
    )


def shorten(text: str, most: int) -> str:
    """At most ``most`` characters of a text: its beginning and its end, which is often the most informative."""
    if len(text) <= most:
        return text
    tail = most // 4
    return f"{text[: most - tail - 5]} ... {text[-tail:]}"


def one_line(text: str, most: int = LONGEST_LINE) -> str:
    """Text as one line: cleaned, white space joined, bounded."""
    if len(text) > 4 * most:  # skip what is cut below
        text = shorten(text, 4 * most)
    joined = " ".join(text.split())
    return shorten("".join(char if char.isprintable() and char not in _BIDIRECTIONAL else " " for char in joined), most)


def brief(value: object, most: int = 40) -> str:
    """A JSON value or a text as one line, for messages."""
    return one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), most)


def listed(names: Sequence[str], most: int = NAMES) -> str:
    """Names in quotes, as many as fit into a message."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(map(repr, names[:most])) or '(none)'}{more}"


def without_secrets(text: str, *secrets: str | None) -> str:
    """Text without keys that a server may repeat, and without the user and password of a URL."""
    for secret in secrets:
        if secret and len(secret) > 3:
            text = text.replace(secret, "***")
    return _PASSWORD.sub("***@", text)


def left_out(rows: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each of the most frequent reasons why rows were left out, with the first row of each.

    Args:
        rows: origin and reason of each row. Reasons that differ in numbers alone (a row's own length) are one.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for origin, reason in rows:
        groups.setdefault(_NUMBER.sub("#", reason), []).append((origin, reason))
    ranked = sorted(groups.values(), key=len, reverse=True)
    lines = []
    for group in ranked[:MOST_REASONS]:
        origin, reason = group[0]
        count = "1 row left out" if len(group) == 1 else f"{len(group):,} rows left out, the first"
        lines.append(f"{count}: {origin}: {reason}")
    if rest := ranked[MOST_REASONS:]:
        lines.append(f"and {sum(map(len, rest)):,} more left out, for {len(rest):,} other reasons")
    return lines
