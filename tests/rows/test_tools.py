"""Tools, calls and results are context or the row is refused; few-shot turns and weight 0 carry no loss."""

from __future__ import annotations

import json
import shutil

import pytest

from tell.anchor.anchor import Anchor
from tell.data.example import Example, Message
from tell.data.sources import load
from tell.errors import TellError
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import prompt_ids, tokenize

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "weather", "arguments": '{"town": 7}'}}],
}
CALLED = Message("assistant", "", False, '{"tool_calls": [{"function": {"name": "weather", "arguments": {}}}]}')
TURNS = [
    {"role": "user", "content": "Rain?"},
    CALL,
    {"role": "tool", "content": "dry"},
    {"role": "assistant", "content": "no"},
]
TEMPLATE = (  # as Qwen's, in short
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + (call.function.arguments | tojson) }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def chat(tiny_model, tmp_path) -> ChatTokenizer:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return ChatTokenizer(folder)


def examples(tmp_path, *rows) -> list[Example]:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load(str(path)).examples


def trained(chat, example) -> str:
    ids, mask = tokenize([example], chat, source="task").row(0)
    return chat.backend.decode(ids[mask].tolist(), skip_special_tokens=False)


def test_tools_and_calls_are_context(chat, tmp_path):
    (example,) = examples(tmp_path, {"messages": TURNS, "tools": TOOLS})
    ids, mask = tokenize([example], chat, source="task").row(0)
    text = chat.backend.decode(ids.tolist(), skip_special_tokens=False)
    assert "<call>weather" in text and '{"town": 7}' in text and "parameters" in text and "dry" in text
    assert trained(chat, example) == "no<|im_end|>"
    prompt = prompt_ids(chat, example)
    assert ids[: len(prompt)].tolist() == prompt and not mask[: len(prompt)].any()
    anchored = chat.render(Anchor("Be brief.").apply(example.messages))
    assert "Be brief.\n\nRain?" in anchored and "parameters" in anchored


def test_a_template_without_tools_refuses_the_row(tiny_model, tmp_path):
    chat = ChatTokenizer(tiny_model("llama"))
    plain = [TURNS[0], TURNS[-1]]
    for row, what in (({"messages": TURNS}, "tool calls"), ({"messages": plain, "tools": TOOLS}, "1 tools")):
        (example,) = examples(tmp_path, row)
        with pytest.raises(TellError, match=f"leaves out {what}"):
            chat.render(example.prompt, add_generation_prompt=True)
        with pytest.raises(TellError, match=r"rows.jsonl:1: .*leaves out"):
            tokenize([example], chat, source="task")


@pytest.mark.parametrize("result", ['{"temp": 20}', "two\nlines", " padded ", ""])
def test_results_written_as_json_are_shown(chat, result):
    folder = chat.folder
    written = TEMPLATE.replace("m.content }}", "(m.content | tojson if m.role == 'tool' else m.content) }}")
    (folder / "chat_template.jinja").write_text(written)  # as Llama 3.1's
    turns = [Message("user", "Rain?"), CALLED, Message("tool", result), Message("assistant", "no")]
    assert json.dumps(result) in ChatTokenizer(folder).render(turns)


def test_a_template_that_leaves_out_one_result_is_refused(chat):
    last = TEMPLATE.replace("+ m.content }}", "+ (m.content if m.role != 'tool' or loop.index > 3 else '') }}")
    (chat.folder / "chat_template.jinja").write_text(last)
    turns = [Message("user", "Rain? Is it dry?"), CALLED, Message("tool", "dry"), Message("tool", "warm")]
    with pytest.raises(TellError, match="leaves out a tool's result"):
        ChatTokenizer(chat.folder).render([*turns, Message("assistant", "no")])


def test_only_turns_with_loss_are_trained(chat, tmp_path):
    shown = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "COLOUR"}]
    oak = {"role": "user", "content": "oak"}
    rows = [
        {"messages": [*shown, oak, {"role": "assistant", "content": "tree"}]},
        {"messages": [shown[0], {**shown[1], "weight": 0}, oak, {"role": "assistant", "content": "tree"}]},
    ]
    first, second = examples(tmp_path, *rows)
    assert trained(chat, first) == "COLOUR<|im_end|>tree<|im_end|>" and trained(chat, second) == "tree<|im_end|>"
    (few,) = examples(tmp_path, {"prompt": [*shown, oak], "completion": [{"role": "assistant", "content": "tree"}]})
    assert trained(chat, few) == "tree<|im_end|>" and few.hash == second.hash
    many = tokenize([second] * 300, chat, source="task")  # enough for frames
    assert many.mask.sum() == 300 * tokenize([second], chat, source="task").mask.sum()
