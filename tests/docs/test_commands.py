"""Blocks that a page marks with ``<!-- run -->`` work, in the page's order, with tiny models and little data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from doc_pages import ROOT, blocks, pages, run_block
from homes import home_with_kernels

MARKED = [page for page in pages() if any(block.mark for block in blocks(page))]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all pages."""
    return home_with_kernels(tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize("page", MARKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_commands_of_a_page_work(
    page: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]
) -> None:
    tiny = tiny_model("qwen2")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copy(ROOT / "examples/tickets/tickets.csv", tmp_path)
    shutil.copy(ROOT / "examples/reviews/train.jsonl", tmp_path / "tickets.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TELL_HOME", str(home))
    for block in blocks(page):
        if block.mark:
            run_block(block, tmp_path, tiny)
