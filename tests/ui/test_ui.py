"""The routes of `tell ui`: who may ask, what is shown of files that anybody made, commands as processes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module, resources

import pytest
from filelock import FileLock
from starlette.datastructures import QueryParams

from run.runs import PROBE
from tell import files
from tell.data.schema import Schema
from tell.files import write_json
from tell.folder import RunFolder
from tell.report.page import write_page
from tell.run.answer_check import Check
from tell.ui import ui_app
from tell.ui.chat_relay import serving
from tell.ui.choices import Choice
from tell.ui.jobs import Job
from tell.ui.run_view import live, state_of, tuning
from tell.ui.ui_root import UiRoot
from ui.asking import ORIGIN, TOKEN, stranger, told
from ui.made_runs import make_run
from ui.ui_server import UiServer, until

EVIL = '<script>alert(1)</script><img src=x onerror="alert(1)">" onload="alert(1)'


class Elements(HTMLParser):
    """Names of the elements and attributes of a page, and its links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names, self.attributes, self.links = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value for name, value in attrs if name in ("src", "href", "action", "hx-get")]


def check_inert(text: str, *, scripts: int) -> None:
    found = Elements(text)
    assert found.names.count("script") == scripts
    assert "img" not in found.names
    assert not [name for name in found.attributes if name.startswith("on") or name == "style"]
    assert not [link for link in found.links if not link.startswith(("/", "#", "data:,"))]


PATHS = ("/", "/data", "/plan", "/run/runs/a", "/report/runs/a", "/chat/runs/a", "/ship/runs/a")
POSTS = ("/start", "/stop/runs/a", "/resume/runs/a", "/load/runs/a", "/unload/runs/a", "/say/runs/a", "/export/runs/a")


def test_nobody_without_the_token_sees_anything(root):
    make_run(root, "runs/a")
    asking = stranger(root)
    for path in (*PATHS, "/static/ui.js", "/framed/report/runs/a", "/?token=wrong", "/?token="):
        assert asking.get(path).status_code == 401, path
    for path in POSTS:
        assert asking.post(path, headers=ORIGIN).status_code == 401, path
    assert asking.put("/upload/a.csv", content=b"a", headers=ORIGIN).status_code == 401
    assert not root.uploads.exists()
    asking.cookies.set("tell-ui-8765", "wrong")
    assert asking.get("/").status_code == 401


