"""The prelude before a chat template: other runtimes render what the run renders."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import nodes

from tell.anchor.anchor import NO_ANCHOR, Anchor
from tell.data.example import Example, Message
from tell.data.layouts import Layout
from tell.data.turns import to_messages
from tell.errors import TellError
from tell.rows.prelude import _BREAKS, literal, with_anchor
from tell.rows.sandbox import chat_environment
from tell.rows.template import DEFAULT_TEMPLATE, ChatTokenizer
from tell.run.answers import shots_by_system, shown_turns
from template_bed import tokenizer_of
from tiny import _STYLES, NO_SYSTEM

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "1 Jan 1970" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
INDENTED = "\n  {% for m in messages %}\n  <s>{{ m.role }}: {{ m.content }}</s>\n  {% endfor %}\n"
TEMPLATES = {
    **{family: style[5] for family, style in _STYLES.items()},
    "llama3": LLAMA3,
    "indented": INDENTED,
    "none": None,
}
TRICKY = "Answer {{ 'x' }} {% if %} {# no #} it's \"q\" \\n \\\\ öß 漢🙂\r\nnext.\ttab"


def takes_system(name: str) -> bool:
    return name not in NO_SYSTEM


ANCHORS = [Anchor(TRICKY, "user"), Anchor("Sort this mail", "user"), Anchor("Be brief.", "system")]


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> dict[str, ChatTokenizer]:
    """A tokenizer with each template's special tokens."""
    made = {}
    for name, template in TEMPLATES.items():
        folder = tokenizer_of(template or DEFAULT_TEMPLATE, tmp_path_factory.mktemp(name), "bytes")
        if template is None:
            (folder / "chat_template.jinja").unlink()
        else:
            (folder / "chat_template.jinja").write_bytes(template.encode())
        made[name] = ChatTokenizer(folder)
    return made


@pytest.fixture(scope="module")
def theirs(chats):
    """transformers' tokenizers of the same folders."""
    from transformers import PreTrainedTokenizerFast

    return {
        name: PreTrainedTokenizerFast(tokenizer_file=str(chat.folder / "tokenizer.json"), **chat.special)
        for name, chat in chats.items()
    }


def conversation(*turns: str) -> list[Message]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [Message(roles[turn[0]], turn[2:]) for turn in turns]


CONVERSATIONS = [
    conversation("u hi"),
    conversation("u Be {{ brief }} '\"\\"),
    conversation("s Talk.", "u hi"),
    conversation("u one", "a two", "u three"),
    conversation("s Talk.", "u one", "a two", "u three"),
]


def rendered(theirs, template: str, turns: list[Message], **more) -> list[int]:
    given = [m.to_dict() for m in turns]
    found = theirs.apply_chat_template(given, chat_template=template, add_generation_prompt=True, **more)
    return list(found["input_ids"])


def expected(chat: ChatTokenizer, turns) -> list[int]:
    return chat.encode(chat.render(turns, add_generation_prompt=True))


@pytest.mark.parametrize(
    ("name", "anchor"),
    [
        pytest.param(name, anchor, id=f"{name}-{anchor.text[:8]}")
        for name in TEMPLATES
        for anchor in ANCHORS
        if anchor.place == "user" or takes_system(name)  # else the run itself puts it into the user turn
    ],
)
def test_token_ids_are_those_of_the_run(name, anchor, chats, theirs):
    chat = chats[name]
    template = with_anchor(chat.template, anchor, special=chat.special)
    for turns in CONVERSATIONS:
        if turns[0].role == "system" and not takes_system(name):
            continue
        ids = expected(chat, anchor.apply(turns))
        assert rendered(theirs[name], template, turns) == ids
        assert rendered(theirs[name], template, list(anchor.apply(turns))) == ids  # it is there already
        assert rendered(theirs[name], template, turns, tell_anchor=True) == ids
        assert rendered(theirs[name], template, turns, tell_anchor=False) == expected(chat, turns) != ids
        parts = [{"role": m.role, "content": [{"type": "text", "text": m.content}]} for m in turns]
        if all(m.role != "assistant" for m in turns):
            found = theirs[name].apply_chat_template(parts, chat_template=template, add_generation_prompt=True)
            assert list(found["input_ids"]) == ids


