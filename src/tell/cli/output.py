"""Keeping stdout clean for ``--json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from tell.shown import clean


def say(text: Any, *, err: bool = False) -> None:
    """Print a line; on a terminal without what steers it, for scripts as it is."""
    stream = sys.stderr if err else sys.stdout
    print(clean(str(text)) if stream.isatty() else text, file=stream)


@contextmanager
def only_json(wanted: bool) -> Iterator[Callable[[Any], None]]:
    """Yields a function that prints its argument as JSON on stdout.

    Where JSON is wanted, whatever else is printed inside (by a library, by a user's scorer) goes to stderr.
    """
    out = sys.stdout

    def emit(data: Any) -> None:
        print(json.dumps(data, ensure_ascii=False, indent=2), file=out)

    if wanted:
        with redirect_stdout(sys.stderr):
            yield emit
    else:
        yield emit
