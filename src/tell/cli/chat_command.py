"""``tell chat``: talk to a tuned model, anchor and adapter applied."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from tell.arm import Constrain
from tell.cli.common import argument, check_arm, count, option, takes_options, trust_switch
from tell.errors import TellError, did_you_mean
from tell.files import MOST_TEXT
from tell.shown import clean, one_line

if TYPE_CHECKING:
    from tell.verbs.chat import ChatSession

COMMANDS = ("/reset", "/quit", "/help")


@dataclass(frozen=True)
class ChatOptions:
    run: Path = argument("RUN", "run folder")
    message: str | None = argument("MESSAGE", "answer this and exit; also read from stdin", None)
    arm: str = option("--arm", "tell, base or another arm of the run", "ARM", check_arm, default="tell")
    seed: int | None = option("--seed", "sample with this seed", "N", count)
    greedy: bool | None = option("--greedy/--no-greedy", "decode greedily")
    constrain: Constrain | None = option(
        "--constrain", "off, schema or labels; default: as in the run", "WHAT", get_args(Constrain)
    )
    trust_remote_code: bool = trust_switch()


@takes_options
def chat(options: ChatOptions) -> None:
    """Chat with the tuned model, or with --arm base to compare."""
    message = options.message
    if message is None and not sys.stdin.isatty():
        message = _piped()
    if message is not None and not message.strip():
        raise TellError("the message is empty", where="MESSAGE", remedy="Write one, or leave out -m to chat.")
    import tell

    session = tell.chat(
        options.run,
        arm=options.arm,
        seed=options.seed,
        greedy=options.greedy,
        constrain=options.constrain,
        trust_remote_code=options.trust_remote_code,
    )
    print(one_line(session.describe()), file=sys.stderr)
    if message is not None:
        _say(session, message)
    else:
        _converse(session)


def _piped() -> str:
    """The message from a pipe.

    Raises:
        TellError: it is too long, or no text.
    """
    try:
        text = sys.stdin.read(MOST_TEXT + 1)
    except UnicodeDecodeError as error:
        raise TellError("is not UTF-8", where="the message from the pipe", remedy="Save it as UTF-8.") from error
    if len(text) > MOST_TEXT:
        what = f"has more than {MOST_TEXT:,} characters"
        raise TellError(what, where="the message from the pipe", remedy="Shorten it.")
    return text


def _converse(session: ChatSession) -> None:
    """Read, answer, repeat, until /quit or the end of the input."""
    with suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history in input()
    print("/reset starts over, /quit exits; Ctrl-C stops an answer", file=sys.stderr)
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if not text:
            continue
        if text == "/quit":
            return
        if text == "/reset":
            session.reset()
            print("new conversation", file=sys.stderr)
        elif text == "/help":
            print(", ".join(COMMANDS), file=sys.stderr)
        elif text.startswith("/") and (word := text.split()[0]) not in COMMANDS and did_you_mean(word, COMMANDS):
            print(f"unknown command {word}; did you mean {did_you_mean(word, COMMANDS)}?", file=sys.stderr)
        else:
            try:
                _say(session, text)
            except KeyboardInterrupt:
                print(" (stopped)", file=sys.stderr)
            except TellError as error:  # e.g. the conversation exceeds the context; the user can reset it
                print(f"error: {one_line(str(error))}", file=sys.stderr)


def _say(session: ChatSession, text: str) -> None:
    """Print the answer to ``text`` as it streams. On a terminal a model must not move the cursor or set the title."""
    steer = sys.stdout.isatty()
    for piece in session.stream(text):
        sys.stdout.write(clean(piece) if steer else piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if session.cut:
        print("the answer is cut off at the limit of tokens", file=sys.stderr)
