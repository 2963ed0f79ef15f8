"""Untrusted text made safe and legible, and word differences."""

from __future__ import annotations

import difflib
import re
import unicodedata

from markupsafe import Markup, escape

# Characters that draw nothing or reorder what is drawn: C0 and C1 controls but tab and newline, soft hyphen,
# zero-width and bidirectional controls, line separators, tags ("ASCII smuggling"), lone surrogates. The joiners
# U+200C and U+200D stay, Persian and emoji need them.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
TOKEN = re.compile(r"\w+|\s+|[^\w\s]")
DIFF_TOKENS = 800
"""Longest text compared word by word; the comparison is quadratic at worst."""
ALIKE = 0.35
"""Texts less alike than this are shown unmarked: nearly every word would carry a mark."""


def plain(text: object) -> str:
    """``text`` with hidden characters spelled out as ``[U+202E]``, for attributes and SVG text. Not escaped."""
    return HIDDEN.sub(lambda m: f"[U+{ord(m[0]):04X}]", str(text))


def visible(text: object) -> str | Markup:
    """``text`` with hidden characters replaced by a marked code point; Markup only where there were any.

    The templates' ``finalize``: every printed value passes through it, then through autoescape.
    """
    if isinstance(text, Markup):
        return text
    text = "" if text is None else str(text)
    if not HIDDEN.search(text):
        return text
    parts, end = [], 0
    for match in HIDDEN.finditer(text):
        code = ord(match[0])
        name = unicodedata.name(match[0], "control character" if code < 0xD800 else "code point without a name")
        mark = Markup('<span class="ctl" title="{}">U+{:04X}</span>').format(name.lower(), code)
        parts += [escape(text[end : match.start()]), mark]
        end = match.end()
    parts.append(escape(text[end:]))
    return Markup("").join(parts)


def shorten(text: str, limit: int) -> str:
    """The first ``limit`` characters, saying how many more there were."""
    if len(text) <= limit:
        return text
    return f"{text[:limit].rstrip()} … ({len(text) - limit:,} more characters)"


def word_diff(reference: str, answer: str) -> Markup | None:
    """``answer`` with its differences from ``reference`` marked, by word.

    Words the answer adds are in ``<ins>``, words it lacks in ``<del>``: underlined and struck through, not only
    coloured.

    Returns:
        None if marks would not help: the texts are too long or have too little in common.
    """
    old, new = TOKEN.findall(reference), TOKEN.findall(answer)
    if max(len(old), len(new)) > DIFF_TOKENS:
        return None
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    if matcher.quick_ratio() < ALIKE or matcher.ratio() < ALIKE:
        return None
    runs: list[list[str]] = []  # [kept, lacking, added], the last two empty or the first
    for tag, i, j, k, m in matcher.get_opcodes():
        lacking, added = "".join(old[i:j]), "".join(new[k:m])
        if tag == "equal":
            runs.append([added, "", ""])
        elif len(runs) > 1 and not runs[-1][0].strip():  # one mark per changed phrase, not per word
            space = runs.pop()[0]
            runs[-1][1] += space + lacking
            runs[-1][2] += space + added
        else:
            runs.append(["", lacking, added])
    marks = (("{}", 0), ("<del>{}</del>", 1), ("<ins>{}</ins>", 2))
    return Markup("").join(Markup(mark).format(visible(run[at])) for run in runs for mark, at in marks if run[at])
