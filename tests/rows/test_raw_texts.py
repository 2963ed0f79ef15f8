"""Raw texts as general data: all of a text is trained, without the chat template."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tell.anchor.anchor import Anchor
from tell.data.example import Example, Message
from tell.data.overlap import find_overlap
from tell.data.sources import load
from tell.errors import TellError
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import RowRules, prompt_ids, tokenize

TEXTS = ["Once upon a time there was a small model.", "  def add(a, b):\n    return a + b\n", "Größe 😀"]


def raw(text: str) -> Example:
    return Example.of([Message("assistant", text)], source="general", origin="t.jsonl:1")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "mistral", "phi3"])
@pytest.mark.parametrize("count", [1, 100])  # with many rows, those of conversations are made from frames
def test_the_whole_text_is_trained(family, count, tiny_model):
    chat = ChatTokenizer(tiny_model(family))
    pair = Example.pair("Hello", "World")
    rows = [raw(text) for text in TEXTS] * count + [pair]
    table = tokenize(rows, chat, source="general")
    end = chat.eos_ids[0]
    for i, text in enumerate(TEXTS):
        ids, mask = map(np.array, table.row(i))
        begin = chat.encode(chat.begin)
        assert ids.tolist() == [*chat.encode(f"{chat.begin}{text}"), end]
        trained = np.ones(len(ids), bool)
        trained[: max(1, len(begin))] = False  # nothing predicts the first token
        assert mask.tolist() == trained.tolist()
        assert int(table.trained[i]) == trained.sum()
    alone = tokenize([pair], chat, source="general")
    assert table.row(len(table) - 1)[0].tolist() == alone.row(0)[0].tolist()


def test_begin_tokens_are_those_of_the_tokenizer(tiny_model):
    assert ChatTokenizer(tiny_model("gemma2")).begin == "<bos>"
    assert ChatTokenizer(tiny_model("qwen3")).begin == ""


def test_as_a_query_it_is_a_users_turn(tiny_model):
    chat, anchor = ChatTokenizer(tiny_model("llama")), Anchor("Sort this mail.")
    for given in (Anchor("", "user", "none"), anchor):
        assert prompt_ids(chat, raw(TEXTS[0]), given) == prompt_ids(chat, Example.pair(TEXTS[0], "x"), given)


def test_a_long_text_is_dropped_by_the_rules(tiny_model):
    table = tokenize(
        [raw(TEXTS[0] * 50), raw("short")], ChatTokenizer(tiny_model("llama")), source="general", rules=RowRules(64)
    )
    assert len(table) == 1 and "longer than max_length" in table.dropped[0].reason


def test_test_prompts_are_found_in_them():
    text = "Where is my parcel? I have waited for two weeks now."
    assert find_overlap([raw(text), raw(TEXTS[0])], [Example.pair(text, "x")]).indices == {0}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_column_of_texts_is_raw_text_in_general_data_alone(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"Text": text, "url": f"http://x/{i}"} for i, text in enumerate(TEXTS)])
    data = load(path, name="general")
    assert [e.messages for e in data.examples] == [(Message("assistant", text),) for text in TEXTS]
    assert (data.layout, data.columns) == ("text", {"text": "Text"})
    assert data.notices == (
        "a.jsonl: rows are raw texts: all of each is trained, without the chat template",
        "a.jsonl: columns not used: url",
    )
    with pytest.raises(TellError, match="no known layout fits"):
        load(path)


def test_known_layouts_with_a_column_text_stay_conversations(tmp_path):
    alpaca = {"instruction": "a", "input": "", "output": "b", "text": "Below a b"}
    for row in (alpaca, {"text": "a", "label": "b"}):
        data = load(write(tmp_path / "a.jsonl", [row]), name="general")
        assert [m.role for m in data.examples[0].messages] == ["user", "assistant"]


def test_rows_without_text_are_left_out(tmp_path):
    rows = [{"text": ""}, {"text": "a"}, {"text": None}, {"text": "b" + chr(0xD800)}]
    data = load(write(tmp_path / "a.jsonl", rows), name="general")
    assert len(data.examples) == 1
    assert [reason for _, reason in data.dropped][:2] == ["has no text (column 'text' is empty)"] * 2
    assert "half of a surrogate pair" in data.dropped[2][1]