WORDS = (
    *("Answers wanted", "Answer", "Answer: yes", "Answer\n\nyes", "Answer9", "Answer… now", "answer", "Answerà"),
    *(f"Answer{sign}now" for sign in "，：。？（•→€£°¡¿«\u200b\u3000😀🙂"),
    *("Answer漢", "Answer９", "Answer²"),
)
"""Texts that the anchor ``Answer`` heads, and texts that it does not."""


def test_only_whole_words_head_a_text(chats, theirs):
    anchor, chat = Anchor("Answer"), chats["llama"]
    template = with_anchor(chat.template, anchor)
    for text in WORDS:
        turns = [Message("user", text)]
        assert rendered(theirs["llama"], template, turns) == expected(chat, anchor.apply(turns)), text
    assert not any(mark.isalnum() for mark in _BREAKS) and len(set(_BREAKS)) == len(_BREAKS)


@settings(max_examples=60)
@given(
    anchor=st.text(min_size=1, max_size=30).map(str.strip).filter(bool),
    place=st.sampled_from(["user", "system"]),
    texts=st.lists(st.text(max_size=30), min_size=1, max_size=3),
    system=st.none() | st.text(max_size=20),
)
def test_any_text_is_rendered_as_it_is(anchor, place, texts, system):
    """Our sandbox is jinja2 as transformers sets it up; the tests above hold the two together."""
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}"
    anchor = Anchor(anchor, place)
    turns = [Message("system", system)] if system is not None else []
    turns += [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]
    environment = chat_environment()

    def render(template: str, messages) -> str:
        environment.start()
        return environment.from_string(template).render(messages=[m.to_dict() for m in messages])

    assert render(with_anchor(source, anchor), turns) == render(source, anchor.apply(turns))
    assert render("{{ " + literal({"a": [anchor.text, None, True, 1.5]}) + "['a'][0] }}", []) == anchor.text


def test_thoughts_are_off_unless_asked_for(chats, theirs):
    chat, turns = chats["qwen3"], conversation("u hi")
    closed, open_ = expected(chat, turns), expected(chat.thoughtful(), turns)
    assert closed != open_
    off, on = with_anchor(chat.template), with_anchor(chat.template, thinking=True)
    assert rendered(theirs["qwen3"], off, turns) == closed
    assert rendered(theirs["qwen3"], off, turns, enable_thinking=True) == open_
    assert rendered(theirs["qwen3"], on, turns) == open_
    assert rendered(theirs["qwen3"], on, turns, enable_thinking=False) == closed
    forced = with_anchor(chat.template, force_thinking=True)
    assert rendered(theirs["qwen3"], forced, turns, enable_thinking=True) == closed


def test_the_date_is_fixed(chats, theirs):
    turns = conversation("u hi")
    text = chats["llama3"].backend.decode(rendered(theirs["llama3"], with_anchor(LLAMA3), turns))
    assert "26 Jul 2024" in text
    assert "26 Jul 2024" not in chats["llama3"].backend.decode(rendered(theirs["llama3"], LLAMA3, turns))


@pytest.mark.parametrize("head", ["", "\n", "  ", "\n\n  ", " \n"])
@pytest.mark.parametrize("begin", ["{% if eos_token %}", "{{ eos_token }}{% if true %}", "x{%- if true %}"])
def test_white_space_at_the_head_of_a_template_stays(head, begin):
    source = f"{head}{begin}\n{{{{ messages[0].content }}}}{{% endif %}}"
    environment = chat_environment()
    given = {"messages": [{"role": "user", "content": "hi"}], "eos_token": "</s>"}
    want = environment.from_string(source).render(given)
    for template in (
        with_anchor(source, special={"eos_token": "</s>"}),
        with_anchor(source, shots={None: []}, special={"eos_token": "</s>"}),
        with_anchor(source, shots={None: []}),
    ):
        environment.start()
        assert environment.from_string(template).render(given) == want


def test_a_template_that_needs_nothing_stays():
    assert with_anchor(INDENTED) == INDENTED
    assert with_anchor(INDENTED, NO_ANCHOR, shots={}) == INDENTED


def shot(prompt: list[Message], answer: str) -> Example:
    return Example.of([*prompt, Message("assistant", answer)], source="task", origin="row")


