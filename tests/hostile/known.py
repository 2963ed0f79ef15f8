"""Faults that are known and not mended yet: kind of input, and what the fault's text or its input holds.

A line here is a debt: it goes when the fault does.
"""

from __future__ import annotations

import re

KNOWN: list[tuple[str, re.Pattern[str]]] = [
    ("layout", re.compile("'(float|int)' object is not iterable")),  # "history" that is a number
    ("schema", re.compile("unhashable type|has no attribute 'decode'")),  # "$schema" that is no text
]