def test_the_token_becomes_a_cookie_that_no_other_site_sends(root):
    answer = stranger(root).get("/", params={"token": TOKEN}, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "samesite=strict" in cookie and "httponly" in cookie and cookie.startswith("tell-ui-8765=")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8765", "127.0.0.1:80", "127.0.0.1", "[::1", "", "127.0.0.1:x"]
)
def test_other_hosts_are_refused(client, host):
    assert client.get("/", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("origin", ["", "null", "http://evil.example", "http://127.0.0.1:80", "https://127.0.0.1:8765"])
def test_other_origins_change_nothing(client, root, origin):
    headers = {"origin": origin} if origin else {}
    for path in POSTS:
        assert client.post(path, headers=headers).status_code == 403, path
    assert client.put("/upload/a.csv", content=b"a", headers=headers).status_code == 403
    assert not root.uploads.exists() and not (root.state / "jobs").exists()


def test_pages_have_a_strict_policy_and_nothing_inline(client, root):
    make_run(root, "runs/a")
    for path in PATHS:
        answer = client.get(path)
        policy = answer.headers["content-security-policy"]
        assert answer.status_code == 200 and "default-src 'none'" in policy and "unsafe" not in policy, path
        check_inert(answer.text, scripts=2)
    framed = client.get("/framed/report/runs/a").headers["content-security-policy"]
    assert "script-src" not in framed and "default-src 'none'" in framed and "allow-scripts" not in framed


def test_hostile_contents_are_inert(client, root):
    for name in (f"runs/{EVIL.replace('/', '')}", "runs/b"):
        write_page(make_run(root, name, state="failed", text=EVIL))
    study = root.path / "studies" / "s"
    study.mkdir(parents=True)
    cells = {EVIL: {"state": EVIL, "error": EVIL, "seconds": EVIL}, "b": {"state": "done", "seconds": 3}}
    write_json(study / "study.json", {"cells": cells, "rows": [], "recipe": {}})
    for name in root.find()[0]:
        for page in ("run", "report", "chat", "ship"):
            answer = client.get(f"/{page}/{name}")
            assert answer.status_code == 200
            check_inert(answer.text, scripts=2)
        check_inert(client.get(f"/framed/report/{name}").text, scripts=0)
    check_inert(client.get("/").text, scripts=2)
    check_inert(client.get("/data", params={"data": EVIL, "prompt": EVIL}).text, scripts=2)
    check_inert(client.get("/plan", params={"data": EVIL, "model": EVIL}).text, scripts=2)
    check_inert(told(client, "/data", {"data": EVIL}), scripts=0)
    both = [("run", name) for name in root.find()[0]]
    check_inert(client.get("/framed/compare/", params=both).text, scripts=0)


@pytest.mark.parametrize(
    "name", ["../out", "%2e%2e/out", "runs/../../out", "/etc", "/tmp", ".", "", "link", "runs/a%00", "x" * 5000]
)
def test_no_address_leads_out_of_the_root(client, root, name):
    make_run(UiRoot(root.path.parent), "out")
    (root.path / "link").symlink_to(root.path.parent / "out")
    for page in ("run", "report", "framed/report", "study", "framed/study", "chat", "ship"):
        assert client.get(f"/{page}/{name}").status_code == 404
    assert client.get("/static/..%2fui_app.py").status_code == 404


def test_no_value_can_become_a_flag():
    values = {"data": "-x.csv", "model": "--overwrite", "prompt": "$(reboot)", "answer": "a b", "nonsense": "1"}
    arms = [("arm", "base"), ("arm", "tell")]
    command = Choice.of(QueryParams([*values.items(), *arms])).command("tune", out="runs/x")
    assert command == [
        *(
            "tune",
            "./-x.csv",
            "--prompt=$(reboot)",
            "--answer=a b",
            "--model=--overwrite",
            "--arms=base,tell",
            "--out=runs/x",
        )
    ]


def test_states_of_runs(root):
    folder = make_run(root, "runs/a", state="running")
    assert state_of(root, "runs/a") == "interrupted"  # killed: it left "running" behind
    with FileLock(folder.lock):
        assert state_of(root, "runs/a") == "running"
    assert state_of(root, "runs/a") == "interrupted"
    found = live(root, "runs/a")
    assert found["bars"][0] | {"label": ""} == {"label": "", "done": 1, "total": 4, "unit": "steps"}
    assert [row["answers"] for row in found["rows"]] == [[("TELL", "hello", False)]] * 3
    rows = [{"hash": f"{0:016x}", "prompt": "hello0", "reference": "hello", "answer": "hel"}]
    write_json(folder.answering, {"arm": "sft", "rows": rows})  # while an arm answers
    assert [len(row["answers"]) for row in live(root, "runs/a")["rows"]] == [1, 1, 1]  # it was killed meanwhile
    with FileLock(folder.lock):
        rows = live(root, "runs/a")["rows"]
    assert [len(row["answers"]) for row in rows] == [2, 1, 1]
    assert rows[0]["answers"][1] == ("SFT, one epoch", "hel", True)


def test_a_run_of_a_terminal_is_stopped_from_the_page(client, root, monkeypatch):
    folder = make_run(root, "runs/a", state="running")
    stopped = []
    monkeypatch.setattr(ui_app, "stop_holder", lambda found: stopped.append(found.root) or len(stopped) < 2)
    with FileLock(folder.lock):
        assert 'action="/stop/runs/a"' in client.get("/run/runs/a").text
        assert client.post("/stop/runs/a", headers=ORIGIN).url.path == "/run/runs/a"
        assert "where it was started" in client.post("/stop/runs/a", headers=ORIGIN).text
    assert stopped == [folder.root] * 2


def test_a_report_that_is_not_written_yet_is_not_made(client, root):
    make_run(root, "runs/a", state="interrupted")
    answer = client.get("/report/runs/a")
    assert answer.status_code == 404 and "tell report runs/a" in answer.text
    assert client.get("/framed/report/runs/a").status_code == 404


def test_what_cannot_be_shown_is_a_page(client, root):
    make_run(root, "runs/a")
    for path, said in (("/nowhere", "no such page"), ("/compare?run=runs/a&run=runs/a", "two runs or more")):
        assert said in client.get(path).text and "To the runs" in client.get(path).text
    assert "Open the address" in stranger(root).get("/").text
    assert 'href="/data"' in client.get("/plan").text and "No data is chosen" in client.get("/plan").text
    assert "No arm is ticked" in client.get("/plan?data=a.csv&arm=").text


def test_what_a_run_does_not_have_yet_is_marked(client, root):
    folder = make_run(root, "runs/a", state="running")
    write_json(folder.plan, {"predicted": {"seconds": 4000.0}})
    with FileLock(folder.lock):
        text = client.get("/run/runs/a").text
    assert text.count('aria-disabled="true"') == 3 and "so far" in text and "to go as predicted" in text
    folder.set_status("done", seconds=1.0)
    assert client.get("/chat/runs/a").text.count('aria-disabled="true"') == 1  # no report was written


def test_runs_and_studies_are_listed_and_sorted(client, root):
    make_run(root, "runs/a")
    make_run(root, "runs/b", state="failed")
    make_run(root, "studies/cells/tell-1")
    write_json_study = root.path / "studies" / "mine"
    write_json_study.mkdir()
    write_json(
        write_json_study / "study.json", {"cells": {"tell-1": {"state": "done"}, "tell-2": {"state": "waiting"}}}
    )
    text = client.get("/", params={"by": "name"}).text
    assert text.index("runs/a") < text.index("runs/b") < text.index("studies/mine")
    assert "1 done, 1 waiting" in re.sub(r"\s+", " ", text) and 'href="/run/studies/cells/tell-1"' in text
    assert client.get("/", params={"by": "nonsense"}).status_code == 200
    place = re.search(r'<details id="[^"]+"', text)[0]
    (root.path / "studies" / "first").mkdir()
    write_json(root.path / "studies" / "first" / "study.json", {"cells": {}})
    after = client.get("/").text
    assert after.index("studies/first") < after.index(place) < after.index("studies/mine")  # an open one stays its own


def test_what_has_not_changed_is_not_read_again(client, root, monkeypatch):
    for n in range(3):
        make_run(root, f"runs/r{n}")
        make_run(root, f"studies/cells/c{n}")
    study = root.path / "studies" / "mine"
    study.mkdir()
    cells = {f"c{n}": {"state": "done"} for n in range(250)}
    write_json(study / "study.json", {"cells": {**cells, "../../runs/r0": {"state": "failed"}}})
    read, real = [], files.read_json
    monkeypatch.setattr(files, "read_json", lambda path, **more: read.append(path) or real(path, **more))
    text = client.get("/").text
    assert len(read) == 9  # status, scores and process of three runs; cells are told by their study
    assert "250 done" in text and "51 more cells" in text and text.count('href="/run/studies/cells/') == 3
    assert client.get("/").text == text and len(read) == 9
    RunFolder(root.path / "runs/r1").set_status("interrupted")
    assert "interrupted" in client.get("/").text and len(read) == 10


def test_runs_are_compared_again_where_a_file_has_changed(client, root, monkeypatch):
    folders = [make_run(root, f"runs/r{n}") for n in range(2)]
    made = []
    monkeypatch.setattr(import_module("tell.report.compare"), "compare", lambda runs: made.append(runs) or "compared")
    changes = (folders[0].prediction("sft"), folders[1].schema, folders[1].losses("sft"), folders[0].config)
    for number, path in enumerate((None, *changes), 1):
        if path is not None:
            path.write_text("{}\n")
        for _ in range(2):
            assert client.get("/framed/compare/?run=runs/r0&run=runs/r1").text == "compared"
        assert len(made) == number, path


@pytest.mark.parametrize(
    ("text", "said"), [("{", "status.json: is not valid JSON"), ("{}", "status.json names no state")]
)
def test_a_run_whose_state_cannot_be_read_says_so(client, root, text, said):
    make_run(root, "runs/a").status.write_text(text)
    page = client.get("/run/runs/a").text
    assert "failed" in page and "status.json" in page and said in page and "Resume" in page


def test_a_run_that_fails_at_once_shows_its_line(client, root):
    answer = client.post("/start", params={"data": "nope.csv", "out": "../../x"}, headers=ORIGIN)
    assert answer.url.path == "/run/runs/nope-1"
    until(lambda: tuning(root, "runs/nope-1").process() is None)
    text = client.get("/run/runs/nope-1").text
    assert "nope.csv" in text and "failed" in text and "Resume" not in text
    assert not (root.path / "runs").exists()


def test_a_value_that_no_argument_can_have_is_one_line(client, root):
    assert "cannot be started" in client.post("/start", params={"data": "a\0b.csv"}, headers=ORIGIN).text
    assert "null byte" in told(client, "/data", {"data": "a\0b.csv"})


def test_a_stopped_run_is_resumed_by_the_same_command(client, root, tiny_model):
    rows = "".join(f"{i} how,{('no', 'yes')[i % 2]}\n" for i in range(24))
    (root.path / "t.csv").write_text(f"question,answer\n{rows}")
    chosen = {"data": "t.csv", "model": str(tiny_model("llama")), "arms": "base,tell", "general": str(PROBE)}
    assert client.post("/start", params=chosen, headers=ORIGIN).url.path == "/run/runs/t-1"
    folder, job = RunFolder(root.path / "runs/t-1"), tuning(root, "runs/t-1")
    until(lambda: folder.read_status().get("state") == "running")
    again = client.post("/start", params=chosen | {"out": "runs/t-1"}, headers=ORIGIN)  # a second click
    assert again.url.path == "/run/runs/t-1" and not tuning(root, "runs/t-2").record()
    assert "Stop" in client.get("/run/runs/t-1").text
    client.post("/stop/runs/t-1", headers=ORIGIN)
    until(lambda: folder.read_status().get("state") == "interrupted")  # its process may not have ended yet
    client.post("/resume/runs/t-1", headers=ORIGIN)
    assert job.record()["command"] == ["tell", "tune", "--resume", "--out=runs/t-1"]
    until(lambda: job.process() is None)
    assert state_of(root, "runs/t-1") == "done", job.lines()
    text = client.get("/run/runs/t-1").text
    assert "2 of 2 arms" in text and "Report" in text


def test_a_model_that_is_gone_is_one_line(client, root):
    folder = make_run(root, "runs/a")
    folder.config.write_text(f"task:\n  data: t.csv\nmodel:\n  name: {root.path}/gone\n")
    assert "Load the model" in client.get("/chat/runs/a").text
    assert client.post("/load/runs/a", headers=ORIGIN).url.path == "/chat/runs/a"
    until(lambda: serving(root).process() is None)
    text = client.get("/chat/runs/a").text
    assert 'role="alert"' in text and serving(root).error() and "Load the model" in text
    lines = client.post("/say/runs/a?at=tell", content="hello", headers=ORIGIN).text.splitlines()
    assert [json.loads(line) for line in lines] == [{"end": "the model is not loaded", "ok": False, "gone": True}]


def test_a_process_number_that_was_taken_over_is_not_stopped(root):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    job = Job(root, "tune x")
    job.file("").parent.mkdir(parents=True)
    write_json(job.file(".json"), {"pid": other.pid, "created": 1.0, "command": []})
    assert not job.stop() and other.poll() is None
    other.communicate()


def test_answers_are_checked():
    check = Check(Schema({"type": "object", "required": ["a"]}))
    assert check('{"a": 1}') == (True, "follows the schema")
    assert check("{}")[0] is False and check("nonsense") == (False, "not JSON")
    assert Check(labels=frozenset({"x"}))(" x")[0] is True
    assert Check()("anything") == (None, "") and Check()("anything", whole=False)[0] is None


def test_labels_are_checked_as_they_come():
    label = Check(labels=frozenset({"bug"}))
    assert [label(text, whole=False)[0] for text in ("", " bu", "bug ", "bus")] == [True, True, True, False]


def test_a_second_page_of_a_root_says_where_the_first_is(root, tmp_path):
    old = root.state / "questions" / "asked"
    old.parent.mkdir(parents=True)
    old.touch()
    os.utime(old, (1, 1))
    first = UiServer(root.path, tmp_path / "home")
    try:
        assert not old.exists()  # nor does the folder grow for ever
        second = UiServer(root.path, tmp_path / "home")
        assert second.process.wait(60) == 0 and second.address == first.address
        assert (root.state.stat().st_mode & 0o777) == 0o700
    finally:
        first.stop()


def test_a_taken_port_is_one_line(root):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "tell", "ui", str(root.path), f"--port={taken.getsockname()[1]}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--port" in done.stderr


def test_htmx_is_what_its_note_says():
    folder = resources.files("tell.ui").joinpath("static")
    digest = hashlib.sha256(folder.joinpath("htmx.min.js").read_bytes()).hexdigest()
    assert digest in folder.joinpath("README.md").read_text("utf-8")


DAMAGED = (
    *("", "[]", "null", '"x"', "{", "[[[[", '{"state": 3, "stage": [], "seconds": "x", "error": {}, "step": "x"}'),
    '{"task": {"primary": "nonsense"}, "arms": {"tell": {"nonsense": {"value": "x"}}, "base": 3}, "forgetting": []}',
    '{"task": 3, "arms": {"tell": 3, "x": {"steps": "y"}, "y": [1]}, "notices": 3, "fit": 3, "kind": [], "cells": []}',
    '{"arms": {"tell": {"steps": 1e999}}, "notices": [3, null], "train": 3, "test": 3, "eval": {"arms": 3}}',
    '{"step": 1e999, "loss": "x", "by_source": {"task": NaN, "x": []}, "hash": [], "prompt": 3, "answer": null}',
    '{"cells": {"../../../x": {"state": [], "seconds": []}, "y": 3}, "labels": 3, "kind": {"labels": {"a": 1}}}',
)


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_files_break_no_page(client, root, text):
    folder = make_run(root, "runs/a")
    made = [path for path in folder.root.rglob("*") if path.is_file()]
    study = root.path / "studies" / "s"
    study.mkdir(parents=True)
    for path in (*made, folder.split, folder.schema, study / "study.json"):
        path.write_text(text)
    for path in ("/", "/?by=score", "/?by=seconds", "/run/runs/a", "/chat/runs/a", "/ship/runs/a", "/report/runs/a"):
        assert client.get(path).status_code == 200, path
    assert client.get("/framed/report/runs/a").status_code in (200, 400)
    Check.of(folder)