@pytest.mark.parametrize("name", ["llama", "mistral", "none"])
def test_fixed_examples_come_first(name, chats, theirs):
    chat, anchor = chats[name], Anchor("Sort this mail.")
    shots = [shot(conversation("u {{ one }}"), "a\n1"), shot(conversation("u two"), "it's 'b'")]
    if takes_system(name):
        shots.append(shot(conversation("s Talk.", "u three"), "c"))
        shots.append(shot(conversation("s Sing.", "u four"), "d"))
    template = with_anchor(chat.template, anchor, shots=shots_by_system(shots), special=chat.special)
    for prompt in CONVERSATIONS:
        if prompt[0].role == "system" and not takes_system(name):
            continue
        turns = anchor.apply(shown_turns(shot(prompt, "x"), shots))
        assert rendered(theirs[name], template, prompt) == expected(chat, turns)
        assert rendered(theirs[name], template, prompt, tell_anchor=False) == expected(chat, prompt)


def test_examples_with_tools_cannot_travel():
    tools = json.dumps([{"type": "function", "function": {"name": "f"}}])
    example = shot([Message("user", "x", tools=tools)], "y")
    with pytest.raises(TellError, match=r"task\.shots.*tools"):
        with_anchor(INDENTED, shots=shots_by_system([example]))


def test_parts_that_are_no_text_stay(chats, theirs):
    source = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}"
        "{% else %}{{ m.content | tojson }}{% endif %}{% endfor %}"
    )
    environment = chat_environment()
    template = environment.from_string(with_anchor(source, Anchor("Look.")))
    image = {"type": "image"}
    for parts, kept in (
        ([image, {"type": "text", "text": "What?"}], 2),
        ([{"type": "text", "text": "Look. What?"}, image], None),
    ):
        environment.start()
        found = json.loads(template.render(messages=[{"role": "user", "content": parts}]))
        head = [{"type": "text", "text": "Look.\n\n"}] if kept else []
        assert found == [*head, *parts]
    environment.start()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.render(messages=[{"role": "user", "content": parts}]) == "Look.\n\nab"


def test_no_loop_over_contents():
    """vLLM takes a loop over a turn's content as a sign that the template wants lists of parts."""
    tree = chat_environment().parse(with_anchor("", ANCHORS[1], shots={None: conversation("u a", "a b")}))
    loops = [loop.iter for loop in tree.find_all(nodes.For)]
    assert loops and not any(list(iter_.find_all(nodes.Getitem)) for iter_ in loops)


def test_an_exported_model_renders_rows_without_its_anchor(chats, tmp_path):
    """Tuning an exported model again must not put the old anchor on every row."""
    folder = tokenizer_of(with_anchor(TEMPLATES["llama"], ANCHORS[1]), tmp_path, "bytes")
    turns = conversation("u hi")
    assert ChatTokenizer(folder).render(turns) == chats["llama"].render(turns)


@pytest.mark.parametrize("again", [Anchor("Answer."), Anchor("Answer.", "system"), NO_ANCHOR])
def test_an_exported_model_tuned_and_exported_again(again, chats, theirs):
    """The second export's template renders its own anchor and examples alone, not those of the first."""
    chat = chats["llama"]
    first = with_anchor(chat.template, ANCHORS[1], shots={None: conversation("u old", "a older")})
    examples = [shot(conversation("u two"), "b")] if again else []
    template = with_anchor(first, again, shots=shots_by_system(examples))
    for turns in CONVERSATIONS:
        ids = expected(chat, again.apply(shown_turns(shot(turns, "x"), examples)))
        assert rendered(theirs["llama"], template, turns) == ids
        assert rendered(theirs["llama"], template, turns, tell_anchor=True) == ids
        assert rendered(theirs["llama"], template, turns, tell_anchor=False) == expected(chat, turns)


def test_parts_are_joined_as_in_training(chats, theirs):
    chat, anchor = chats["llama"], Anchor("Sort this mail.")
    template = with_anchor(chat.template, anchor)
    parts = [{"type": "text", "text": "Where is "}, {"type": "text", "text": "my parcel?"}]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]}
    turns = to_messages(record, Layout("", {"messages": "messages"}))[:1]
    found = theirs["llama"].apply_chat_template(
        record["messages"][:1], chat_template=template, add_generation_prompt=True
    )
    assert list(found["input_ids"]) == expected(chat, anchor.apply(turns))
