"""The page and the terminal output of `tell look`: whole, safe against hostile rows, and never over another file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from report.test_page import Page
from tell.cli.display import make_console
from tell.cli.look_command import _print
from tell.cli.main import run

HOSTILE = [
    "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "</pre></style></title><svg onload=alert(3)>",
    "\u202egnp.exe \x1b[2J\x1b]8;;http://evil.example\x07 \x00 \u200b",
    "{{ 7919 * 7919 }} {% raw %} [red]bold[/red] :skull:",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = [{HOSTILE[0]: "x", "prompt": f"{HOSTILE[i % 4]} {i}", "completion": HOSTILE[i % 4]} for i in range(40)]
    rows += [dict(rows[0], completion=HOSTILE[1]), dict(rows[1], completion="")]
    (tmp_path / "<b>.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def look(*argv: str) -> int:
    return run(["look", "<b>.jsonl", "--columns", "prompt=prompt,answer=completion", "--kind", "label", *argv])


@pytest.mark.parametrize("model", ["llama", None])
def test_the_page_is_whole_and_loads_nothing(model, folder, tiny_model):
    anchor = f"{HOSTILE[0]} Sort."
    assert look("--model", str(tiny_model(model)) if model else "someone/not-here", "--anchor", anchor) == 0
    html = (folder / "b.look.html").read_text(encoding="utf-8")
    page = Page(html)
    assert (page.wrong, page.open) == ([], [])
    assert [attrs["id"] for attrs in page.all("section")] == [
        *("rows", "balance"),
        *(["lengths"] if model else []),
        *("findings", "intervals"),
    ]
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for tag, attrs in page.tags:
        assert not [a for a in attrs if a.startswith("on") or a in ("src", "style", "srcset", "href")], (tag, attrs)
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    assert (
        html.count("</style>") == 1
        and HOSTILE[0] in page.text
        and HOSTILE[1] in page.text
        and "62710561" not in page.text
    )
    assert not re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e]", html) and "U+202E" in page.text
    marks = [attrs["class"].split() for attrs in page.all("mark")]
    assert (["trained"] in marks, ["anchor"] in marks) == (bool(model), bool(model))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_terminal_gets_no_control_sequences_of_the_data(folder, tiny_model, capsys):
    assert look("--model", str(tiny_model("llama")), "--anchor", "Sort.", "--rows", "40") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out and "\x00" not in out
    assert "[red]bold[/red]" in out and ":skull:" in out
    assert "⟪Sort.⟫" in out and re.search(r"⟦[^⟦⟧]+<\|im_end\|>⟧", out)
    assert "page     b.look.html" in out


def test_styles_on_a_terminal_do_not_depend_on_colour(folder, tiny_model, capsys, monkeypatch):
    assert look("--model", str(tiny_model("llama")), "--anchor", "Sort.", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["page"] is None and not list(folder.glob("*.html"))
    for name in ("NO_COLOR", "FORCE_COLOR"):  # a terminal without colour
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    _print(make_console(), found)
    styles = set(re.findall(r"\x1b\[([\d;]+)m", capsys.readouterr().out))
    assert {"1;4", "3;7"} <= styles
    assert not [style for style in styles if re.search(r"\b[34]\d\b", style)]


def test_a_page_replaces_a_page_and_nothing_else(folder, capsys):
    assert look("--model", "someone/not-here", "--html", "page.html") == 0
    assert look("--model", "someone/not-here", "--html", "page.html") == 0
    (folder / "notes.html").write_text("mine", encoding="utf-8")
    assert look("--model", "someone/not-here", "--html", "notes.html") == 2
    assert "notes.html: already exists and is not a report by tell" in capsys.readouterr().err
    assert (folder / "notes.html").read_text(encoding="utf-8") == "mine"
    assert look("--model", "someone/not-here", "--html", str(folder / "<b>.jsonl" / "page.html")) == 2
    assert look("--model", "someone/not-here", "--html", str(folder)) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["<b>.jsonl", "notes.html", "page.html"]


def test_data_flags_of_plan_are_taken(capsys):
    from tell.cli.common import FLAGS

    assert run(["look", "--help"]) == 0
    shown = capsys.readouterr().out
    taken = {flag.name for flag in FLAGS if re.search(rf"{flag.name}\b(?!-)", shown)}
    data = {flag.name for flag in FLAGS if "plan" in flag.verbs and flag.panel in ("Data", "Model and anchor")}
    assert taken == data | {"--seed"}
