"""Processes that are found again by a record of them, also by another process than the one that started them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psutil

STOPPING = 20.0  # seconds until a process that was told to stop has ended
SAME = 1.0  # seconds by which the start of one process may differ between two readings


def find_process(record: Mapping[str, Any]) -> psutil.Process | None:
    """The process of a record with its number, ``pid``, and its start, ``created``, while it runs.

    The number alone may have become another process's. A zombie has ended.
    """
    try:
        process = psutil.Process(int(record["pid"]))
        same = abs(process.create_time() - float(record["created"])) < SAME
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, LookupError, TypeError, ValueError, OverflowError):
        return None


def wait_ended(record: Mapping[str, Any], *, kill: bool) -> bool:
    """Wait until the process of a record, which was told to stop, has ended; whether it has, or was killed."""
    end = time.monotonic() + STOPPING
    while (process := find_process(record)) is not None and time.monotonic() < end:
        time.sleep(0.05)
    if process is not None and kill:
        with suppress(psutil.Error):
            process.kill()
            process.wait(1)
    return process is None or kill
