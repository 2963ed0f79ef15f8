"""The page in a real browser: from a dropped spreadsheet to a chat answer, through reloads and a killed server."""

from __future__ import annotations

import base64
import re
import shutil
from urllib.parse import urlsplit

import pytest

from tell.files import write_json
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
LABELS = ("billing", "bug", "other")
EVIL = '<script>alert(1)</script><img src=x onerror="alert(1)">'
DROP = """([text, name]) => {
    const data = new DataTransfer(), bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    data.items.add(new File([bytes], name));
    document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
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


@pytest.fixture
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


def check_page(page, address: str) -> None:
    """No serious finding of axe in either theme, no sideways scrolling on a phone."""
    from axe_playwright_python.sync_playwright import Axe

    page.goto(address)
    page.wait_for_selector(".busy", state="detached")
    for scheme, width in (("light", 1280), ("dark", 390)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, (address, scheme)
        found = Axe().run(page).response
        assert found["passes"]
        bad = found["violations"]
        serious = [(v["id"], v["nodes"][0]["html"][:200]) for v in bad if v["impact"] in ("serious", "critical")]
        assert not serious, (address, scheme, serious)


def test_from_a_spreadsheet_to_a_chat_answer(browser, tiny_model, tmp_path):
    expect = sync_api.expect
    rows = [(f"mail {i} about {LABELS[i % 3]}", EVIL if i % 7 == 0 else f"text {i}", LABELS[i % 3]) for i in range(48)]
    book = xlsx(tmp_path / "tickets.xlsx", [("Subject", "Body", "Queue"), *rows])
    root = UiRoot(tmp_path / "root")
    root.path.mkdir()
    server, home = UiServer(root.path, tmp_path / "home"), tmp_path / "home"
    try:
        watched = Watched(browser)
        page = watched.page()
        page.goto(server.address)
        assert "token" not in page.url
        tab_to(page, page.get_by_role("link", name="New run"))
        page.keyboard.press("Enter")
        page.wait_for_url("**/data")
        page.evaluate(DROP, [base64.b64encode(book.read_bytes()).decode(), "../My tickets.xlsx"])
        page.wait_for_url("**/data?data=uploads%2FMy-tickets.xlsx")
        expect(page.get_by_role("alert")).to_contain_text("'Subject', 'Body', 'Queue'", timeout=WAIT)
        page.goto(f"{page.url}&model={tiny_model('llama')}")
        for label, text in (("Prompt column 1", "Sub"), ("Prompt column 2", "Bo"), ("Answer column 1", "Q")):
            tab_to(page, page.get_by_label(label))
            page.keyboard.type(text)  # picks the column that begins so
        tab_to(page, page.get_by_role("button", name="Read it so").first)
        page.keyboard.press("Enter")
        expect(page.locator(".sentence")).to_contain_text("48 rows of the sheet Tickets", timeout=WAIT)
        assert page.locator("select").evaluate_all("all => all.map(one => one.value)") == [
            "Subject",
            "Body",
            "",
            "Queue",
            "",
        ]
        expect(page.locator("mark.trained").nth(1)).to_be_visible(timeout=WAIT)
        tab_to(page, page.get_by_role("button", name="Plan a run"))
        page.keyboard.press("Enter")
        expect(page.get_by_text("Predicted memory")).to_be_visible(timeout=WAIT)
        page.goto(page.url + "&arm=base&arm=tell")
        expect(page.locator("pre.command")).to_contain_text("--arms=base,tell", timeout=WAIT)
        tab_to(page, page.get_by_role("button", name="Start"))
        page.keyboard.press("Enter")
        page.wait_for_url("**/run/runs/My-tickets-1")

        # In mid-run: a second tab, a reload, and the server killed and started again.
        running = re.compile("running")
        expect(page.get_by_role("status")).to_have_text(running, timeout=WAIT)
        process = tuning(root, "runs/My-tickets-1").process()
        second = watched.page()
        second.goto(page.url)
        page.reload()
        server.kill()
        assert process.is_running()
        server = UiServer(root.path, home, port=server.port)
        for tab in (page, second):
            expect(tab.get_by_role("status")).to_have_text(re.compile("done"), timeout=WAIT)
            expect(tab.get_by_text("2 of 2 arms")).to_be_visible()
        second.close()

        page.goto(server.base)
        tab_to(page, page.get_by_role("link", name="runs/My-tickets-1"))
        page.goto(f"{server.base}/chat/runs/My-tickets-1")
        tab_to(page, page.locator("#load"))
        page.keyboard.press("Enter")
        expect(page.get_by_label("Prompt", exact=True)).to_be_visible(timeout=WAIT)
        tab_to(page, page.get_by_label("Prompt", exact=True))
        page.keyboard.type(EVIL)
        tab_to(page, page.get_by_role("button", name="Ask all three"))
        page.keyboard.press("Enter")
        for column in ("base", "context", "tell"):
            expect(page.locator(f"[data-at={column}] .verdict-line")).to_contain_text("label of the task", timeout=WAIT)
        expect(page.get_by_role("button", name="Ask all three")).to_be_enabled(timeout=WAIT)
        assert page.locator("[data-at=tell] .text").inner_text() in LABELS

        data = f"/data?data=uploads/My-tickets.xlsx&prompt={{Subject}}&answer=Queue&model={tiny_model('llama')}"
        pages = [f"/{kind}/runs/My-tickets-1" for kind in ("run", "report", "chat", "ship")]
        for path in ("/", data, data.replace("/data", "/plan"), *pages):
            check_page(page, server.base + path)
        assert watched.hosts == {"127.0.0.1"}
        assert watched.said == []
    finally:
        Job(root, "serve").stop()
        tuning(root, "runs/My-tickets-1").stop()
        server.stop()


def test_marked_runs_stay_marked_while_the_list_is_renewed(browser, tmp_path):
    root = UiRoot(tmp_path / "root")
    for name in ("runs/a b", "runs/c'd\"<e>"):
        make_run(root, name)
    study = root.path / "studies" / "s"
    study.mkdir(parents=True)
    write_json(study / "study.json", {"cells": {"x": {"state": "running"}}})
    server = UiServer(root.path, tmp_path / "home")
    try:
        watched = Watched(browser)
        page = watched.page()
        page.goto(server.address)
        page.locator("input[type=checkbox]").nth(1).check()
        kept = page.locator("input[type=checkbox]").nth(1).get_attribute("value")
        make_run(root, "runs/a")  # it comes first
        sync_api.expect(page.get_by_role("link", name="runs/a", exact=True)).to_be_visible(timeout=WAIT)
        marks = {m.get_attribute("value"): m.is_checked() for m in page.locator("input[type=checkbox]").all()}
        assert len(marks) == 3 and [name for name, marked in marks.items() if marked] == [kept]
        assert watched.said == []
    finally:
        server.stop()
