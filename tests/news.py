"""WMT-like files of a few documents."""

from __future__ import annotations

import gzip
from pathlib import Path
from xml.sax.saxutils import escape

ENGLISH = {
    "paper.9": ["Ferry leaves early", "The ferry to the islands left two hours early today."],
    "paper.10": ["Rain & wind", "It rained on both sides of the glacier for most of the week."],
}
ICELANDIC = {
    "paper.9": ["Ferjan fór snemma", "Ferjan til eyjanna fór tveimur tímum fyrr í dag."],
    "paper.10": ["Rigning og vindur", "Það rigndi báðum megin jökulsins mestan hluta vikunnar."],
}


def write_wmt(path: Path, direction: str, *, systems: dict[str, dict[str, list[str]]] | None = None, **texts) -> Path:
    """A test set whose documents stand in the order given; ``texts`` replaces ``en`` or ``is``."""
    source, target = direction.split("-")
    sides = {"en": ENGLISH, "is": ICELANDIC, **texts}
    docs = []
    for name in sides[source]:
        parts = [_part(f'src lang="{source}"', sides[source][name])]
        if name in sides[target]:
            parts.append(_part(f'ref lang="{target}" translator="A"', sides[target][name]))
        parts += [
            _part(f'hyp system="{system}" lang="{target}"', lines[name]) for system, lines in (systems or {}).items()
        ]
        docs.append(f'<doc origlang="{source}" id="{name}">{"".join(parts)}</doc>')
    xml = f"<?xml version='1.0' encoding='utf-8'?>\n<dataset id=\"test\">{''.join(docs)}</dataset>"
    data = xml.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def _part(tag: str, lines: list[str]) -> str:
    segments = "".join(f'<seg id="{i}">{escape(line)}</seg>' for i, line in enumerate(lines, 1))
    return f"<{tag}><p>{segments}</p></{tag.partition(' ')[0]}>"
