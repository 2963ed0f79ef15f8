"""The text of an answer as its tokens come: whole characters, without what the template writes before answers."""

from __future__ import annotations

from collections.abc import Sequence

from tell.rows.template import ChatTokenizer


class AnswerText:
    """Collects the tokens of one answer and hands out its text piece by piece.

    Args:
        chat: of the model.
        stops: texts that end the answer and are not part of it.
    """

    def __init__(self, chat: ChatTokenizer, stops: Sequence[str] = ()) -> None:
        self.chat, self.stops = chat, tuple(stops)
        self.ids: list[int] = []
        self.shown = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that a further token makes certain; empty within a character, and while a stop may have begun."""
        self.ids.append(token)
        whole = self.chat.without_lead(self.ids, more=True)
        return "" if whole.endswith("\ufffd") else self._show(whole, more=True)

    def end(self) -> str:
        """The rest of the text, once no further token comes."""
        return "" if self.stopped else self._show(self.chat.without_lead(self.ids), more=False)

    @property
    def whole(self) -> str:
        """The answer in the form of references, as `ChatTokenizer.answer`."""
        return self.shown if self.stopped else self.chat.answer(self.ids)

    def _show(self, text: str, *, more: bool) -> str:
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, text = True, text[: min(found)]
        elif more:
            text = text[: len(text) - max((_begun(stop, text) for stop in self.stops), default=0)]
        piece = text[len(self.shown) :]
        self.shown += piece
        return piece


def _begun(stop: str, text: str) -> int:
    """Characters at the end of ``text`` that a stop begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
