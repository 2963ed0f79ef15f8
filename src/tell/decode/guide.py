"""Guides: at closed fields of an answer, the next token is decided among the possible values instead of sampled.

A guide follows the text of one answer. Where a closed field's value begins, only tokens that lead to one of its values
are possible, and the model's probabilities, renormalised over them, are multiplied with weights of the values (a
product of experts, Hinton 2002). Renormalising makes tokens that are certain cost nothing, so that long values are not
at a disadvantage (surface-form competition: Holtzman et al. 2021, arXiv 2104.08315). No torch.
"""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tell.data.closed import EMPTY, ITEM, ClosedField
from tell.decode.json_cursor import JsonCursor, ListCursor
from tell.rows.template import ChatTokenizer

_BLANK = " \t\r\n"
_PARTIAL = "\ufffd"  # as which the bytes of an unfinished character are decoded


class Vocabulary:
    """The text that each token adds to an answer, and the tokens by their text."""

    def __init__(self, chat: ChatTokenizer) -> None:
        self.chat = chat
        self._before = before = chat.encode("x")[-1]
        kept = [i for i in range(chat.size) if i not in chat.added_ids and chat.backend.id_to_token(i) is not None]
        start = len(chat.decode([before]))
        texts = chat.backend.decode_batch([[before, i] for i in kept], skip_special_tokens=True)
        self._ids: dict[str, list[int]] = defaultdict(list)
        self._matching: dict[re.Pattern[str], list[int]] = {}
        self._pieces: dict[str, tuple[int, ...]] = {}
        for token, text in zip(kept, texts, strict=True):
            if (added := text[start:]) and _PARTIAL not in added:  # a part of a character is no text
                self._ids[added].append(token)

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self._ids)

    def within(self, text: str) -> list[tuple[int, str]]:
        """Tokens, with their texts, that ``text`` begins with, ``text`` itself included."""
        heads = (text[: i + 1] for i in range(len(text)))
        return [(token, head) for head in heads for token in self._ids.get(head, ())]

    def beyond(self, text: str) -> list[tuple[int, str]]:
        """Tokens whose text begins with ``text`` and goes on, each with the rest."""
        if not text:
            return [(token, added) for added, tokens in self._ids.items() for token in tokens]
        at = bisect.bisect_right(self._sorted, text)
        found = []
        while at < len(self._sorted) and self._sorted[at].startswith(text):
            found += [(token, self._sorted[at][len(text) :]) for token in self._ids[self._sorted[at]]]
            at += 1
        return found

    def pieces(self, character: str) -> tuple[int, ...]:
        """The tokens that spell a character by parts, each without a text of its own; empty where one token does."""
        if character not in self._pieces:
            ids = () if character in self._ids else tuple(self.chat.encode(character))
            whole = self.chat.decode([self._before]) + character
            ways = (ids, ids[1:])  # the second without a space that SentencePiece writes before a text
            found = (way for way in ways if way and self.chat.decode([self._before, *way]) == whole)
            self._pieces[character] = next(found, ())
        return self._pieces[character]

    def matching(self, pattern: re.Pattern[str]) -> list[int]:
        """Tokens whose text begins as a pattern says."""
        if pattern not in self._matching:
            self._matching[pattern] = [t for text, ids in self._ids.items() if pattern.match(text) for t in ids]
        return self._matching[pattern]


@dataclass(frozen=True)
class Branch:
    """The tokens by which closed values go on from a point of an answer.

    Attributes:
        tokens: (t,) their ids.
        members: (t, classes) bool, the values that each token leads to. A list has two more classes: its end, and all
            further items. Those, or all further values, are the last class of an open field.
        goes_on: (t,) bool, the token ends an item and begins the next: it has a comma.
        further: all other tokens are possible too, and lead to the further values.
    """

    tokens: np.ndarray
    members: np.ndarray
    goes_on: np.ndarray
    further: bool


