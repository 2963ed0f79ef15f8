"""The architecture page names a line for each extension; the line is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/explanation/architecture.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"`(src/[^`]+)`, line (\d+): `([^`]+)`", PAGE)


def test_every_kind_of_extension_has_an_example():
    assert len(EXAMPLES) == 9


@pytest.mark.parametrize(("path", "line", "example"), EXAMPLES)
def test_the_example_is_on_its_line(path, line, example):
    named = re.search(r'"[^"]+"', example).group()
    assert named in (ROOT / path).read_text(encoding="utf-8").splitlines()[int(line) - 1], f"{path}: {example}"
