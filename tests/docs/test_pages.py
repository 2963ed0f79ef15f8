"""Pages name only what exists: verbs, flags, links, files, configuration keys, public calls."""

from __future__ import annotations

import ast
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

import tell
from doc_pages import ROOT, Block, blocks, pages, tell_commands
from tell.cli.main import run
from tell.config import make_config
from tell.config_docs import config_docs
from tell.studies.recipe import make_recipe

LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
COMMANDS = [pytest.param(block, words, id=f"{block}-{i}") for i, (block, words) in enumerate(tell_commands())]


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@cache
def help_of(verb: tuple[str, ...]) -> str:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run([*verb, "--help"]) == 0, verb
    return out.getvalue()


@pytest.mark.parametrize(("block", "words"), COMMANDS)
def test_every_command_has_a_known_verb_and_known_flags(
    block: Block, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    verb = tuple(words[: 2 if words[0] == "build" else 1])
    known = help_of(verb)
    for flag in (word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)):
        assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", known), f"{block}: {flag}"
    names = set(re.findall(r"^\| `([\w.]+)` \|", config_docs(), re.M))
    for word, value in pairwise(words):
        if word == "--set":
            assert value.partition("=")[0] in names, f"{block}: {value}"


@pytest.mark.parametrize("page", pages(), ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    for match in LINK.finditer(text):
        target, _, fragment = (match[1] or match[2]).partition("#")
        if target.startswith(("http", "mailto:")):
            continue
        place = (page.parent / target).resolve() if target else page
        assert place.exists(), f"{relative(page)}: {match[0]}"
        if fragment and place.suffix == ".md" and not fragment.startswith("only-"):
            assert fragment in anchors(place), f"{relative(page)}: {match[0]}"


@cache
def anchors(page: Path) -> set[str]:
    """The ids of a page's headings, as GitHub and MkDocs both make them for plain words."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    heads = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", pages(), ids=relative)
def test_code_of_a_page_is_valid(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tell":
                    assert hasattr(tell, node.attr), f"{block}: tell.{node.attr}"
        if block.language == "yaml":
            settings = yaml.safe_load(block.text)
            make_recipe(settings) if "grid" in settings else make_config(settings)


@pytest.mark.parametrize("page", pages(), ids=relative)
def test_paths_in_backticks_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for path in re.findall(r"`((?:src|tests|docs|recipes|examples|bench)/[\w./-]*\w)`", text):
        assert (ROOT / path).exists(), f"{relative(page)}: {path}"


def test_pages_that_code_mentions_exist() -> None:
    files = [path for folder in ("src", "recipes", "bench") for path in (ROOT / folder).rglob("*")]
    for path in files:
        if path.suffix in (".py", ".yaml", ".md", ".c"):
            for page in re.findall(r"\bdocs/[\w/]+\.md\b", path.read_text(encoding="utf-8")):
                assert (ROOT / page).exists(), f"{relative(path)}: {page}"


def test_every_page_is_in_the_site() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    pages_of_site = {p.relative_to(ROOT / "docs").as_posix() for p in pages() if p.is_relative_to(ROOT / "docs")}
    assert pages_of_site <= listed


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs/reference/python.md").read_text(encoding="utf-8")
    shown = {path.rpartition(".")[2] for path in re.findall(r"^::: (\S+)", text, re.M)}
    assert shown == set(tell.__all__) - {"__version__"}


def test_pictures_for_light_and_dark_say_the_same() -> None:
    light, dark = ((ROOT / f"docs/assets/method-{kind}.svg").read_text(encoding="utf-8") for kind in ("light", "dark"))
    assert re.sub(r"#[0-9a-f]{6}", "", light) == re.sub(r"#[0-9a-f]{6}", "", dark) and light != dark
