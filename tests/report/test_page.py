"""The page of a run: true to its files, whole without any of them, and safe against what a model may write."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from report.sample import ARMS, HOSTILE, make_sample
from tell.errors import TellError
from tell.files import write_json
from tell.folder import RunFolder
from tell.names import ARMS as ARM
from tell.parts import PARTS
from tell.report import render, write_page
from tell.report.page import prose, stylesheet
from tell.score.verdict import verdict

VOID = {"meta", "input", "br", "hr", "img", "link", "base"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; remembers tags that do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            self.wrong.append(tag)
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_sample(tmp_path_factory.mktemp("run") / "support-1")


@pytest.fixture(scope="module")
def html(folder: RunFolder) -> str:
    return render(folder)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def sections_of(page: Page) -> list[str | None]:
    return [attrs.get("id") for attrs in page.all("section")]


def test_every_tag_closes_in_order(page: Page) -> None:
    assert (page.wrong, page.open) == ([], [])


def test_sections_stand_in_the_order_promised(page: Page) -> None:
    wanted = [
        "scores",
        "differences",
        "parts",
        "losses",
        "mixture",
        "answers",
        "forgetting",
        "benchmarks",
        "findings",
        "anchor",
        "again",
        "words",
    ]
    assert sections_of(page) == wanted


def test_nothing_is_loaded_and_no_script_runs(page: Page, html: str) -> None:
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image", "use", "video"}
    for tag, attrs in page.tags:
        assert not [a for a in attrs if a.startswith("on") or a in ("src", "style", "xlink:href", "srcset")], (
            tag,
            attrs,
        )
        assert attrs.get("href", "#").startswith("#")
    style = html[html.index("<style>") + 7 : html.index("</style>")]
    assert "url(" not in style and "@import" not in style and "http" not in style


def test_policy_forbids_loads_and_allows_this_stylesheet_alone(page: Page, html: str) -> None:
    import base64
    import hashlib

    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    style = html[html.index("<style>") + 7 : html.index("</style>")]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"style-src 'sha256-{digest}'" in policy
    assert stylesheet()[1] == f"sha256-{digest}"
    assert "unsafe" not in policy and "script-src" not in policy


def test_hostile_answers_are_text_and_nothing_else(html: str, page: Page) -> None:
    assert "<script" not in html.lower() and "<img" not in html.lower() and "evil.example/?q=1&#34;" in html
    assert html.count("</style>") == 1 and html.count("</title>") == len(page.all("title"))
    for text in (HOSTILE[0], HOSTILE[1], HOSTILE[3], HOSTILE[4]):
        assert text in page.text


def test_hidden_characters_are_shown_not_printed(html: str, page: Page) -> None:
    raw = re.findall(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", html
    )
    assert raw == []
    for code in ("U+0000", "U+001B", "U+202E", "U+2066", "U+200B", "U+FEFF", "U+D800"):
        assert code in page.text
    assert 'title="right-to-left override"' in html
    html.encode("utf-8")


def test_numbers_equal_metrics_json(folder: RunFolder, html: str) -> None:
    metrics = json.loads(folder.metrics.read_text(encoding="utf-8"))
    shown = set(re.findall(r'<data value="([^"]+)">', html))
    bounds = set(re.findall(r'data-low="([^"]+)" data-high="([^"]+)"', html))
    entries = [e for part in ("arms", "differences") for row in metrics[part].values() for e in row.values()]
    for part in ("arms", "differences"):
        entries += [e for row in metrics["forgetting"][part].values() for s in row.values() for e in s.values()]
        entries += [e for row in metrics["benchmarks"][part].values() for e in row.values()]
    assert len(entries) > 40
    for entry in entries:
        assert str(entry["value"]) in shown
        assert tuple(str(x) for x in entry["ci"]) in bounds
    for counts in ("rows", "unique_rows", "tokens", "trained_tokens", "unit_tokens"):
        assert {str(v) for v in metrics["mixture"][counts].values()} <= shown


def test_a_row_shows_its_value_beside_its_name(html: str, folder: RunFolder) -> None:
    metrics = json.loads(folder.metrics.read_text(encoding="utf-8"))
    table = html[html.index('id="scores"') :]
    for arm in ARMS:
        entry = metrics["arms"][arm]["schema_adherence"]
        row = re.search(rf"<th[^>]*>{re.escape(arm)}[\s<].*?</tr>", table, re.S)
        assert row and f"{100 * entry['value']:.1f}\u202f%" in row[0]
        assert f"{100 * entry['ci'][0]:.1f} to {100 * entry['ci'][1]:.1f}" in row[0]


def test_verdict_is_the_verdict(page: Page, folder: RunFolder) -> None:
    metrics = json.loads(folder.metrics.read_text(encoding="utf-8"))
    assert verdict(metrics) in page.text.replace("\u202f%", " %")


def test_tables_and_figures_are_labelled(page: Page) -> None:
    assert all("scope" in attrs for attrs in page.all("th"))
    figures = [attrs for attrs in page.all("svg") if attrs.get("role") == "img"]
    assert len(figures) >= 5
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for figure in figures:
        assert set(figure["aria-labelledby"].split()) <= set(ids)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1 and levels[0] == 1


def test_run_can_be_repeated_from_the_page(page: Page) -> None:
    for text in ("tell tune examples/support/train.jsonl", "lora_targets: all-linear", "5.10.0", "AMD EPYC", "42"):
        assert text in page.text
    assert "attention: blocks; decoding: TELL's own engine <kernels>" in page.text
    assert re.search(r"[0-9a-f]{64}", page.text)


FILES = [
    "metrics.json",
    "findings.json",
    "run.yaml",
    "anchor.json",
    "manifest.parquet",
    "plan.json",
    "status.json",
    *(f"predictions/{arm}.jsonl" for arm in ("tell", "base")),
    "logs/tell.jsonl",
]


@pytest.mark.parametrize("name", FILES)
def test_any_file_may_be_missing(name: str, tmp_path: Path) -> None:
    folder = make_sample(tmp_path / "run", rows=12)
    (folder.root / name).unlink()
    page = Page(render(folder))
    assert page.wrong == [] and sections_of(page)[-1] == "words"
    gone = {"metrics.json": "scores", "anchor.json": "anchor"}.get(name)
    assert gone not in sections_of(page)


@pytest.mark.parametrize("name", FILES)
def test_any_file_may_be_broken_and_is_then_named(name: str, tmp_path: Path) -> None:
    folder = make_sample(tmp_path / "run", rows=12)
    (folder.root / name).write_bytes(b'{"a": [<b>\xff\xfe')
    page = Page(render(folder))
    assert page.wrong == []
    assert f"{name} could not be read" in page.text


def test_empty_folder_gives_a_page_that_says_so(tmp_path: Path) -> None:
    page = Page(render(RunFolder(tmp_path)))
    assert page.wrong == []
    assert "This run has no scores yet." in page.text
    assert sections_of(page) == ["findings", "again", "words"]


def test_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TellError, match="no such run folder"):
        render(RunFolder(tmp_path / "nowhere"))


@pytest.mark.parametrize("arm", ["base", "tell", "sft-matched"])
def test_one_arm_alone(arm: str, tmp_path: Path) -> None:
    folder = make_sample(tmp_path / "run", arms=(arm,), rows=12)
    if arm == "base":
        folder.manifest.unlink()
    page = Page(render(folder))
    assert page.wrong == []
    assert "differences" not in sections_of(page)
    assert ("losses" in sections_of(page)) == (arm != "base")
    assert ("mixture" in sections_of(page)) == (arm != "base")


def test_no_arm_is_marked_ahead_unless_every_difference_excludes_0(folder: RunFolder, tmp_path: Path) -> None:
    metrics = json.loads(folder.metrics.read_text(encoding="utf-8"))
    run = RunFolder(tmp_path)

    def marked(low: float) -> bool:
        for name, row in metrics["differences"].items():
            row["schema_adherence"]["ci"] = [0.1 if name != "tell - sft-matched" else low, 0.9]
        write_json(run.metrics, metrics)
        return "ahead of all others" in render(run)

    assert marked(0.01)
    assert not marked(0.0)
    assert not marked(-0.2)


def test_unfinished_run_says_so(tmp_path: Path) -> None:
    folder = make_sample(tmp_path / "run", rows=12)
    folder.set_status("failed", stage="train", error="out of <memory>")
    page = Page(render(folder))
    assert "This run failed" in page.text and "out of <memory>" in page.text


def test_unknown_metric_and_numbers_that_are_none(tmp_path: Path) -> None:
    folder = make_sample(tmp_path / "run", rows=12)
    metrics = json.loads(folder.metrics.read_text(encoding="utf-8"))
    metrics["arms"]["base"]["my_<b>score"] = {"value": 3.25, "ci": None, "n": 12}
    metrics["arms"]["tell"]["field_accuracy"] = {"value": float("nan"), "ci": [None, None], "n": 0}
    folder.metrics.write_text(json.dumps(metrics), encoding="utf-8")
    page = Page(render(folder))
    assert "My <b>score" in page.text and "3.250" in page.text and "nan" not in page.text.lower().split()


def test_same_folder_gives_the_same_page(folder: RunFolder, html: str) -> None:
    assert render(folder) == html


def test_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = make_sample(tmp_path / "run", rows=12)
    path = write_page(folder)
    assert path == folder.report and path.read_text(encoding="utf-8") == render(folder)
    assert [p.name for p in folder.root.iterdir() if p.name.startswith(".")] == []
    folder.report.unlink()
    folder.report.mkdir()
    with pytest.raises(TellError, match="cannot be written"):
        write_page(folder)
    assert [p.name for p in folder.root.iterdir() if p.name.startswith(".")] == []


def test_report_imports_no_torch(folder: RunFolder) -> None:
    code = (
        "import sys; from tell.report import render; from tell.folder import RunFolder; "
        f"render(RunFolder({str(folder.root)!r})); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_benchmarks_say_how_they_were_asked(html: str, page: Page) -> None:
    part = html[html.index('id="benchmarks"') : html.index('id="findings"')]
    assert "The mean over 2 tasks, 0 or 4 shots, at most 40 questions of each task" in page.text
    assert "lm-evaluation-harness 0.4.9." in page.text
    assert part.count('class="plotted') == 2 and "minus base" in part
    assert part.index("agieval_sat_en") > part.index("All tasks and measures")


def test_without_benchmarks_there_is_no_such_section(folder: RunFolder, tmp_path) -> None:
    copy = RunFolder(shutil.copytree(folder.root, tmp_path / "run"))
    metrics = json.loads(copy.metrics.read_text(encoding="utf-8"))
    del metrics["benchmarks"]
    copy.metrics.write_text(json.dumps(metrics), encoding="utf-8")
    assert 'id="benchmarks"' not in render(copy)


def with_parts(tmp_path: Path, readout: list) -> Page:
    """The page of a run with all pairs of `PARTS` but those with examples in context."""
    folder = make_sample(tmp_path / "run")
    metrics = json.loads(folder.metrics.read_text(encoding="utf-8"))
    gap = {"value": 0.08, "ci": [0.02, 0.14], "n": 100}
    for one, other in (pair for part in PARTS for pair in part.pairs if "icl" not in pair):
        metrics["differences"][f"{one} - {other}"] = {"schema_adherence": gap}
    write_json(folder.metrics, metrics | {"readout": readout})
    return Page(render(folder))


def section_text(page: Page, name: str) -> str:
    """The words of a page from one section's heading to the next one's."""
    names = sections_of(page)
    heading = {"parts": "What each part brought"}[name]
    return page.text.split(heading, 1)[1].split("Training", 1)[0] if name in names else ""


def test_what_each_part_brought(tmp_path: Path) -> None:
    """Every pair that was measured, with the part that the two differ by; and each field's readout."""
    fields = [
        {"field": "category", "classes": 6, "used": True, "accuracy": 0.9, "loss": 0.35, "prior_loss": 1.7},
        {"field": "<b>tags</b>[]", "classes": 3, "used": False, "accuracy": 0.4, "loss": 1.9, "prior_loss": 1.8},
    ]
    page = with_parts(tmp_path, fields)
    assert (page.wrong, page.open) == ([], []) and not page.all("b")
    text = " ".join(section_text(page, "parts").split())
    for part in PARTS:
        assert part.about in text
        for one, other in part.pairs:
            assert (f"{ARM[one].label} − {ARM[other].label}" in text or f"{one} − {other}" in text) == (
                "icl" not in other
            )
    assert "90.0 %" in text and "0.350" in text and "1.700" in text
    assert text.count("not used") == 1 and "<b>tags</b>[] not used" in text


