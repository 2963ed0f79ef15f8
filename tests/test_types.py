"""Types: mypy finds nothing wrong, and `Any` stays rare."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tell

MOST_ANY = 40
PACKAGE = Path(tell.__file__).parent
ROOT = Path(__file__).parents[1]


def any_annotations(path: Path) -> list[str]:
    """Places in a file where a parameter or variable is annotated as ``Any``, alone or in a union."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        annotation = node.annotation if isinstance(node, ast.arg | ast.AnnAssign) else None
        while isinstance(annotation, ast.BinOp):
            annotation = annotation.left
        if isinstance(annotation, ast.Name) and annotation.id == "Any":
            found.append(f"{path.relative_to(PACKAGE)}:{annotation.lineno}")
    return found


def test_mypy_finds_nothing():
    pytest.importorskip("mypy", reason='needs mypy: pip install "tell-llm[test]"')
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_any_is_rare():
    found = [place for path in sorted(PACKAGE.rglob("*.py")) for place in any_annotations(path)]
    assert len(found) < MOST_ANY, "\n".join(found)
