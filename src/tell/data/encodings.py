"""Text of data files as UTF-8, or as the encoding that its bytes are recognised to be in, which is said."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from tell.data.file_read import FileRead
from tell.errors import TellError
from tell.shown import brief

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16 does
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What programs save as, the commonest first; without this list rare ones that read alike are preferred.
_KNOWN = (
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "mac_roman", "koi8_r"),
    *("cp932", "euc_jp", "gb18030", "big5", "cp949"),
)
_WIDE = ("utf_16_le", "utf_16_be", "utf_32_le", "utf_32_be")
SAMPLE = 2**18
"""Bytes by which an encoding is recognised; a multiple of the bytes of a character."""
_CONTROL = re.compile(rb"[\x01-\x08\x0e-\x1a\x1c-\x1f]")
_REMEDY = "Save the file as UTF-8."


def decode(data: bytes, path: Path, found: FileRead | None) -> str:
    """Text of a file without its byte order mark.

    Args:
        path: for messages.
        found: gets the encoding and, where it is not UTF-8, a notice with a sample; None: UTF-8 alone is accepted.

    Raises:
        TellError: not UTF-8 (byte and line), and damaged, binary, or in no encoding that is recognised.
    """
    mark, encoding = next(((m, name) for m, name in MARKS if data.startswith(m)), (b"", "utf-8"))
    guessed = False
    if encoding == "utf-8":
        try:
            text = data[len(mark) :].decode()
        except UnicodeDecodeError as error:
            offset = error.start + len(mark)
            what = f"is not UTF-8 (byte 0x{data[offset]:02x} at offset {offset})"
            line = data.count(b"\n", 0, offset) + 1
            fault = TellError(what, where=f"{path}:{line}", remedy=_REMEDY)
            if found is None or mark or _is_damaged(data):
                raise fault from error
            name = _recognised(data)
            try:
                text = data.decode(name or "utf-8")
            except UnicodeDecodeError:
                raise fault from error
            assert name is not None  # UTF-8 has failed before
            encoding, guessed = name.replace("_", "-"), True
    elif found is None:
        name = encoding.upper()
        raise TellError(f"is {name} (byte 0x{data[0]:02x} at offset 0)", where=f"{path}:1", remedy=_REMEDY)
    else:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError as error:
            what = f"begins as {encoding.upper()} and is not ({error.reason} at offset {error.start})"
            raise TellError(what, where=str(path), remedy=_REMEDY) from error
    if found is not None:
        found.encoding = encoding
        if encoding != "utf-8":
            found.notices.append(f"{path.name}: not UTF-8; read as {encoding}{_sample(text) if guessed else ''}")
    return text


def _is_damaged(data: bytes) -> bool:
    """Whether bytes are UTF-8 but for a few: any other encoding would garble the rest."""
    kept = data.decode(errors="ignore")
    lost = len(data) - len(kept.encode())
    return sum(not char.isascii() for char in kept) >= lost  # by chance a text in GB 18030 has up to a third of them


def _recognised(data: bytes) -> str | None:
    """The encoding's name in Python; None where none fits."""
    from charset_normalizer import from_bytes

    wide = b"\0" in data  # no text in a narrow encoding has it
    if not wide and _CONTROL.search(data):
        return None
    data = data[:SAMPLE] if wide else _lines_beyond_ascii(data)
    matches = from_bytes(data, cp_isolation=list(_WIDE if wide else _KNOWN))
    best = matches.best()
    if best is None:
        return None
    same = {match.encoding for match in matches if str(match) == str(best)} | {best.encoding}
    if not wide and _reads_alike(data, best.encoding, "cp1252"):
        same.add("cp1252")
    return next((name for name in (*_KNOWN, *_WIDE) if name in same), best.encoding)


def _lines_beyond_ascii(data: bytes) -> bytes:
    """The lines that tell encodings apart, up to `SAMPLE` bytes."""
    found, size = [], 0
    for line in data.split(b"\n"):
        if size < SAMPLE and not line.isascii():
            found.append(line)
            size += len(line)
    return b"\n".join(found)


def _reads_alike(data: bytes, first: str, second: str) -> bool:
    try:
        return data.decode(first) == data.decode(second)
    except UnicodeDecodeError:
        return False


def _sample(text: str) -> str:
    """The first words with a letter beyond ASCII, by which a wrong guess is seen."""
    at = next((i for i, char in enumerate(text) if not char.isascii()), None)
    if at is None:
        return ""
    begin, end = max(0, at - 20), at + 20
    return f", e.g. {brief(text[begin:end])!r}; if that is wrong, save it as UTF-8"
