"""What the page asks commands of `tell`: processes that tabs and restarts share, and the choices made from answers."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from filelock import FileLock
from starlette.datastructures import QueryParams

from tell.child_process import find_process
from tell.errors import TellError
from tell.files import write_json
from tell.ui import jobs, run_ui, ui_app
from tell.ui.choices import Choice, picked
from tell.ui.jobs import Job
from tell.ui.ui_app import templates
from ui.asking import HTMX, ORIGIN, calls, friend, told
from ui.made_runs import make_run
from ui.ui_server import until
from workbooks import xlsx


def query(text: str) -> Choice:
    return Choice.of(QueryParams(text))


def test_look_and_plan_are_the_commands(client, root, tiny_model):
    rows = "".join(f"{i} how,{('no', 'yes')[i % 2]}\n" for i in range(20))
    (root.path / "t.csv").write_text(f"question,answer\n{rows}")
    chosen = {"data": "t.csv", "model": str(tiny_model("llama")), "general": "none"}
    text = told(client, "/data", chosen)
    assert "20 rows" in text and "guessed" in text and "tell look t.csv" in text
    assert "What the model sees" in text and 'class="trained ' in text
    assert re.findall(r'<option selected value="(\w+)"', text) == ["question", "answer"]
    text = told(client, "/plan", chosen)
    assert "Predicted time" in text and "--out=runs/t-1" in text and "--general=none" in text
    text = told(client, "/data", chosen | {"columns": "prompt=nope,answer=answer"})
    assert "no column" in text and text.count('value="question"') == 4  # to be chosen


def test_columns_are_chosen_from_those_of_the_file(client, root, tiny_model):
    rows = "".join(f"s{i},b{i},{'xy'[i % 2]},{i % 3}\n" for i in range(24))
    (root.path / "t.csv").write_text(f"Subject,Body,Queue,Priority\n{rows}")
    chosen = [("data", "t.csv"), ("model", str(tiny_model("llama")))]
    chosen += [
        ("ask", "Body"),
        ("ask", "Subject"),
        ("ask", ""),
        ("reply", "Queue"),
        ("reply", "Priority"),
        ("reply", ""),
    ]
    text = told(client, "/data", chosen)
    assert "24 rows" in text and "guessed" not in text
    assert re.findall(r'<option selected value="(\w+)"', text) == ["Body", "Subject", "Queue", "Priority"]
    assert r"--prompt={Body}\n\n{Subject}" in text and "--answer=Queue,Priority" in text


@pytest.mark.parametrize(("path", "verb"), [("/data", "look"), ("/plan", "plan")])
def test_tabs_and_a_restarted_page_share_one_process(client, root, stand_in, path, verb):
    data = root.path / "t.csv"
    data.write_text("q,a\n")
    chosen = {"data": "t.csv"}
    client.get(path, params=chosen)
    until(lambda: "reading: 3 of 9" in client.get(path, params=chosen, headers=HTMX).text)
    other = friend(root)
    assert other.get(path, params=chosen).status_code == 200
    text = other.get(path, params=chosen, headers=HTMX).text
    assert f'hx-get="{path}?data=t.csv"' in text and "every 1s" in text
    assert len(calls(stand_in)) == 1 and f"tell {verb} t.csv --json" in calls(stand_in)[0]
    (stand_in / "said").write_text("error: it is broken\n")
    (stand_in / "go").touch()
    assert all("it is broken" in told(asking, path, chosen) for asking in (client, other))
    assert len(calls(stand_in)) == 1
    client.get(path, params=chosen)  # a page that is loaded after a failure asks again
    assert "it is broken" in told(client, path, chosen)
    data.write_text("q,a\n1,2\n")  # as does one whose data has changed
    assert "it is broken" in told(client, path, chosen)
    assert len(calls(stand_in)) == 3


def test_data_that_changes_is_asked_again_when_the_command_has_ended(client, root, stand_in):
    data, chosen = root.path / "t.csv", {"data": "t.csv"}
    for text in ("q,a\n", "q,a\n1,2\n", "q,a\n1,2\n3,4\n"):  # it is being copied
        data.write_text(text)
        assert "every 1s" in client.get("/data", params=chosen, headers=HTMX).text
    until(lambda: calls(stand_in))
    assert len(calls(stand_in)) == 1
    (stand_in / "said").write_text("error: it is broken\n")
    (stand_in / "go").touch()
    assert "it is broken" in told(client, "/data", chosen)  # of all of it
    assert len(calls(stand_in)) == 2


def test_a_look_is_kept_until_data_or_model_changes(client, root, stand_in):
    data, model = root.path / "t.csv", root.path / "model"
    model.mkdir()
    for path in (data, model / "config.json", model / "chat_template.jinja"):
        path.write_text("q,a\n")
    (stand_in / "go").touch()
    (stand_in / "answer").write_text('{"error": "x", "model": {"name": "m"}}')

    def asked(name: str) -> int:
        """How often, after a page was loaded again."""
        of = {"data": name, "model": "model"}
        client.get("/data", params=of)
        client.get("/data", params=of, headers=HTMX)
        until(lambda: not [f for f in root.state.glob("*/*.json") if find_process(json.loads(f.read_text()))])
        return len(calls(stand_in))

    def change(path: Path) -> None:
        """To other content of one size and time."""
        times = path.stat()
        path.write_text("q,b\n")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    assert [asked("t.csv"), asked("t.csv")] == [1, 1]
    change(data)
    assert [asked("t.csv"), asked("t.csv")] == [2, 2]
    change(model / "chat_template.jinja")
    assert [asked("t.csv"), asked("t.csv")] == [3, 3]
    assert [asked("someone/data"), asked("someone/data")] == [4, 5]  # on the hub, where it may have changed


def test_at_most_some_commands_are_asked_at_once(client, root, stand_in):
    for number in range(jobs.MOST + 1):
        client.get("/data", params={"data": f"{number}.csv"}, headers=HTMX)
    last = {"data": f"{jobs.MOST}.csv"}
    assert "every 1s" in client.get("/data", params=last, headers=HTMX).text  # it waits
    until(lambda: len(calls(stand_in)) == jobs.MOST)
    (stand_in / "said").write_text("error: it is broken\n")
    (stand_in / "go").touch()
    assert "it is broken" in told(client, "/data", last)
    assert len(calls(stand_in)) == jobs.MOST + 1


def test_another_sheet_is_offered_where_the_first_cannot_be_read(client, root):
    xlsx(root.path / "t.xlsx", [("a", "a"), ("1", "2")], Second=[("q", "a"), ("1", "2")])
    for name in ("t.xlsx", "t.xlsx#Third"):
        text = told(client, "/data", {"data": name})
        assert 'role="alert"' in text and "has 2 sheets" in text
        assert 'value="t.xlsx#Tickets"' in text and 'value="t.xlsx#Second"' in text


@pytest.mark.parametrize("hidden", ["\u00ad", "\u200b", "\u200d"])
def test_hidden_characters_stay_in_what_is_sent(client, root, monkeypatch, hidden):
    column = f"Sub{hidden}ject"
    text = client.get("/plan", params={"data": f"{column}.csv", "prompt": f"{{{column}}}"}).text
    assert f'name="prompt" value="{{{column}}}"' in text and f'name="data" value="{column}.csv"' in text
    parts = templates().globals["u"]
    assert f'value="{column}"' in parts.pick("ask", "Prompt", [column], column, "choose")
    assert f'value="{{{column}}}"' in parts.field("prompt", "Prompt", query(f"prompt={{{column}}}"))
    make_run(root, f"runs/{column}", text=column)
    monkeypatch.setattr(ui_app, "served", lambda _: (f"runs/{column}", "http://127.0.0.1:1/v1"))
    assert f'data-try="{column}0"' in client.get(f"/chat/runs/{column}").text
    assert f'name="run" value="runs/{column}"' in client.get("/").text


def test_a_command_that_dies_is_said(client, root, stand_in):
    (stand_in / "go").touch()
    (stand_in / "said").write_text("Killed\n")
    assert "Killed" in told(client, "/data", {"data": "t.csv"})


def test_the_likeliest_reading_is_preselected_and_the_others_are_links(client, root):
    rows = "".join(f"mail {i} about all of it and more,text {i} says so at length,{'xyz'[i % 3]}\n" for i in range(48))
    (root.path / "t.csv").write_text(f'Subject,"Body, whole",Queue\n{rows}')
    chosen = {"data": "t.csv", "model": "someone/not-here"}
    text = told(client, "/data", chosen)
    assert "48 rows" in text and "guessed" in text and 'role="alert"' not in text and "tell tune" not in text
    assert text.count("<option selected") == 3  # two of the prompt, one of the answer
    assert "Other readings" in text and "Body, whole/Queue</bdi></a>" in text and "Subject/Queue</bdi></a>" in text
    assert 'name="answer" value="Queue"' in text  # what is planned is what is shown
    assert "No model" in text and "--model someone/not-here` fetches it" in text  # what to do


def test_a_plan_without_a_model_says_what_to_do(client, root, tmp_path):
    (root.path / "t.csv").write_text("question,answer\n" + "".join(f"{i} how,{'xy'[i % 2]}\n" for i in range(20)))
    text = told(client, "/plan", {"data": "t.csv", "model": str(tmp_path / "gone"), "general": "none"})
    assert (
        'role="alert"' in text
        and "gone: no such model folder" in text
        and "or use a hub name" in text
        and "Start</button>" not in text
    )


def test_a_template_is_kept_while_its_columns_are_asked_for():
    template = r"Subject: {Subject}\n\n{Body}"
    typed = "data=t.csv&prompt=Subject%3A+%7BSubject%7D%5Cn%5Cn%7BBody%7D"
    kept = query(f"{typed}&ask=Subject&ask=Body&ask=&reply=Priority&reply=Queue")
    assert (kept["prompt"], kept["answer"], kept.replaced) == (template, "Priority,Queue", "")
    other = query(f"{typed}&ask=Body&reply=Queue")
    assert (other["prompt"], other.replaced) == ("{Body}", template)
    assert query("data=t.csv&prompt=Body&ask=Subject").replaced == ""  # a name alone is no template
    assert query(r"prompt={Subject}\n\n{Body}&ask=Subject").replaced == ""  # nor are columns one below the other
    assert query(typed)["prompt"] == template


def test_a_template_that_is_dropped_is_named(client, root):
    typed = {"data": "t.csv", "prompt": "On {Subject}:", "ask": "Body"}
    assert "<code>On {Subject}:</code>" in client.get("/data", params=typed).text


def test_columns_keep_their_order_and_their_commas():
    form = {"prompt": "{b}: {a}", "answer": ["z, y", "x"], "types": ["text", "text"]}
    found = picked({"names": ["a", "b", "x", "z, y", "z"], "form": form, "columns": {"answer": "z, y, x"}})
    assert (found["ask"], found["reply"]) == (["b", "a"], ["z, y", "x"])
    found = picked({"names": ["q", "i", "a"], "columns": {"prompt": "q", "input": "i", "answer": "a"}})
    assert (found["ask"], found["reply"]) == (["q", "i"], ["a"])
    assert picked({}) == {"names": [], "ask": [], "reply": [], "sheets": [], "sheet": None}


def test_a_long_name_and_a_fault_of_ours_break_no_page(client, root, stand_in, monkeypatch):
    (stand_in / "go").touch()
    (stand_in / "said").write_text("error: no such file\n")
    assert "no such file" in told(client, "/plan", {"data": "x" * 300 + ".csv"})

    def broken(_root: object) -> None:
        raise RuntimeError("one\ntwo <b>")

    monkeypatch.setattr(ui_app.UiRoot, "find", broken)
    answer = friend(root, raise_server_exceptions=False).get("/")
    assert answer.status_code == 500 and "unexpected RuntimeError: one two &lt;b&gt;" in answer.text
    assert "Traceback" not in answer.text and "default-src 'none'" in answer.headers["content-security-policy"]


def test_a_process_without_a_record_is_ended(root, stand_in, monkeypatch):
    begun = []

    def full(path: Path, data: dict) -> None:
        begun.append(psutil.Process(data["pid"]))
        raise TellError("cannot be written (no space)")

    monkeypatch.setattr(jobs, "write_json", full)
    with pytest.raises(TellError, match="no space"):
        Job(root, "x").start(["tune", "x"])
    psutil.wait_procs(begun, timeout=60)
    assert begun and not begun[0].is_running()


def test_a_lock_that_cannot_be_taken_is_one_line(root, monkeypatch):
    monkeypatch.setattr(FileLock, "acquire", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(TellError, match="No space left"):
        Job(root, "x").start(["tune", "x"])


def test_an_export_is_started_and_a_model_is_freed(client, root, stand_in):
    make_run(root, "runs/a")
    assert client.post("/export/runs/a?target=nope", headers=ORIGIN).status_code == 404
    assert client.post("/export/runs/a?target=hub", headers=ORIGIN).status_code == 404  # uploads: only in a terminal
    assert client.post("/export/runs/a?target=hf", headers=ORIGIN).url.path == "/ship/runs/a"
    until(lambda: calls(stand_in))
    assert calls(stand_in) == ["-m tell export runs/a --to=hf --out=exports/runs/a-hf"]
    assert "reading: 3 of 9" in until(lambda: "3 of 9" in (text := client.get("/ship/runs/a").text) and text)
    client.post("/load/runs/a", headers=ORIGIN)
    assert "Loading the model" in client.get("/chat/runs/a").text
    shown = client.post("/unload/runs/a", headers=ORIGIN)
    assert shown.url.path == "/chat/runs/a" and "Load the model" in shown.text and 'role="alert"' not in shown.text


def test_a_second_page_waits_for_the_address_of_one_that_starts(root, monkeypatch):
    said = []
    file = root.state / "address.json"
    root.state.mkdir()
    write_json(file, {"token": "t"})
    clock = SimpleNamespace(
        monotonic=time.monotonic, sleep=lambda _: write_json(file, {"address": "http://here", "token": "t"})
    )
    monkeypatch.setattr(run_ui, "time", clock)
    display = type("Display", (), {"note": lambda self, text: said.append(text)})()
    with FileLock(root.state / ".lock"):
        run_ui.run_ui(root.path, display, port=0)
    assert said == [f"a page for {root.path} is open at http://here"]
