"""Keeping stdout clean for ``--json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

from tell.shown import clean


def say(text: object, *, err: bool = False) -> None:
    """Print a line: cleaned of control sequences on a terminal, unchanged for scripts."""
    stream = sys.stderr if err else sys.stdout
    print(clean(str(text)) if stream.isatty() else text, file=stream)


@contextmanager
def only_json(wanted: bool) -> Iterator[Callable[[object], None]]:
    """Yields a function that prints its argument as JSON on stdout.

    If JSON is wanted, anything else that is printed inside (by a library, by a user's scorer) goes to stderr.
    """
    out = sys.stdout

    def emit(data: object) -> None:
        print(json.dumps(data, ensure_ascii=False, indent=2), file=out)

    if wanted:
        with redirect_stdout(sys.stderr):
            yield emit
    else:
        yield emit
