"""Rendering without torch equals transformers', and answers end where decoding stops."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading

import jinja2
import pytest
from transformers import AutoTokenizer

import tiny
from tell.data.example import Message
from tell.errors import TellError
from tell.rows.template import ChatTokenizer

USER, ANSWER = Message("user", " Where is Reykjavik?\n"), Message("assistant", "In Iceland.")
AGAIN, YES = Message("user", "Yes or no?"), Message("assistant", "yes")
SYSTEM = Message("system", "Be brief.")
CONVERSATIONS = {
    "one turn": [USER, ANSWER],
    "prompt": [USER],
    "many turns": [USER, ANSWER, AGAIN, YES],
    "many turns, prompt": [USER, ANSWER, AGAIN],
    "system": [SYSTEM, USER, ANSWER],
    "system, many turns": [SYSTEM, USER, ANSWER, AGAIN, YES],
}
END = {
    "llama": "<|im_end|>",
    "qwen2": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "gemma2": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "phi3": "<|end|>",
    "mistral": "</s>",
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_equals_apply_chat_template(family, name, tiny_model):
    folder, messages = tiny_model(family), CONVERSATIONS[name]
    chat, theirs = ChatTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    turns = [message.to_dict() for message in messages]
    prompted = messages[-1].role == "user"
    options = {"add_generation_prompt": prompted, "enable_thinking": False}
    if messages[0] == SYSTEM and family in tiny.NO_SYSTEM:
        with pytest.raises(TellError, match="refuses the conversation"):
            chat.render(messages, add_generation_prompt=prompted)
        with pytest.raises(jinja2.TemplateError):
            theirs.apply_chat_template(turns, tokenize=False, **options)
        return
    text = chat.render(messages, add_generation_prompt=prompted)
    assert text == theirs.apply_chat_template(turns, tokenize=False, **options)
    assert chat.encode(text) == theirs.apply_chat_template(turns, return_dict=False, **options)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_ends_and_system(family, tiny_model):
    chat = ChatTokenizer(tiny_model(family))
    theirs = AutoTokenizer.from_pretrained(tiny_model(family))
    assert chat.has_own_template
    assert chat.supports_system == (family not in tiny.NO_SYSTEM)
    assert chat.end_of_turn == END[family]
    assert set(chat.stop_ids) == {theirs.eos_token_id, theirs.convert_tokens_to_ids(END[family])}


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_default_template(family, tiny_model):
    """A model without a template: documented plain text, the begin token where the tokenizer itself writes one."""
    chat = ChatTokenizer(tiny_model(family, template=False))
    theirs = AutoTokenizer.from_pretrained(tiny_model(family, template=False))
    assert not chat.has_own_template and theirs.chat_template is None
    begin = theirs.bos_token or ""
    end = theirs.eos_token
    text = f"{begin}Be brief.\n\n### Instruction:\nHi\n\n### Response:\n"
    assert chat.render([SYSTEM, Message("user", "Hi")], add_generation_prompt=True) == text
    assert chat.render([SYSTEM, Message("user", "Hi"), YES]) == f"{text}yes{end}\n\n"
    assert chat.supports_system and chat.end_of_turn == end
    # the same ids as the tokenizer gives the bare text
    assert chat.encode(text) == theirs(text.removeprefix(begin)).input_ids


def _with(folder, target, **config):
    """A copy of a tiny model's tokenizer with other settings; None removes a key."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    path = target / "tokenizer_config.json"
    data = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    return target


def test_templates_of_the_wild(tiny_model, tmp_path):
    """Tests on ``tools``, the generation tag, JSON options, loop controls and named templates."""
    source = (
        "{% if tools is not none or documents is not none %}WRONG{% endif %}"
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ loop.index }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m | tojson(separators=(',', ':'), sort_keys=true) }}{% endif %}{% endfor %}"
    )
    folder = _with(tiny_model("llama"), tmp_path / "m")
    (folder / "chat_template.jinja").write_text(source)
    theirs = AutoTokenizer.from_pretrained(folder)
    messages = [SYSTEM, Message("user", 'ö "x"'), ANSWER]
    expected = theirs.apply_chat_template([m.to_dict() for m in messages], tokenize=False)
    assert ChatTokenizer(folder).render(messages) == expected
    assert "WRONG" not in expected and '{"content":"ö' in expected

    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": source}]
    chat = ChatTokenizer(_with(folder, tmp_path / "named", chat_template=named))
    assert chat.render(messages) == expected