@dataclass(frozen=True)
class Decision:
    """Candidates for the next token, and the evidence for the classes of the branch.

    Attributes:
        evidence: (classes,) log factor of each, 0 for none; -inf rules it out.
        log_prior: (classes,) by which a token that several share weighs their evidence.
    """

    branch: Branch
    evidence: np.ndarray
    log_prior: np.ndarray

    def pick(self, log_probs: np.ndarray) -> int:
        """The best token, by (V,) log probabilities of the model over the vocabulary."""
        branch = self.branch
        scores = log_probs[branch.tokens].astype(np.float64) + self._pooled(branch.members)
        if branch.goes_on.any():  # the evidence for any other item
            later = ~branch.members[branch.goes_on]
            later[:, -2] = False
            scores[branch.goes_on] += self._pooled(later)
        rest = log_probs.astype(np.float64)
        rest[branch.tokens] = -np.inf
        outside = _log_sum(rest) + self.evidence[-1] if branch.further else -np.inf
        if scores.max() == -np.inf or outside > scores.max():  # all values of the branch may have been used up
            return int(rest.argmax())
        return int(branch.tokens[scores.argmax()])

    def _pooled(self, members: np.ndarray) -> np.ndarray:
        """(t,) log of the mean factor of the classes that (t, classes) members name, weighted by the prior."""
        prior = np.where(members, self.log_prior, -np.inf)
        return _log_sum(prior + self.evidence) - _log_sum(prior)


