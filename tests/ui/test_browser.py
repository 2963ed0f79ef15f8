"""The page in a real browser: from a dropped spreadsheet to a chat answer, through reloads and a killed server."""

from __future__ import annotations

import base64
import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from filelock import FileLock

from tell.files import write_json
from tell.folder import RunFolder
from tell.ui.jobs import Job
from tell.ui.run_view import tuning
from tell.ui.ui_root import UiRoot
from ui.made_runs import make_run
from ui.ui_server import UiServer
from workbooks import xlsx

sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)")
WAIT = 120_000  # milliseconds until a test gives up; nothing is timed
ROWS = 240  # so many that the run outlives a kill of the page
LABELS = ("billing", "bug", "other")
EVIL = '<script>alert(1)</script><img src=x onerror="alert(1)">'
DROP = """([text, name]) => {
    const data = new DataTransfer(), bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    data.items.add(new File([bytes], name));
    document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
}"""
SELECT = """(log) => {
    const text = log.firstChild, from = text.data.indexOf("line 30");
    getSelection().setBaseAndExtent(text, from, text, from + 7);
    log.scrollTop = 30;
}"""


def _bad(line: str) -> bool:
    """Whether a line of the console is a fault; that a killed server does not answer is none."""
    return "Content Security" in line or "swapError" in line or "SyntaxError" in line


