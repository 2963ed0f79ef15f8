"""Labels as they are written in answers: one each, or several in one of the `FORMS` of a list."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from tell.data.json_text import nfc, parse_strict

SHORT_CHARACTERS, SHORT_WORDS = 40, 5
LABEL_VALUES = 200
LABEL_REPEATS = 2.0
NEW_LABELS = 0.05
"""Share of labels seen once above which text with commas is not a list of labels: names and enumerations of things."""
REPEATED = 0.05  # share of lists that name an item twice, above which their order or number means something
COMBINED = 2.0
RECOMBINED = 0.5  # share of parts that stand in several different lists, below which the separator belongs to a name


@dataclass(frozen=True)
class ListForm:
    """One way to write a list of labels, the same in every answer of a task.

    Attributes:
        name: in findings.json and plan.json.
        separator: between two labels; empty: a JSON list.
        words: how the list is written, for people and models.
        strict: it is a list only where hardly any part occurs once, and whole answers are no labels themselves or are
            more than `COMBINED` times as many as their parts.
    """

    name: str
    separator: str
    words: str
    strict: bool = False

    def split(self, answer: str) -> list[str] | None:
        """The labels of an answer in order, repetitions included; None where it is no list in this form.

        Items of a JSON list that are not strings are named by their JSON.
        """
        if self.separator:
            parts = map(as_label, answer.split(self.separator.strip()))
            return [part for part in parts if part]
        try:
            value = nfc(parse_strict(answer))
        except ValueError:
            return None
        if not isinstance(value, list) or any(isinstance(item, (list, dict)) for item in value):
            return None
        items = (item if isinstance(item, str) else json.dumps(item) for item in value)
        return [label for item in items if (label := as_label(item))]

    def join(self, labels: Iterable[str]) -> str:
        """Labels as one answer."""
        return self.separator.join(labels) if self.separator else json.dumps(list(labels), ensure_ascii=False)

    def fits(self, answers: Sequence[str]) -> bool:
        """Whether all answers are lists of a few short labels in this form.

        Parts between separators must recombine: ``News; Sport`` whose parts never stand elsewhere is one label.
        """
        known: list[list[str]] = []
        for answer in answers:
            if (found := self.split(answer)) is None:
                return False
            known.append(found)
        if not are_few([label for found in known for label in found]):
            return False
        if sum(len(set(found)) < len(found) for found in known) > REPEATED * len(known):
            return False
        if not self.separator:
            return all(map(_holds_strings, answers))
        parts = {part for found in known if len(found) > 1 for part in found}
        sets = Counter(chain.from_iterable({frozenset(found) for found in known}))
        if not parts or sum(sets[part] > 1 for part in parts) < RECOMBINED * len(parts) or _are_tuples(known):
            return False
        if any(answer.lstrip()[:1] in ("[", "{") for answer in answers) or all(map(_is_number, parts)):
            return False
        counts = Counter(chain.from_iterable(known))
        if self.strict and sum(count == 1 for count in counts.values()) > NEW_LABELS * counts.total():
            return False
        return not self.strict or not are_labels(answers) or len(set(answers)) > COMBINED * len(counts)


_FORMS = (
    ListForm("json", "", "as a JSON list of strings"),
    ListForm("semicolons", "; ", "separated by semicolons"),
    ListForm("bars", " | ", "separated by vertical bars", strict=True),
    ListForm("commas", ", ", "separated by commas", strict=True),
)
FORMS: dict[str, ListForm] = {form.name: form for form in _FORMS}
"""The forms of lists, in the order in which they are tried."""


def list_form(answers: Sequence[str]) -> ListForm | None:
    """The form in which all answers list labels; None where they are something else."""
    return next((form for form in FORMS.values() if form.fits(answers)), None)


def requested_form(answers: Sequence[str]) -> ListForm:
    """The form of answers that a user says are lists of labels: JSON if any is, else the most frequent separator."""
    form = FORMS["json"]
    if any(form.split(answer) is not None for answer in answers):
        return form
    separated = [form for form in FORMS.values() if form.separator]
    return max(separated, key=lambda form: sum(form.separator.strip() in answer for answer in answers))


def are_labels(answers: Sequence[str]) -> bool:
    """Whether answers are few, short and repeated."""
    return are_few([as_label(answer) for answer in answers])


def are_few(labels: Sequence[str]) -> bool:
    """Whether occurrences of labels are of few different ones, all of them short."""
    different = set(labels)
    few = 0 < len(different) <= LABEL_VALUES and len(labels) >= LABEL_REPEATS * len(different)
    return few and all(map(is_short, different))


def as_label(answer: str) -> str:
    """An answer normalised for comparing labels: stripped, in Unicode's composed form (NFC)."""
    return nfc(answer.strip())


def is_short(text: str) -> bool:
    """Whether text may be a label: at most 40 characters and five words."""
    return len(text) <= SHORT_CHARACTERS and "\n" not in text and len(text.split()) <= SHORT_WORDS


def _are_tuples(lists: Sequence[Sequence[str]]) -> bool:
    """Whether all lists are of one length, and each part has its place in them: then order means something."""
    places: dict[str, set[int]] = {}
    for found in lists:
        for place, part in enumerate(found):
            places.setdefault(part, set()).add(place)
    return len({len(found) for found in lists}) == 1 and all(len(at) == 1 for at in places.values())


def _holds_strings(answer: str) -> bool:
    return all(isinstance(item, str) for item in parse_strict(answer))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