def test_end_token_of_the_generation_config_alone(tiny_model, tmp_path):
    folder = _with(tiny_model("llama", template=False), tmp_path / "m", eos_token=None)
    assert ChatTokenizer(folder).render([USER, YES]).endswith("yes<|im_end|>\n\n")
    for name in ("config.json", "generation_config.json"):
        (folder / name).unlink()
    with pytest.raises(TellError, match=r"no end token.*Set eos_token"):
        ChatTokenizer(folder)


def test_bad_folders(tmp_path):
    with pytest.raises(TellError, match=r"has no tokenizer\.json"):
        ChatTokenizer(tmp_path)


def test_fingerprint_follows_the_template(tiny_model, tmp_path):
    folder = _with(tiny_model("llama"), tmp_path / "m")
    before = ChatTokenizer(folder).fingerprint
    assert before == ChatTokenizer(tiny_model("llama")).fingerprint
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + " ")
    assert ChatTokenizer(folder).fingerprint != before


def test_rows_import_no_torch():
    code = (
        "import sys, tell.rows.tokenize, tell.rows.row_cache, tell.rows.template; "
        "sys.exit(sum(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def broken(folder, tmp_path, name: str, content: bytes):
    copy = shutil.copytree(folder, tmp_path / "broken")
    (copy / name).write_bytes(content)
    return copy


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", b'{"version": "1.0", "trunc', "tokenizer.json: is not a tokenizer, or truncated"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        ("tokenizer.json", b"", "truncated"),
        ("tokenizer_config.json", b"[1]", "tokenizer_config.json: is not a JSON object"),
        ("tokenizer_config.json", b'{"eos_token": "</s>"', "tokenizer_config.json: is not valid JSON"),
        ("tokenizer_config.json", b"[" * 100_000, "nested too deeply"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "generation_config.json: eos_token_id is 'x'"),
        ("generation_config.json", b'{"eos_token_id": [1, -5]}', r"eos_token_id is \[1, -5\]"),
        ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja: is not UTF-8"),
    ],
)
def test_files_that_are_damaged_are_named(name, content, said, tiny_model, tmp_path):
    with pytest.raises(TellError, match=said):
        ChatTokenizer(broken(tiny_model("llama"), tmp_path, name, content))


@pytest.mark.parametrize("template", [5, {"a": 1}, [], [{"name": 3}], ["x"]])
def test_a_template_that_is_no_text(template, tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model("llama"), tmp_path / "m")
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    with pytest.raises(TellError, match="chat_template is not text"):
        ChatTokenizer(copy)


@pytest.mark.parametrize(
    "template", ["{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{% if %}"]
)
def test_a_template_that_never_ends_or_is_not_valid_is_refused(template, tiny_model, tmp_path):
    chat = ChatTokenizer(broken(tiny_model("llama"), tmp_path, "chat_template.jinja", template.encode()))
    with pytest.raises(TellError, match="the chat template"):
        chat.render([USER])


def test_a_rendering_in_another_thread_refills_no_budget(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    half = "{% for i in range(4) %}{% for j in range(50000) %}{% endfor %}{% endfor %}"
    template = "{% if messages | length > 1 %}" + half + "{{ pause() }}" + half + "{% endif %}x"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    chat, reached, other = ChatTokenizer(folder), threading.Event(), threading.Event()

    def pause() -> str:
        reached.set()
        other.wait(0.5)
        return ""

    chat._environment.globals["pause"] = pause

    def meanwhile() -> None:
        reached.wait()
        chat.render([USER])
        other.set()

    thread = threading.Thread(target=meanwhile)
    thread.start()
    try:
        with pytest.raises(TellError, match="it takes too many steps"):
            chat.render([USER, ANSWER])
    finally:
        reached.set()
        thread.join()
    assert reached.is_set() and other.is_set()