class Watched:
    """A browser, and what its pages asked for, said and showed."""

    def __init__(self, browser) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 900})
        self.hosts, self.said = set(), []
        self.context.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname))

    def page(self):
        page = self.context.new_page()
        page.set_default_timeout(WAIT)
        page.on("dialog", lambda dialog: (self.said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("console", lambda line: self.said.append(line.text) if _bad(line.text) else None)
        return page


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as made:
        opened = made.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def tab_to(page, wanted, *, most: int = 80) -> None:
    """Move the focus by the Tab key alone."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if wanted.evaluate("element => element === document.activeElement"):
            return
    raise AssertionError(f"{wanted} cannot be reached by the keyboard")


def enter(page, wanted) -> None:
    """Follow a link, press a button or open details by the keyboard alone."""
    tab_to(page, wanted)
    page.keyboard.press("Enter")


def check_page(page) -> None:
    """No serious finding of axe in both themes and on both widths, and no sideways scrolling."""
    from axe_playwright_python.sync_playwright import Axe

    page.evaluate(Axe().axe_script)
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, (page.url, width)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            found = page.evaluate("axe.run({ resultTypes: ['violations'] })")
            assert found["passes"]
            bad = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
            assert not bad, (page.url, width, scheme, [(v["id"], v["nodes"][0]["html"][:200]) for v in bad])
    page.set_viewport_size({"width": 1280, "height": 900})


def check_framed(page, report: Path) -> None:
    """As `check_page`, for what a sandboxed frame shows; no script can look into that."""
    page.goto("about:blank")
    page.set_content(report.read_text("utf-8"))
    check_page(page)


def test_from_a_spreadsheet_to_a_chat_answer(browser, tiny_model, tmp_path):
    expect = sync_api.expect
    rows = [
        (f"mail {i} about {LABELS[i % 3]}", EVIL if i % 7 == 0 else f"text {i}", LABELS[i % 3]) for i in range(ROWS)
    ]
    book = xlsx(tmp_path / "tickets.xlsx", [("Subject", "Body", "Queue"), *rows], Second=[("a",), ("b",)])
    root, home = UiRoot(tmp_path / "root"), tmp_path / "home"
    root.path.mkdir()
    server = UiServer(root.path, home)
    try:
        watched = Watched(browser)
        page = watched.page()
        page.goto(server.address)
        assert "token" not in page.url
        enter(page, page.get_by_role("link", name="New run"))
        page.wait_for_url("**/data")
        check_page(page)
        page.evaluate(DROP, [base64.b64encode(book.read_bytes()).decode(), "../My tickets.xlsx"])
        page.wait_for_url("**/data?data=uploads%2FMy-tickets.xlsx")
        expect(page.get_by_label("Prompt column 1")).to_be_visible(timeout=WAIT)
        enter(page, page.get_by_text("More on how it is read"))
        tab_to(page, page.get_by_label("Model"))
        page.keyboard.type(str(tiny_model("llama")))
        page.keyboard.press("Enter")
        page.wait_for_url("**/data?*model=*")
        expect(page.get_by_label("Prompt column 1")).to_be_visible(timeout=WAIT)
        tab_to(page, page.get_by_label("Prompt column 1"))
        page.keyboard.type("Sub")  # picks the column that begins so
        enter(page, page.get_by_label("One more: prompt column"))
        tab_to(page, page.get_by_label("Prompt column 2"))
        page.keyboard.type("Bo")
        tab_to(page, page.get_by_label("Answer column 1"))
        page.keyboard.type("Q")
        enter(page, page.get_by_role("button", name="Use these columns"))
        expect(page.get_by_text(f"{ROWS} rows of the sheet Tickets")).to_be_visible(timeout=WAIT)
        columns = page.locator("select:not([name=data])").evaluate_all("all => all.map(one => one.value)")
        assert columns == ["Subject", "Body", "", "Queue", ""]
        assert page.get_by_label("Sheet").locator("option").all_inner_texts() == ["Tickets", "Second"]
        expect(page.locator("mark.trained").nth(1)).to_be_visible(timeout=WAIT)
        check_page(page)
        enter(page, page.get_by_role("button", name="Plan a run"))
        page.wait_for_url("**/plan?*")
        enter(page, page.get_by_text("Arms: what is trained"))
        for arm in page.locator("[name=arm]:checked").evaluate_all("all => all.map(one => one.value)"):
            if arm not in ("base", "tell"):
                tab_to(page, page.locator(f'[name=arm][value="{arm}"]'))
                page.keyboard.press("Space")
        enter(page, page.get_by_role("button", name="Plan again"))
        expect(page.locator("pre.command")).to_contain_text("--arms=base,tell", timeout=WAIT)
        check_page(page)
        enter(page, page.get_by_role("button", name="Start"))
        page.wait_for_url("**/run/runs/My-tickets-1")

        # In mid-run: a second tab, a reload, and the server killed and started again.
        state = page.locator("#live").get_by_role("status")
        expect(state).to_have_text(re.compile("running"), timeout=WAIT)
        process = tuning(root, "runs/My-tickets-1").process()
        second = watched.page()
        second.goto(page.url)
        page.reload()
        server.kill()
        assert process.is_running()
        expect(page.locator("#trouble")).to_have_text(re.compile("does not answer.*goes on"), timeout=WAIT)
        server = UiServer(root.path, home, port=server.port)
        for tab in (page, second):
            expect(tab.locator("#live").get_by_role("status")).to_have_text(re.compile("done"), timeout=WAIT)
            expect(tab.get_by_text("2 of 2 arms")).to_be_visible()
            expect(tab.locator("#trouble")).to_be_empty()
            expect(tab.locator("#nav [aria-disabled]")).to_have_count(0)  # Report, Chat and Ship are there now

        enter(page, page.get_by_role("link", name="Runs"))
        enter(page, page.get_by_role("link", name="runs/My-tickets-1"))
        page.wait_for_url("**/run/runs/My-tickets-1")
        check_page(page)
        enter(page, page.locator("#nav").get_by_role("link", name="Chat"))
        enter(page, page.locator("#load"))
        prompt, ask = page.get_by_label("Prompt", exact=True), page.get_by_role("button", name="Ask all three")
        expect(prompt).to_be_visible(timeout=WAIT)
        tab_to(page, prompt)
        page.keyboard.type(EVIL)
        enter(page, ask)
        said = page.locator(".verdict-line")
        expect(said).to_have_text([re.compile("label of the task")] * 3, timeout=WAIT)
        expect(ask).to_be_enabled(timeout=WAIT)
        expect(prompt).to_be_focused()  # by way of Stop, and not lost with the disabled button
        assert page.locator("[data-at=tell] .text").inner_text() in LABELS
        check_page(page)
        prompt.fill("long " * 30_000)
        ask.click()
        expect(said).to_have_text([re.compile("too long")] * 3)
        expect(ask).to_be_enabled()
        expect(page.get_by_role("button", name="Load the model")).to_be_hidden()  # it is loaded
        second.goto(page.url)
        second.locator("#unload").click()
        second.close()
        prompt.fill("kept")
        ask.click()
        expect(said).to_have_text([re.compile("not loaded|ConnectError")] * 3, timeout=WAIT)
        expect(page.get_by_role("button", name="Load the model")).to_be_visible()

        for kind in ("Ship", "Report"):
            enter(page, page.locator("#nav").get_by_role("link", name=kind))
            page.wait_for_url(f"**/{kind.lower()}/runs/My-tickets-1")
            check_page(page)
        check_framed(page, RunFolder(root.path / "runs/My-tickets-1").report)
        assert watched.hosts == {"127.0.0.1"}
        assert watched.said == []
    finally:
        Job(root, "serve").stop()
        tuning(root, "runs/My-tickets-1").stop()
        server.stop()


@pytest.fixture
def made(tmp_path):
    """A root with two runs that are done, one that goes on, and a study; and its server."""
    root = UiRoot(tmp_path / "root")
    for name in ("runs/a b", "runs/c'd\"<e>"):
        make_run(root, name)
    going, job = make_run(root, "runs/going", state="running"), tuning(root, "runs/going")
    job.file("").parent.mkdir(parents=True)
    write_json(job.file(".json"), {"pid": 1, "created": 1.0, "command": ["tell", "tune", "t.csv"]})
    study = root.path / "studies" / "s"
    study.mkdir(parents=True)
    write_json(study / "study.json", {"cells": {"x": {"state": "running"}}})
    (study / "index.html").write_text("<title>s</title>")
    server = UiServer(root.path, tmp_path / "home")
    with FileLock(going.lock):
        yield root, server
    server.stop()


def test_marked_runs_stay_marked_while_the_list_is_renewed(browser, made):
    root, server = made
    watched = Watched(browser)
    page = watched.page()
    page.goto(server.address)
    kept = page.get_by_label("Compare runs/c'd\"<e>")
    kept.check()
    kept.focus()
    make_run(root, "runs/a")
    sync_api.expect(page.get_by_role("link", name="runs/a", exact=True)).to_be_visible(timeout=WAIT)
    marks = {m.get_attribute("value"): m.is_checked() for m in page.locator("input[type=checkbox]").all()}
    assert len(marks) == 4 and [name for name, marked in marks.items() if marked] == ["runs/c'd\"<e>"]
    assert kept.evaluate("element => element === document.activeElement")
    check_page(page)
    for path in ("/compare?run=runs/a&run=runs/a+b", "/study/studies/s", "/nowhere"):
        page.goto(server.base + path)
        check_page(page)
    watched.context.clear_cookies()
    page.goto(server.base)
    sync_api.expect(page.get_by_role("alert")).to_contain_text("Open the address")
    check_page(page)
    assert watched.said == []


def test_a_poll_leaves_focus_selection_and_scroll(browser, made):
    root, server = made
    log = tuning(root, "runs/going").file(".log")
    lines = [f"line {i} {'of the log ' * 40}" for i in range(24, 36)]
    log.write_text("\n".join(lines))
    watched = Watched(browser)
    page = watched.page()
    page.goto(server.address)
    page.goto(f"{server.base}/run/runs/going")
    shown, copy = page.get_by_label("Last lines of the log"), page.get_by_role("button", name="Copy")
    shown.evaluate(SELECT)
    tab_to(page, shown)
    for number in (36, 37):  # each key after an answer that changes the page
        log.write_text("\n".join([*lines, *(f"line {i} was added" for i in range(36, number + 1))]))
        sync_api.expect(shown).to_contain_text(f"line {number} was added", timeout=WAIT)
        assert page.evaluate("[String(getSelection()), document.querySelector('#log').scrollTop]") == ["line 30", 30]
        page.keyboard.press("Tab")
    assert copy.evaluate("element => element === document.activeElement")
    check_page(page)
    assert watched.said == []


def test_one_of_several_dropped_files_is_taken_and_said(browser, made):
    page = Watched(browser).page()
    page.goto(made[1].address)
    page.goto(f"{made[1].base}/data")
    page.evaluate(
        DROP.replace("document.get", 'data.items.add(new File([], "b.csv"));\n    document.get'), ["", "a.csv"]
    )
    page.wait_for_url("**/data?data=uploads*")
    said = page.get_by_text("One file is taken at a time: a.csv, and not b.csv.")
    sync_api.expect(said).to_be_visible(timeout=WAIT)


def test_a_command_that_cannot_be_copied_is_selected(browser, made):
    page = Watched(browser).page()
    page.goto(made[1].address)
    page.goto(f"{made[1].base}/run/runs/going")
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error()); }")
    page.locator("[data-copy]").click()
    sync_api.expect(page.get_by_text("Selected: copy it by the keyboard")).to_be_visible(timeout=WAIT)
    assert page.evaluate("String(getSelection())") == "tell tune t.csv"


def answer_parts(page, answer) -> None:
    """Answer what htmx asks for in place of the server."""
    page.route(
        "**/data?*", lambda route: (answer if "hx-request" in route.request.headers else type(route).continue_)(route)
    )


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda route: route.abort(), "does not answer"),
        (lambda route: route.fulfill(status=500, body='<p role="alert">It broke.</p>'), "It broke."),
        (lambda route: route.fulfill(status=500, body="nothing"), "does not answer"),
    ],
)
def test_a_part_that_does_not_come_is_said(browser, made, answer, said):
    page = Watched(browser).page()
    page.goto(made[1].address)
    answer_parts(page, answer)
    page.goto(f"{made[1].base}/data?data=x.csv")
    sync_api.expect(page.locator("#trouble")).to_contain_text(said, timeout=WAIT)
    assert page.locator(".busy").count() == 0
