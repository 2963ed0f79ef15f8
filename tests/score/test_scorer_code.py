"""The files of a user's scorer: which they are, read anew when they change, found where they were sent."""

import sys
from pathlib import Path

import pytest

from tell.score.custom import CustomScorer
from tell.score.scorer_code import ScorerCode, find_scorer_code, search_in


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current directory, with ``write(name, source)`` for files in it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # its time stamps are too coarse for a test
    before = set(sys.modules)

    def write(name: str, source: str, folder: Path = tmp_path / "here") -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")

    yield write
    search_in(None)
    for name in set(sys.modules) - before:
        if name.startswith("mine"):
            del sys.modules[name]


def score(spec: str) -> float:
    return next(iter(CustomScorer(spec).score(["a"], ["b"]).values())).value


def found(spec: str) -> ScorerCode:
    code = find_scorer_code(spec)
    assert code is not None
    return code


def test_a_package_with_what_it_imports(place, tmp_path):
    place("mine/__init__.py", "")
    place("mine/deep/__init__.py", "")
    place("mine/deep/scores.py", "import json\nimport numpy\nfrom ..words import w\ndef f(a, r): return [w] * len(a)\n")
    place("mine/words.py", "import mine_beside\nw = mine_beside.w\n")
    place("mine_beside.py", "w = 0.5\n")
    place("mine/other.py", "w = 1\n")
    code = found("mine.deep.scores:f")
    assert code.root == tmp_path / "here" and not code.installed
    assert set(code.files) == {"mine", "mine.deep", "mine.deep.scores", "mine.words", "mine_beside"}
    assert not [name for name in sys.modules if name.startswith("mine")]  # looked for without being run
    assert score("mine.deep.scores:f") == 0.5
    content = code.content
    place("mine/other.py", "w = 2\n")
    assert found("mine.deep.scores:f").content == content
    place("mine_beside.py", "w = 0.25\n")
    assert found("mine.deep.scores:f").content != content
    assert score("mine.deep.scores:f") == 0.25  # not what was imported before


def test_a_scorer_that_was_sent_comes_first(place, tmp_path):
    place("mine_a.py", "def f(a, r): return [0.25] * len(a)\n")
    place("mine_a.py", "def f(a, r): return [0.75] * len(a)\n", tmp_path / "sent")
    assert score("mine_a:f") == 0.25
    search_in(tmp_path / "sent")
    assert found("mine_a:f").root == tmp_path / "sent" and score("mine_a:f") == 0.75
    search_in(None)
    assert score("mine_a:f") == 0.25


def test_what_cannot_be_read_or_is_not_the_users(place):
    place("mine_broken.py", "def f(a, r: return\n")
    assert set(found("mine_broken:f").files) == {"mine_broken"}
    place("mine_space/scores.py", "def f(a, r): return [1.0] * len(a)\n")  # a package without __init__.py
    assert set(found("mine_space.scores:f").files) == {"mine_space.scores"}
    place("mine_space/scores.py", "from mine_space.words import w\nfrom mine_more.part import v\nf = w\n")
    place("mine_space/words.py", "w = 1\n")
    place("mine_more/part.py", "v = 1\n")
    assert set(found("mine_space.scores:f").files) == {"mine_space.scores", "mine_space.words", "mine_more.part"}
    installed = found("sacrebleu.metrics:BLEU")
    assert installed.installed and "sacrebleu.metrics.bleu" in installed.files  # of its own package alone
    assert {name.partition(".")[0] for name in installed.files} == {"sacrebleu"}
    for spec in ("tell.evaluate.arithmetic:solved", "nowhere_at_all:f", "nowhere.at.all:f", "sys:f", None):
        assert find_scorer_code(spec) is None