class Fields:
    """Closed fields of a task, with the branches of their values; shared by the guides of all rows.

    Args:
        vocabulary: of the model.
        fields: of one task.
        stop_ids: tokens that end an answer.
        opening: what every answer begins with.
    """

    def __init__(
        self, vocabulary: Vocabulary, fields: Sequence[ClosedField], stop_ids: Sequence[int], opening: str = ""
    ) -> None:
        self.vocabulary, self.fields, self.stop_ids = vocabulary, tuple(fields), tuple(stop_ids)
        self.opening = opening
        self._openings: dict[tuple, Branch | None] = {}
        self._by_path = {found.path: i for i, found in enumerate(self.fields)}
        self._branches: dict[tuple, Branch | None] = {}

    @cached_property
    def stop(self) -> Branch:
        """The end of an answer."""
        rows = len(self.stop_ids)
        return Branch(np.array(self.stop_ids), np.ones((rows, 1), dtype=bool), np.zeros(rows, dtype=bool), False)

    @property
    def whole(self) -> ClosedField | None:
        """The field that the whole answer is, a label or a list of labels; None where answers have fields."""
        return self.fields[0] if self.fields and not self.fields[0].path else None

    def find(self, cursor: JsonCursor | ListCursor) -> tuple[int, str, bool] | None:
        """The closed field that an answer has reached, how its value has been begun, and whether that is the value
        itself or an item of it."""
        place = cursor.place
        if place is None:
            return None
        if (index := self._by_path.get(place)) is not None:
            return index, cursor.text, False
        if place[-1:] != (ITEM,) or (index := self._by_path.get(place[:-1])) is None:
            return None
        if self.fields[index].is_set:
            return index, cursor.text, True
        return None if cursor.done else (index, "[" + cursor.text, False)  # it may still be the empty list

    def opens(self, text: str, begun: tuple[int, ...] = ()) -> Branch | None:
        """The tokens that lead on to the opening from ``text``; None where the answer has left it behind.

        Args:
            begun: as of `branch`.
        """
        if len(text) >= len(self.opening) or not self.opening.startswith(text):
            return None
        key = (text, begun)
        if key not in self._openings:
            left, whole = self.opening[len(text) :], ClosedField((), "value", (self.opening,))
            if begun:
                made = self._within_character(whole, {0: left}, begun)
            else:
                words = self.vocabulary
                tokens = [*words.pieces(left[0])[:1], *(t for t, _ in (*words.within(left), *words.beyond(left)))]
                made = _as_branch({(token, False): {0} for token in tokens}, whole, False)
            self._openings[key] = made
        return self._openings[key]

    def branch(self, index: int, text: str, inside: bool, begun: tuple[int, ...] = ()) -> Branch | None:
        """The branch of a field begun with ``text``, as `find` returns them; None: nothing is left to decide.

        Args:
            begun: tokens after ``text`` that are the first parts of a character.
        """
        key = (index, text, inside, begun)
        if key not in self._branches:
            field, blank = self.fields[index], text.lstrip(_BLANK)
            values = ["[" + value if field.is_set and not inside else value for value in field.values]
            if field.is_set and not inside:
                values.append(EMPTY)
            rests = {c: value[len(blank) :] for c, value in enumerate(values) if value.startswith(blank)}
            made = self._within_character(field, rests, begun) if begun else self._branch(field, text, inside, rests)
            self._branches[key] = made
        return self._branches[key]

    def _within_character(self, field: ClosedField, rests: dict[int, str], begun: tuple[int, ...]) -> Branch | None:
        members: dict[tuple[int, bool], set[int]] = defaultdict(set)
        for c, rest in rests.items():
            pieces = self.vocabulary.pieces(rest[:1])
            if len(begun) < len(pieces) and pieces[: len(begun)] == begun:
                members[pieces[len(begun)], False].add(c)
        return _as_branch(members, field, field.open)

    def _branch(self, field: ClosedField, raw: str, inside: bool, rests: dict[int, str]) -> Branch | None:
        text, words = raw.lstrip(_BLANK), self.vocabulary
        end = len(field.values)
        members: dict[tuple[int, bool], set[int]] = defaultdict(set)
        for c, rest in rests.items():
            if not rest and not field.path and not field.is_set:
                members |= {(token, False): members[token, False] | {c} for token in self.stop_ids}
            elif not rest and inside:
                self._add_ends(members, field, c, "")
            elif not rest and text[-1] not in _CLOSERS:  # a number may go on, be it to another value or to none
                for token in words.matching(_NUMBER_END):
                    members[token, False].add(c)
            for token in words.pieces(rest[:1])[:1]:
                members[token, False].add(c)
            for way in (rest, " " + rest) if rest and not raw else (rest,) * bool(rest):
                for token, _ in words.within(way):
                    members[token, False].add(c)
                if field.is_set and c != end:
                    self._add_ends(members, field, c, way)
                elif field.path:
                    for token, more in words.beyond(way):
                        if _AFTER.match(more):
                            members[token, False].add(c)
        if not members:
            return None
        if (
            inside and not raw and not field.separator
        ):  # before its first item; `Guide.decision` forbids it after a comma
            for token in words.matching(_CLOSED if field.path else _CLOSED_LAST):
                members[token, False].add(end)
        openers = ("", '"') if inside else ("", "[", '["') if field.is_set else ("", '"', "[", "{")
        further = field.open and text in openers
        if further:
            for way in (lead + head for head in openers for lead in ("", " ")[: 1 if raw else 2]):
                for token, piece in words.within(way):
                    if text + (piece if raw else piece.lstrip(_BLANK)) in openers:
                        members[token, False].add(end + field.is_set)
        return _as_branch(members, field, further)

    def _add_ends(self, members: dict[tuple[int, bool], set[int]], field: ClosedField, c: int, rest: str) -> None:
        """Tokens that complete an item of a list by ``rest`` and go on to the next, or end the list."""
        comma, closed = field.separator.strip() or ",", _CLOSED if field.path else _CLOSED_LAST
        if field.separator and not rest:
            members |= {(token, False): members[token, False] | {c} for token in self.stop_ids}
        starts = ("", '"') if all(value.startswith('"') for value in field.values) else ("",)  # of any next item
        for token, more in self.vocabulary.beyond(rest):
            after = more.lstrip(_BLANK)
            if not field.separator and closed.match(more):
                members[token, False].add(c)
            elif after[:1] == comma and after[1:].lstrip(_BLANK) in starts:
                members[token, True].add(c)


