"""An answer on its way from the thread that decodes it to the client that reads it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from tell.decode.answer_text import AnswerText
from tell.decode.engine_rows import Answer
from tell.errors import TellError, first_line
from tell.exports.llama_cpp import Said
from tell.serve.chat_request import FAILED, ApiError


class Wire:
    """Carries what threads put into the event loop that made it.

    Attributes:
        gone: the client reads no more.
        result: of decoding, once it has ended; what came after a stop text included.
    """

    def __init__(self) -> None:
        self.gone = False
        self.result: Answer | Said | Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[int | str | None] = asyncio.Queue()

    def put(self, item: int | str | None) -> None:
        """Hand over a token or a piece of text; None after the last."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    def end(self, result: Answer | Said | Exception) -> None:
        """The answer is complete, or failed."""
        self.result = result
        self.put(None)

    def leave(self) -> None:
        """The client needs no more: decoding ends with the next token."""
        self.gone = True

    async def items(self) -> AsyncIterator[int | str]:
        """What was put, until the end.

        Raises:
            ApiError: decoding failed.
        """
        try:
            while (item := await self._items.get()) is not None:
                yield item
        finally:
            self.leave()
        if isinstance(error := self.result, Exception):
            what = str(error) if isinstance(error, TellError) else f"{type(error).__name__}: {first_line(error)}"
            raise ApiError(FAILED, what) from error


def usage_of(prompt: int, new: int) -> dict[str, int]:
    """``usage`` of an answer, in tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class Reply(Wire):
    """An answer of TELL's own engine: tokens in, text out.

    Attributes:
        finish: ``stop`` or ``length``, once the text has ended.
    """

    def __init__(self, text: AnswerText, prompt_tokens: int) -> None:
        super().__init__()
        self.text, self.prompt_tokens, self.finish = text, prompt_tokens, "stop"

    def token(self, token: int) -> bool:
        """Take a token; True: no more are needed."""
        self.put(token)
        return self.gone

    async def pieces(self) -> AsyncIterator[str]:
        """The text, piece by piece.

        Raises:
            ApiError: decoding failed.
        """
        async for token in self.items():
            if isinstance(token, int) and (piece := self.text.add(token)):
                yield piece
            if self.text.stopped:
                self.leave()
                return
        if piece := self.text.end():
            yield piece
        if isinstance(self.result, Answer) and not self.text.stopped:
            self.finish = self.result.finish

    async def whole(self) -> str:
        """The whole answer, as `tell eval` would score it."""
        async for _ in self.pieces():
            pass
        return self.text.whole

    @property
    def usage(self) -> dict[str, int]:
        return usage_of(self.prompt_tokens, len(self.text.ids))


class TextReply(Wire):
    """An answer of llama.cpp, which writes text.

    Attributes:
        finish: ``stop`` or ``length``, once the text has ended.
    """

    def __init__(self, prompt_tokens: int) -> None:
        super().__init__()
        self.prompt_tokens, self.finish = prompt_tokens, "stop"

    def piece(self, text: str) -> bool:
        """Take a piece of text; True: no more is needed."""
        self.put(text)
        return self.gone

    async def pieces(self) -> AsyncIterator[str]:
        """The text, piece by piece.

        Raises:
            ApiError: decoding failed.
        """
        async for piece in self.items():
            yield str(piece)
        if isinstance(self.result, Said):
            self.finish = "length" if self.result.finish == "length" else "stop"

    async def whole(self) -> str:
        """The whole answer."""
        return "".join([piece async for piece in self.pieces()])

    @property
    def usage(self) -> dict[str, int]:
        return usage_of(self.prompt_tokens, self.result.tokens if isinstance(self.result, Said) else 0)
