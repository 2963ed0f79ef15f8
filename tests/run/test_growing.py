"""The first answers of an arm, in a file of the run while they are decoded."""

from __future__ import annotations

import pytest

from run.test_session import session_of
from tell.config import Config
from tell.data.example import Example, Message
from tell.decode.sampler import Decoding
from tell.folder import RunFolder
from tell.run import growing as module
from tell.run.answers import answer_rows
from tell.run.claim import open_folder
from tell.run.growing import growing
from tell.run.session import Session

TEST = [
    Example.of((Message("user", f"ask {n}"), Message("assistant", f"say {n}")), source="task", origin=f"t:{n}")
    for n in range(5)
]


@pytest.fixture
def session(tiny_model) -> Session:
    return session_of(tiny_model("llama"), "own")


@pytest.fixture
def writes(monkeypatch) -> list:
    seen, write = [], module.write_json

    def watch(path, data) -> None:
        seen.append(data)
        write(path, data)

    monkeypatch.setattr(module, "write_json", watch)
    return seen


def answers(session: Session) -> list[dict]:
    chat = session.chat
    prompts = [chat.encode(chat.render(row.prompt, add_generation_prompt=True)) for row in TEST]
    return answer_rows(session, prompts, TEST, Decoding(max_new_tokens=4, stop_ids=frozenset()), "tell")


def test_the_file_grows_while_an_arm_answers_and_is_removed(session, tmp_path, monkeypatch, writes):
    monkeypatch.setattr(module, "EVERY", 0.0)
    path = RunFolder(tmp_path).answering
    with growing(path, "tell", TEST, session):
        rows = answers(session)
        assert path.exists()
    assert not path.exists() and session.watch is None
    assert {len(found["rows"]) for found in writes} == {3} and {found["arm"] for found in writes} == {"tell"}
    for at, row in enumerate(rows[:3]):
        texts = [found["rows"][at]["answer"] for found in writes]
        assert texts[-1] == row["answer"] and len(set(texts)) > 1
        assert writes[-1]["rows"][at] == {key: row[key] for key in ("hash", "prompt", "reference", "answer")}
    count = len(writes)
    assert rows == answers(session) and len(writes) == count


def test_it_is_written_once_a_second_and_need_not_be(session, tmp_path, monkeypatch, writes):
    now = [10.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    (tmp_path / "file").touch()
    with growing(tmp_path / "file" / "answering.json", "sft", TEST, session):
        for token in (5, 6, 7):
            session.watch(0, token)
            now[0] += 0.5
        session.watch(4, 8)  # not shown
    assert len(writes) == 2


def test_what_a_killed_session_left_is_removed_when_the_run_goes_on(tmp_path):
    folder = RunFolder(tmp_path)
    folder.config.write_text("")
    folder.set_status("running", stage="evaluate tell")
    folder.answering.write_text("{}")
    with open_folder(folder, fresh=False, config=Config()):
        assert not folder.answering.exists()