def test_without_parts_and_readout_there_is_no_such_section(tmp_path: Path) -> None:
    folder = make_sample(tmp_path / "run", arms=("base", "sft-matched", "tell"))
    assert "parts" not in sections_of(Page(render(folder)))


@pytest.mark.parametrize("readout", [3, "x", [3], [{}], [{"field": None, "classes": "many", "loss": []}], {"a": 1}])
def test_a_readout_that_is_none(tmp_path: Path, readout: object) -> None:
    page = with_parts(tmp_path, readout)
    assert (page.wrong, page.open) == ([], []) and "parts" in sections_of(page)


def test_settings_that_were_searched(tmp_path: Path) -> None:
    """Each trial with its value, folds counted from one, no column that says nothing; nothing in it runs."""
    folder = make_sample(tmp_path / "run", rows=12)
    trial = {"train.learning_rate": 2e-3, "mix.repeat": 24, "general": 1.0, "folds": [0], "value": 0.625}
    decoding = {"generate.closed": "likelihood", "folds": [1, 2], "value": 0.5}
    one = {"metric": "field_accuracy", "tried": [trial, decoding], "why": "<script>why</script>", "chosen": {}}
    write_json(folder.search, {"arms": {"tell": one, "sft-tuned": {**one, "tried": []}}})
    page = Page(render(folder))
    assert (page.wrong, page.open) == ([], []) and "search" in sections_of(page) and not page.all("script")
    text = "".join(page.text.split())  # cells follow one another
    assert "LearningrateRepetitionsFoldsheldoutClosedfieldsFieldaccuracy" in text
    assert "0.002241–62.5%" in text and "––2,3likelihood50.0%" in text


