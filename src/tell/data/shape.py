"""Guesses the form of a task from the shape of its columns: long text is the prompt, few values are the answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from tell.data.cell_text import RowFault, as_text
from tell.data.columns import Record, is_id
from tell.data.form import Form, place_of, quoted
from tell.data.label_text import LABEL_VALUES, are_labels
from tell.data.layouts import PROMPTS
from tell.errors import TellError

SAMPLE = 5000  # rows that are looked at
TEXT_CHARACTERS = 20  # mean length of a column of texts
WORDY = 0.8  # least share of texts in several words, or of a script without spaces
FILLED = 0.5  # least share of cells of a column of texts that are filled; labels may be missing in most rows
DISTINCT = 0.5  # least share of different texts
LETTERS = 0.5  # least share of letters in texts, which dates and phone numbers lack
NAME_CHARACTERS = 60  # a longer column name is a cell of data
SHOWN, MOST = 3, 20  # guesses in the text of an error, and with it
_DATE = re.compile(r"\d{1,4}[-./]\d{1,2}[-./]\d{1,4}\b")
_WORDS = re.compile(r"\S\s+\S")


class SeveralForms(TellError):
    """A file can be read in several ways.

    Args:
        forms: the readings, the likeliest first.
    """

    def __init__(self, forms: Sequence[Form], source: str) -> None:
        self.forms = forms[:MOST]
        shown = ", or ".join(f"`tell tune {quoted(source)} {form.flags}`" for form in forms[:SHOWN])
        more = "; more are possible" if len(forms) > SHOWN else ""
        what = f"can be read in several ways{more}: {shown}"
        super().__init__(what, where=source, remedy="Choose one, or name other columns.")


def guess_form(records: Sequence[Record], source: str, given: Form) -> Form | None:
    """The one plausible form of a file; None where none is.

    Args:
        records: at least one.
        source: the file as given, for commands.
        given: its prompt or answer counts, where it has one, and the other is guessed.

    Raises:
        SeveralForms: several are plausible.
        TellError: the first row is data instead of column names, a given column is not in the file, or a column of the
            prompt has braces in its name.
    """
    given = given.known(records, source)
    found = list(_forms(records[:SAMPLE], given))
    if not found:
        return None
    for name in (*found[0].asked, *found[0].answer):
        if len(name) > NAME_CHARACTERS or any(record.get(name) == name for record in records[:SAMPLE]):
            what = f"begins with a row that looks like data, not like column names ({name[:NAME_CHARACTERS]!r})"
            raise TellError(what, where=source, remedy="Put a row of column names above it, e.g. text and label.")
    if len(found) > 1:
        raise SeveralForms(found, source)
    return found[0]


def _forms(records: Sequence[Record], given: Form) -> Iterator[Form]:
    """The plausible forms, the likeliest first."""
    names = [name for name in dict.fromkeys(name for record in records for name in record) if name]
    texts, labels = [], []
    for name in names:
        cells = _texts(records, name)
        if cells is None:
            continue
        if _is_text(cells):
            texts += [name] * (len(cells) >= FILLED * len(records))
        elif not is_id(name) and _is_label(cells):
            labels.append(name)
    if given.answer:
        left = [name for name in names if name not in given.answer]
        known = [name for name in left if name.lower() in PROMPTS]  # a known name needs no long text
        prompts = _prompts(known or [name for name in left if name in texts])
        answers = [given.answer]
    elif given.prompt is not None:
        prompts, used = [given.prompt], given.asked
        others = [name for name in texts if name not in used]
        answers = _answers([name for name in labels if name not in used] or others)
    elif labels:
        prompts, answers = _prompts(texts), _answers(labels)
    elif len(texts) == 2:  # question and answer, in either order
        prompts, answers = [], []
        for first, second in (texts, reversed(texts)):
            yield Form(_template([first]), (second,))
    else:
        return
    for prompt in prompts:
        for answer in answers:
            yield replace(given, prompt=prompt, answer=answer)


def _prompts(names: Sequence[str]) -> list[str]:
    """Templates of all columns together, and of each alone."""
    if len(names) < 2:
        return [_template([name]) for name in names]
    return [_template(names), *(_template([name]) for name in names)]


def _answers(names: Sequence[str]) -> list[tuple[str, ...]]:
    """All columns together, and each alone."""
    return [tuple(names)] * (len(names) > 1) + [(name,) for name in names]


def _template(names: Sequence[str]) -> str:
    return "\n\n".join(map(place_of, names))


def _texts(records: Sequence[Record], name: str) -> list[str] | None:
    """The filled cells as text; None where one is no plain value.

    A cell that cannot be read counts as empty: without its column, another one would seem to be the only answer.
    """
    cells = [record.get(name) for record in records]
    if any(isinstance(cell, list | dict) for cell in cells):
        return None
    return [text for cell in cells if (text := _readable(cell))]


def _readable(cell: object) -> str:
    try:
        return as_text(cell).strip()
    except RowFault:  # a formula error
        return ""


def _is_text(cells: Sequence[str]) -> bool:
    count = len(cells)
    characters = sum(map(len, cells))
    wordy = sum(bool(_WORDS.search(cell)) or not cell.isascii() for cell in cells)
    letters = sum(char.isalpha() for cell in cells for char in cell)
    return (
        count > 0
        and characters >= TEXT_CHARACTERS * count
        and wordy >= WORDY * count
        and letters >= LETTERS * characters
        and len(set(cells)) >= DISTINCT * count
    )


def _is_label(cells: Sequence[str]) -> bool:
    different = set(cells)
    few = 1 < len(different) <= LABEL_VALUES and are_labels(cells)
    return few and not all(_DATE.match(cell) for cell in different)
