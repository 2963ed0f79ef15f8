"""Texts in two languages: WMT's XML with documents and systems, aligned lines, JSON, TMX."""

from __future__ import annotations

import gzip
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tell.data.bounds import COMPRESSIONS
from tell.data.formats import check_file, read_records, read_text
from tell.errors import TellError

_LANG = "{http://www.w3.org/XML/1998/namespace}lang"


@dataclass(frozen=True, slots=True)
class Document:
    """One text in several languages.

    Attributes:
        id: the document's name, unique in its file; a line number where it has none.
        texts: language code, its lines; the same number in every language if the file aligns them.
        origin: where it was read, for error messages.
        systems: name, the lines that a translation system gave for the source.
    """

    id: str
    texts: Mapping[str, tuple[str, ...]]
    origin: str
    systems: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def text(self, language: str) -> str:
        return "\n".join(self.texts[language])

    def words(self, language: str) -> int:
        """Words between white space."""
        return len(self.text(language).split())


def read_wmt(path: str | Path) -> tuple[str, list[Document]]:
    """Direction (``en-is``) and documents of a WMT test set, by id as WMT numbers their segments.

    Each document's first reference is taken (WMT21 has one, translator A, for English and Icelandic). Segments
    are what XML says; WMT's own text files differ from it in a few trailing spaces.

    Args:
        path: ``newstest2021.en-is.all.xml``, plain, ``.gz`` or ``.zst``.

    Raises:
        TellError: no such file, not XML, no documents, one without reference, or with other segments than its source.
    """
    path = check_file(path)
    try:
        root = ET.fromstring(read_text(path, compression=_compression(path)))
    except ET.ParseError as error:
        raise TellError(f"is not valid XML ({error})", where=str(path), remedy="Copy it again.") from error
    found: list[Document] = []
    directions: set[str] = set()
    for number, doc in enumerate(root.iter("doc"), 1):
        name = doc.get("id") or str(number)
        origin = f"{path}: document {name}"
        source, reference = doc.find("src"), doc.find("ref")
        if source is None or reference is None:
            what = "source" if source is None else "reference"
            raise TellError(f"has no {what}", where=origin, remedy="Use a test set with references.")
        languages = [str(part.get("lang")) for part in (source, reference)]
        directions.add("-".join(languages))
        texts = dict(zip(languages, (_segments(source), _segments(reference)), strict=True))
        systems = {str(part.get("system")): _segments(part) for part in doc.findall("hyp")}
        for label, lines in (*texts.items(), *systems.items()):
            if len(lines) != len(texts[languages[0]]):
                what = f"has {len(lines)} segments of {label} for {len(texts[languages[0]])} of the source"
                raise TellError(what, where=origin, remedy="Copy the file again.")
        found.append(Document(name, texts, origin, systems))
    if len(directions) != 1:
        what = f"has several directions ({', '.join(sorted(directions))})" if directions else "has no document"
        raise TellError(what, where=str(path), remedy="Use a file like newstest2021.en-is.all.xml.")
    return directions.pop(), sorted(found, key=lambda doc: doc.id)


def _segments(part: ET.Element) -> tuple[str, ...]:
    return tuple("".join(seg.itertext()) for seg in part.iter("seg"))


Pairs = str | Path | Sequence[str | Path]


def read_pairs(spec: Pairs, languages: tuple[str, str]) -> Iterator[Document]:
    """Pairs of texts; lines of the same document are one.

    Args:
        spec: ``FIRST,SECOND`` or ``FIRST,SECOND,IDS``, or a list of them (text files of equal length, in the order of
            `languages`, and the document that each line belongs to); a JSON or JSON Lines file of
            ``{"translation": {code: text}}``; or a TMX file. Plain, ``.gz`` or ``.zst``; TMX plain or ``.gz``.
        languages: codes of the two, e.g. ``("en", "is")``.

    Raises:
        TellError: a file that is missing or broken, of no known kind, or whose lines do not match.
    """
    paths = (
        [Path(part.strip()) for part in str(spec).split(",")] if isinstance(spec, str | Path) else [*map(Path, spec)]
    )
    if len(paths) in (2, 3):
        return _aligned(paths, languages)
    if len(paths) == 1 and plain_suffix(paths[0]) == ".tmx":
        return _tmx(check_file(paths[0]), languages)
    if len(paths) == 1 and plain_suffix(paths[0]) in (".json", ".jsonl"):
        return _translations(paths[0], languages)
    remedy = "Pass FILE.json, FILE.tmx, ENGLISH,ICELANDIC or ENGLISH,ICELANDIC,IDS."
    raise TellError("is neither JSON, TMX nor two or three text files", where=", ".join(map(str, paths)), remedy=remedy)


def _aligned(paths: list[Path], languages: tuple[str, str]) -> Iterator[Document]:
    columns = [_lines(check_file(path)) for path in paths]
    if len({len(column) for column in columns}) > 1:
        counts = ", ".join(f"{len(column):,}" for column in columns)
        remedy = "Pass files whose lines correspond."
        raise TellError(f"do not match line for line ({counts} lines)", where=", ".join(map(str, paths)), remedy=remedy)
    names = columns[2] if len(columns) == 3 else [str(i) for i in range(1, len(columns[0]) + 1)]
    documents: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        if columns[0][i].strip() and columns[1][i].strip():
            documents.setdefault(name, []).append(i)
    for name, rows in documents.items():
        texts = {code: tuple(column[i] for i in rows) for code, column in zip(languages, columns, strict=False)}
        yield Document(name, texts, f"{paths[0]}:{rows[0] + 1}")


def _lines(path: Path) -> list[str]:
    # Not splitlines(), which also breaks at characters inside a line.
    lines = read_text(path, compression=_compression(path)).replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines and not lines[-1] else lines


def _translations(path: Path, languages: tuple[str, str]) -> Iterator[Document]:
    for line, record in read_records(path):
        texts = record.get("translation")
        if not isinstance(texts, dict) or not all(isinstance(texts.get(code), str) for code in languages):
            what = f"has no translation with {' and '.join(languages)}"
            remedy = f'Write {{"translation": {{"{languages[0]}": ..., "{languages[1]}": ...}}}}.'
            raise TellError(what, where=f"{path}:{line}", remedy=remedy)
        if all(texts[code].strip() for code in languages):
            yield Document(str(line), {code: (texts[code],) for code in languages}, f"{path}:{line}")


def _tmx(path: Path, languages: tuple[str, str]) -> Iterator[Document]:
    """Units of a translation memory, streamed since it may be large."""
    number = 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
            for _, unit in ET.iterparse(stream):
                if unit.tag != "tu":
                    continue
                number += 1
                texts: dict[str, str] = {}
                for variant in unit.iter("tuv"):
                    code = (variant.get(_LANG) or variant.get("lang") or "").lower().partition("-")[0]
                    segment = variant.find("seg")
                    if segment is not None:
                        texts.setdefault(code, " ".join("".join(segment.itertext()).split()))
                unit.clear()
                if all(texts.get(code) for code in languages):
                    lines = {code: (texts[code],) for code in languages}
                    yield Document(str(number), lines, f"{path}: unit {number}")
    except (ET.ParseError, OSError, EOFError) as error:
        where = f"{path}: unit {number + 1}"
        raise TellError(f"cannot be read as TMX ({error})", where=where, remedy="Copy it again.") from error


def plain_suffix(path: Path) -> str:
    """The suffix in lower case, one of a compression left out."""
    return (path.with_suffix("") if _compression(path) else path).suffix.lower()


def _compression(path: Path) -> str:
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""
