"""Parses JSON in data (files, cells, schemas, answers), strictly by RFC 8259 and within bounds."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar

from tell.shown import brief

T = TypeVar("T")
DEPTH = 64  # levels of nesting; deeper values would exhaust the stack of validator and comparison
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(text: str) -> Any:
    """The JSON value of a file, a line or a cell; pandas' NaN is read as null.

    Raises:
        ValueError: broken syntax (a JSONDecodeError with its line), a key twice in one object, Infinity, numbers that
            overflow a double, nesting over 64 levels.
    """
    try:
        value = FILES.decode(text)
        # Counting brackets is faster than walking the value, and most lines have few.
        return value if text.count("{") + text.count("[") < DEPTH else check_depth(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_strict(text: str) -> Any:
    """The JSON value of an answer, which may have nothing but whitespace around it.

    Raises:
        ValueError: anything else: code fences, text around the value, NaN, Infinity, numbers that overflow a double,
            duplicate keys, nesting over 64 levels, half of a surrogate pair.
    """
    try:
        value = check_depth(_ANSWERS.decode(text))
    except json.JSONDecodeError as error:
        raise ValueError(_syntax(text, error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if (half := half_surrogate(text)) is not None:
        raise ValueError(f"contains half of a surrogate pair ({half})")
    return value


def half_surrogate(text: str) -> str | None:
    r"""The first half of a surrogate pair (``\ud83d``) in valid JSON text, as it is or escaped; None without one."""
    if text.isascii() and not _ESCAPED_SURROGATE.search(text):
        return None
    try:
        json.dumps(_LENIENT.decode(text), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(error.object[error.start]):x}"
    return None


def check_depth(value: T) -> T:
    """``value`` itself; a ValueError where it nests over 64 levels."""
    level: list[object] = [value]
    for _ in range(DEPTH):
        level = [item for node in level if isinstance(node, (list, dict)) for item in items(node)]
        if not level:
            return value
    raise ValueError("nested too deeply")


def nfc(value: Any) -> Any:
    """A JSON value with strings and keys in Unicode's composed form: macOS writes é as two characters."""
    if isinstance(value, str):
        return value if value.isascii() else unicodedata.normalize("NFC", value)
    if isinstance(value, dict):
        return {nfc(key): nfc(item) for key, item in value.items()}
    return [nfc(item) for item in value] if isinstance(value, list) else value


def items(node: list | dict) -> Iterable[object]:
    """The values in an array or object."""
    return node.values() if isinstance(node, dict) else node


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out = dict(pairs)
    if len(out) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {brief(twice)} occurs twice")
    return out


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _null(constant: str) -> None:
    if constant != "NaN":
        _refuse(constant)


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):  # 1e999 would be read as Infinity
        raise ValueError(f"number {brief(digits)} is too large")
    return number


def _integer(digits: str) -> int:
    if len(digits) > 300:
        _finite(digits)  # also keeps int() from refusing thousands of digits
    return int(digits)


def _decoder(constant: Callable[[str], None]) -> json.JSONDecoder:
    return json.JSONDecoder(parse_constant=constant, object_pairs_hook=_unique, parse_float=_finite, parse_int=_integer)


FILES, _ANSWERS = _decoder(_null), _decoder(_refuse)
_LENIENT = json.JSONDecoder()


def _syntax(text: str, error: json.JSONDecodeError) -> str:
    if not text.strip():
        return "the answer is empty"
    if text.lstrip().startswith("```"):
        return "it is inside a code fence"
    if error.msg == "Extra data":
        return "text follows the value"
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return "it ends too early"
    if error.pos == len(text) - len(text.lstrip()):
        return "it starts with other text"
    return f"{error.msg} at character {error.pos + 1}"