def _as_branch(members: dict[tuple[int, bool], set[int]], field: ClosedField, further: bool) -> Branch | None:
    """The branch of tokens, each with whether it goes on to a next item, and the classes that they lead to."""
    if not members:
        return None
    matrix = np.zeros((len(members), field.classes + 2 * field.is_set), dtype=bool)
    for row, classes in enumerate(members.values()):
        matrix[row, list(classes)] = True
    tokens, goes_on = zip(*members, strict=True)
    return Branch(np.array(tokens), matrix, np.array(goes_on), further)


_AFTER, _CLOSED = re.compile(r"\s*[,}]"), re.compile(r"\s*\](?:\s*[,}]|\s*$)")
"""What may follow the value of a key, and the end of a list that is such a value."""
_CLOSED_LAST = re.compile(r"\s*\]\s*$")  # of a list that is the whole answer
_NUMBER_END = re.compile(r"\s*([,}]|\Z)")  # or white space alone
_CLOSERS = '"]}'  # they end a value by themselves


class Guide:
    """Follows one answer and decides its closed fields.

    Args:
        fields: of the task.
        evidence: (classes,) of each field, see `Decision`; of a list with its two further classes.
        log_priors: (classes,) of each field, likewise.
    """

    def __init__(self, fields: Fields, evidence: Sequence[np.ndarray], log_priors: Sequence[np.ndarray]) -> None:
        self.fields, self.evidence, self.log_priors = fields, evidence, log_priors
        whole = fields.whole
        self._cursor: JsonCursor | ListCursor = JsonCursor()
        if whole is not None and whole.separator:
            self._cursor = ListCursor(whole.separator)
        self._read = ""
        self._whole, self._text = 0, ""  # tokens up to the last whole character, and their text
        self._label, self._list = whole is not None and not whole.is_set, whole is not None and whole.is_set

    def decision(self, ids: Sequence[int]) -> Decision | None:
        """The choice for the token after ``ids``, the answer so far; None where the model is free.

        To be called with every prefix of the answer in turn.
        """
        text = self.fields.vocabulary.chat.without_lead(ids) if ids else ""
        if not text.endswith(_PARTIAL):
            self._whole, self._text = len(ids), text
        text = self._text  # as it was: some tokenizers decode all bytes before an unfinished character anew
        if self._label:
            found: tuple[int, str, bool] | None = (0, text, False)
        else:
            if not text.startswith(self._read):
                return None
            self._cursor.feed(text[len(self._read) :])
            self._read = text
            if self._list and self._cursor.ended:
                return Decision(self.fields.stop, _NOTHING, _NOTHING)
            if (begin := self.fields.opens(text, tuple(ids[self._whole :]))) is not None:
                return Decision(begin, _NOTHING, _NOTHING)
            found = self.fields.find(self._cursor)
        if found is None or (branch := self.fields.branch(*found, tuple(ids[self._whole :]))) is None:
            return None
        index, _, inside = found
        field, evidence = self.fields.fields[index], self.evidence[index]
        if field.is_set and inside and (done := self._cursor.done):
            evidence = evidence.copy()  # a value comes once, and a list with separators has at least one
            evidence[[i for i, value in enumerate(field.values) if value in done]] = -np.inf
            if not self._cursor.text:
                evidence[-2] = -np.inf  # after a comma comes an item
        return Decision(branch, evidence, self.log_priors[index])


_NOTHING = np.zeros(1)  # no evidence: the model chooses how to spell what is certain


def _log_sum(values: np.ndarray) -> np.ndarray:
    """Log of the sum of exponentials over the last axis; -inf where all are, or where there is none."""
    top = np.max(values, axis=-1, keepdims=True, initial=-np.inf)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(values - safe).sum(axis=-1)) + safe[..., 0]
