"""The first answers of an arm, in a file of the run while they are decoded."""

from __future__ import annotations

import json

import pytest

from run.test_session import session_of
from tell.data.example import Example, Message
from tell.decode.sampler import Decoding
from tell.folder import RunFolder
from tell.rows.template import ChatTokenizer
from tell.run import growing
from tell.run.answers import answer_rows
from tell.run.growing import Growing
from tell.run.session import Session

TEST = [
    Example.of((Message("user", f"ask {n}"), Message("assistant", f"say {n}")), source="task", origin=f"t:{n}")
    for n in range(5)
]


@pytest.fixture
def session(tiny_model) -> Session:
    return session_of(tiny_model("llama"), "own")


def test_the_file_grows_while_an_arm_answers_and_is_removed(session, tmp_path, monkeypatch):
    folder, seen = RunFolder(tmp_path), []
    monkeypatch.setattr(growing, "EVERY", 0.0)
    write = Growing._write

    def watch(self: Growing) -> None:
        write(self)
        seen.append(json.loads(folder.answering.read_text()))

    monkeypatch.setattr(Growing, "_write", watch)
    chat = session.chat
    prompts = [chat.encode(chat.render(row.prompt, add_generation_prompt=True)) for row in TEST]
    decoding = Decoding(max_new_tokens=4, stop_ids=frozenset())
    rows = answer_rows(session, prompts, TEST, decoding, "tell", shown=folder.answering)
    assert not folder.answering.exists()
    assert {len(found["rows"]) for found in seen} == {3} and seen[-1]["arm"] == "tell"
    for at, row in enumerate(rows[:3]):
        texts = [found["rows"][at]["answer"] for found in seen]
        assert row["answer"].startswith(texts[len(texts) // 2]) and texts[-1] == row["answer"]
        assert {key: row[key] for key in ("hash", "prompt", "reference")} | {"answer": row["answer"]} == seen[-1][
            "rows"
        ][at]
    assert rows == answer_rows(session, prompts, TEST, decoding, "tell")


def test_it_is_written_once_a_second_and_may_fail(tiny_model, tmp_path, monkeypatch):
    chat = ChatTokenizer(tiny_model("llama"))
    now, writes = [10.0], []
    monkeypatch.setattr(growing.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(growing, "write_json", lambda path, data: writes.append(data))
    one = Growing(tmp_path / "a.json", "sft", TEST, chat)
    for token in (5, 6, 7):
        one.take(0, token)
        now[0] += 0.5
    one.take(4, 8)  # not shown
    assert len(writes) == 2
    monkeypatch.undo()
    blocked = Growing(tmp_path / "no folder" / "a.json", "sft", TEST, chat)
    (tmp_path / "no folder").write_text("a file")
    blocked.take(0, 5)
    blocked.end()
