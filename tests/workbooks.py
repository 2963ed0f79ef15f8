"""Workbooks for tests: .xlsx by openpyxl, .ods and .xls written by hand, since no library here writes them."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import openpyxl

Rows = Sequence[Sequence[object]]
_SPACES = " ".join(
    f'xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{name}:1.0"' for name in ("office", "table", "text")
)


def xlsx(path: Path, rows: Rows, *, sheet: str = "Tickets", **others: Rows) -> Path:
    """A workbook whose first sheet has some rows; others by name."""
    book = openpyxl.Workbook()
    book.active.title = sheet
    for name, more in {sheet: rows, **others}.items():
        page = book[name] if name in book else book.create_sheet(name)
        for row in more:
            page.append(list(row))
    book.save(path)
    return path


def ods(path: Path, *sheets: str, encrypted: bool = False) -> Path:
    """A workbook of sheets given as the XML of their rows."""
    tables = "".join(f'<table:table table:name="S{i}">{rows}</table:table>' for i, rows in enumerate(sheets, 1))
    manifest = "urn:oasis:names:tc:opendocument:xmlns:manifest:1.0"
    secret = '<manifest:encryption-data><manifest:algorithm manifest:algorithm-name="x"/></manifest:encryption-data>'
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mimetype", "application/vnd.oasis.opendocument.spreadsheet", zipfile.ZIP_STORED)
        archive.writestr(
            "META-INF/manifest.xml",
            f'<?xml version="1.0"?><manifest:manifest xmlns:manifest="{manifest}"><manifest:file-entry '
            f'manifest:full-path="content.xml" manifest:media-type="text/xml">{secret * encrypted}'
            "</manifest:file-entry></manifest:manifest>",
        )
        archive.writestr(
            "content.xml",
            f'<?xml version="1.0"?><office:document-content {_SPACES} xmlns:calcext="urn:x" office:version="1.3">'
            f"<office:body><office:spreadsheet>{tables}</office:spreadsheet></office:body></office:document-content>",
        )
    return path


def ods_row(*cells: str | float) -> str:
    """A row of texts and numbers."""
    parts = (
        f'<table:table-cell office:value-type="string"><text:p>{cell}</text:p></table:table-cell>'
        if isinstance(cell, str)
        else f'<table:table-cell office:value-type="float" office:value="{cell}"/>'
        for cell in cells
    )
    return f"<table:table-row>{''.join(parts)}</table:table-row>"


def xls(path: Path, rows: Rows) -> Path:
    """A BIFF 8 workbook of texts, numbers, booleans and errors (as exceptions), in a compound file."""
    cells = b""
    for r, row in enumerate(rows):
        for c, value in enumerate(row):
            at = struct.pack("<HHH", r, c, 0)
            if isinstance(value, bool):
                cells += _record(0x205, at + bytes([value, 0]))
            elif isinstance(value, Exception):  # #REF!
                cells += _record(0x205, at + bytes([0x17, 1]))
            elif isinstance(value, str):
                text = value.encode("utf-16-le")
                cells += _record(0x204, at + struct.pack("<HB", len(text) // 2, 1) + text)
            elif value is not None:
                cells += _record(0x203, at + struct.pack("<d", value))
    begin, end = struct.pack("<HHHHII", 0x600, 0, 0x1FAF, 0x7CC, 0, 6), _record(0x0A, b"")
    name = b"\x06\x00Sheet1"
    head = _record(0x809, begin[:2] + b"\x05\x00" + begin[4:])
    at = len(head) + 4 + 6 + len(name) + len(end)
    bound = _record(0x85, struct.pack("<IH", at, 0) + name)
    sheet = _record(0x809, begin[:2] + b"\x10\x00" + begin[4:]) + cells + end
    path.write_bytes(_compound(head + bound + end + sheet, "Workbook"))
    return path


def encrypted_xlsx(path: Path) -> Path:
    """What Excel writes for a workbook with a password: a compound file with one encrypted stream."""
    path.write_bytes(_compound(b"x" * 5000, "EncryptedPackage"))
    return path


def _record(kind: int, data: bytes) -> bytes:
    return struct.pack("<HH", kind, len(data)) + data


def _compound(stream: bytes, name: str) -> bytes:
    """A compound file (MS-CFB, version 3) with one stream, in sectors of 512 bytes."""
    stream = stream.ljust(max(4096, -(-len(stream) // 512) * 512), b"\0")  # shorter ones are kept elsewhere
    used = len(stream) // 512
    free, last, fat_mark = 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD
    chain = [fat_mark, last, *range(3, used + 2), last]  # the table itself, the directory, the stream
    assert len(chain) <= 128
    fat = struct.pack("<128I", *chain, *[free] * (128 - len(chain)))

    def entry(text: str, kind: int, child: int, start: int, size: int) -> bytes:
        label = text.encode("utf-16-le") + b"\0\0" if text else b""
        return (
            label.ljust(64, b"\0")
            + struct.pack("<HBBIII", len(label), kind, 1, free, free, child)
            + bytes(36)
            + struct.pack("<IQ", start, size)
        )

    folder = entry("Root Entry", 5, 1, last, 0) + entry(name, 2, free, 2, len(stream)) + entry("", 0, free, 0, 0) * 2
    header = (
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
        + bytes(16)
        + struct.pack("<HHHHH", 0x3E, 3, 0xFFFE, 9, 6)
        + bytes(6)
        + struct.pack("<IIIIIIIII", 0, 1, 1, 0, 4096, last, 0, last, 0)
        + struct.pack("<109I", 0, *[free] * 108)
    )
    return header + fat + folder + stream