@pytest.mark.parametrize(
    "arms", [3, [3], {"tell": 3}, {"tell": {"tried": [3, {"folds": "x", "value": "<b>"}], "metric": []}}]
)
def test_a_search_that_is_none(tmp_path: Path, arms: object) -> None:
    folder = make_sample(tmp_path / "run", rows=12)
    write_json(folder.search, {"arms": arms})
    page = Page(render(folder))
    assert (page.wrong, page.open) == ([], []) and not page.all("b")


@pytest.mark.parametrize(
    ("note", "sentence"),
    [
        ("columns not used: Urgency", "Columns not used: Urgency."),
        ("mails.xlsx: columns not used", "mails.xlsx: columns not used."),
        ("train.max_length: 3 rows are cut", "train.max_length: 3 rows are cut."),
        ("is it? yes!", "Is it? yes!"),
        (" ", ""),
    ],
)
def test_notes_are_sentences_and_names_stay_as_they_are(note: str, sentence: str) -> None:
    assert prose(note) == sentence


def test_the_machine_is_described_once(tmp_path: Path) -> None:
    folder = make_sample(tmp_path)
    findings = json.loads(folder.findings.read_text())
    findings["computed"]["number format"] = findings["machine"]["dtype_reason"]
    write_json(folder.findings, findings)
    text = write_page(folder).read_text()
    assert text.count(findings["machine"]["dtype_reason"]) == 1 and findings["machine"]["cpu"] in text
