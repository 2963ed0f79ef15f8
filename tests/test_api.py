"""The public API: what `tell` exports, what type checkers see, and what the documentation describes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tell

PAGE = Path(__file__).parents[1] / "docs/reference/api.md"


def test_type_checkers_see_what_is_exported():
    tree = ast.parse(Path(tell.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname: node.module for node in block.body for alias in node.names if alias.asname == alias.name}
    assert seen == tell._PLACES


@pytest.mark.parametrize("name", [name for name in tell.__all__ if name != "__version__"])
def test_every_name_is_there_and_documented(name):
    assert getattr(tell, name).__doc__
    assert name in dir(tell)


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'tune_all'"):
        tell.tune_all  # noqa: B018


def test_import_is_lazy():
    code = "import sys, tell; sys.exit(any(m in sys.modules for m in ('torch', 'pydantic', 'numpy', 'tell.config')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.skipif(not PAGE.exists(), reason="docs/reference/api.md is not written yet")
def test_the_page_describes_the_api():
    described = set(re.findall(r"^#+ `?tell\.(\w+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert described == set(tell.__all__) - {"__version__"}
