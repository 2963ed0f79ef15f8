"""An answer on its way from the decoding thread to a client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from tell.decode.answer_text import AnswerText
from tell.decode.engine import Answer
from tell.errors import TellError, first_line
from tell.serve.chat_request import FAILED, ApiError


class Reply:
    """Tokens in, text out; made in the event loop that reads it.

    Attributes:
        gone: the client reads no more.
        finish: ``stop`` or ``length``, once the text has ended.
        result: of decoding, once it has ended; what came after a stop text included.
    """

    def __init__(self, text: AnswerText, prompt_tokens: int) -> None:
        self.text, self.prompt_tokens = text, prompt_tokens
        self.gone, self.finish = False, "stop"
        self.result: Answer | Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._tokens: asyncio.Queue[int | Answer | Exception] = asyncio.Queue()

    def token(self, token: int) -> bool:
        self._put(token)
        return self.gone

    def end(self, answer: Answer | Exception) -> None:
        self.result = answer
        self._put(answer)

    def _put(self, item: int | Answer | Exception) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._tokens.put_nowait, item)

    def leave(self) -> None:
        """The client needs no more: its row ends with the next token."""
        self.gone = True

    async def pieces(self) -> AsyncIterator[str]:
        """The text, piece by piece.

        Raises:
            ApiError: decoding failed.
        """
        try:
            while True:
                item = await self._tokens.get()
                if isinstance(item, Exception):
                    what = str(item) if isinstance(item, TellError) else f"{type(item).__name__}: {first_line(item)}"
                    raise ApiError(FAILED, what) from item
                if isinstance(item, Answer):
                    self.finish = item.finish
                    if piece := self.text.end():
                        yield piece
                    return
                if piece := self.text.add(item):
                    yield piece
                if self.text.stopped:
                    return
        finally:
            self.leave()

    async def whole(self) -> str:
        """The whole answer, as `tell eval` would score it."""
        async for _ in self.pieces():
            pass
        return self.text.whole

    @property
    def usage(self) -> dict[str, int]:
        new = len(self.text.ids)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": new, "total_tokens": self.prompt_tokens + new}
