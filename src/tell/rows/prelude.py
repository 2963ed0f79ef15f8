"""The run's prompt as a chat template: a Jinja prelude that any server renders before the model's own template.

A server knows no anchors, no fixed date and no fallback template. `with_anchor` writes all that into one template, in
what transformers' sandboxed Jinja, vLLM and llama.cpp's Jinja engine share: no method but ``startswith``, no characters
of a text (llama.cpp cuts bytes) but where ``isalnum`` is known, and no loop over a turn's content (vLLM takes such a
loop as a sign that the template wants lists of parts).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tell.anchor.anchor import NO_ANCHOR, Anchor
from tell.data.example import Message
from tell.errors import TellError
from tell.rows.sandbox import FIXED_DATE

SWITCH = "tell_anchor"
"""``chat_template_kwargs={"tell_anchor": false}`` renders a conversation without anchor and fixed examples."""
THINKING = ("enable_thinking", "thinking")  # names of the switch for thoughts, as in `ChatTokenizer`
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
# What may follow an anchor's last letter where the anchor heads a text, for engines whose texts have no `isalnum`
# (llama.cpp's): signs of Latin-1, punctuation, currencies, arrows, Chinese and Japanese signs, full-width ones. A text
# that goes on with a rarer sign, or a control character, gets the anchor once more there than in the run.
_SIGNS = ((0x20, 0x7F), (0xA0, 0xC0), (0xD7, 0xD8), (0xF7, 0xF8), (0x2000, 0x200C), (0x2010, 0x2028), (0x2030, 0x205F))
_MORE = ((0x20A0, 0x20C1), (0x2190, 0x2200), (0x3000, 0x3040), (0xFF01, 0xFF66))
_BREAKS = "\n\t\r" + "".join(c for place in (*_SIGNS, *_MORE) for c in map(chr, range(*place)) if not c.isalnum())
_EMOJI = "'\U0001f600'[:2]"  # in llama.cpp two bytes, with which U+1F000 to U+1FFFF begin: emoji, hardly a letter
_DIRECTIVE = re.compile(r"%[-#]?[aAbBdeHIjmMpSuUwWyY]")

Shots = Mapping[str | None, Sequence[Message]]
"""The turns of fixed examples by the conversation's own system text; None: of any other conversation."""


def with_anchor(
    template: str,
    anchor: Anchor = NO_ANCHOR,
    *,
    thinking: bool = False,
    force_thinking: bool = False,
    shots: Shots | None = None,
    special: Mapping[str, str] | None = None,
) -> str:
    """A chat template that renders a plain conversation as the run renders its prompts, token by token.

    Args:
        template: the model's own, or the default that `ChatTokenizer` uses where it has none.
        anchor: put at the head of the first user turn or into the system message, unless it is there already.
        thinking: whether the template's switch for thoughts is on where the caller does not say (``enable_thinking``).
        force_thinking: it is ``thinking`` whatever the server says. For llama.cpp, which always sets it, on by default,
            and Llama's ``date_string``, of the day.
        shots: turns of the fixed examples (``task.shots``), put before the conversation, after its system text.
        special: the tokenizer's special tokens by name (``bos_token``), for servers that do not pass them.

    Returns:
        Jinja. Contents may be strings or lists of parts; a list of text parts is joined as in training, by nothing,
        where the server has not joined it by newlines before (vLLM, llama.cpp).

    Raises:
        TellError: the fixed examples have tools, which belong to a conversation as a whole.
    """
    lines = [*_values(template, thinking, force_thinking, special), *_date(template, force_thinking)]
    if anchor or shots:
        lines += _turns(anchor, shots or {})
    if SWITCH in template:  # of an exported model, which would add its own anchor and examples
        lines.append(f"{{%- set {SWITCH} = false -%}}")
    if not lines:
        return template
    # `trim_blocks` drops the newline: the template begins on a line of its own, its white space as before.
    return "\n".join(lines).removesuffix("-%}") + "%}\n" + template


def literal(value: object) -> str:
    """A JSON value as a Jinja expression.

    Newlines are escaped, since Jinja changes them; all else but quotes and backslashes is written as it is.
    """
    if isinstance(value, str):
        text = value.replace("\\", "\\\\").replace("'", "\\'")
        return "'" + text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t") + "'"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(str(key))}: {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(literal, value)) + "]"
    return (
        {None: "none", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def _values(template: str, thinking: bool, force: bool, special: Mapping[str, str] | None) -> list[str]:
    """Variables that the run sets, where the template reads them."""
    lines = []
    for name in ("tools", "documents"):
        if name in template:  # transformers passes none, which templates test for
            lines.append(f"{{%- if {name} is not defined %}}{{% set {name} = none %}}{{% endif -%}}")
    for name in THINKING:
        if re.search(rf"\b{name}\b", template):
            value = literal(thinking)
            lines.append(
                f"{{%- set {name} = {value} -%}}"
                if force
                else f"{{%- if {name} is not defined %}}{{% set {name} = {value} %}}{{% endif -%}}"
            )
    # one that the tokenizer lacks is empty: llama.cpp would name the token of some default id
    tokens = [name for name in _TOKENS if special is not None and name in template]
    lines += [f"{{%- set {name} = {literal((special or {}).get(name, ''))} -%}}" for name in tokens]
    return lines


def _date(template: str, force: bool) -> list[str]:
    """``strftime_now`` of the run's fixed date, by replacing each directive that the template's formats may have."""
    lines = []
    if force and "date_string" in template:
        lines.append(f"{{%- set date_string = {literal(FIXED_DATE.strftime('%d %b %Y'))} -%}}")
    if "strftime_now" not in template:
        return lines
    found = dict.fromkeys(_DIRECTIVE.findall(template))
    steps = "".join(f" | replace({literal(key)}, {literal(FIXED_DATE.strftime(key))})" for key in found)
    return [*lines, "{%- macro strftime_now(format) %}{{ format" + steps + " }}{% endmacro -%}"]


def _turns(anchor: Anchor, shots: Shots) -> list[str]:
    """The conversation with examples and anchor, as `Anchor.apply` of `tell.run.answers.shown_turns`.

    All that is set outside loops is an attribute of ``tell``, lest a variable of the model's template be overwritten.
    """
    return [
        f"{{%- if {SWITCH} is not defined or {SWITCH} -%}}",
        "{%- set tell = namespace(turns=[], out=[], placed=false, heads=false) -%}",
        "{%- for m in messages -%}",
        "{%- set parts = m['content'] is not string and m['content'] is iterable -%}",
        "{%- if parts and m['role'] in ['system', 'user'] and "
        "not (m['content'] | rejectattr('type', 'equalto', 'text') | list) -%}",
        "{%- set tell.turns = tell.turns + [{'role': m['role'], "
        "'content': m['content'] | map(attribute='text') | join('')}] -%}",
        "{%- else -%}{%- set tell.turns = tell.turns + [m] -%}{%- endif -%}",
        "{%- endfor -%}",
        *_shots(shots),
        *_anchored(anchor),
        "{%- set messages = tell.turns -%}",
        "{%- endif -%}",
    ]


def _shots(shots: Shots) -> list[str]:
    if not shots:
        return []
    if any(turn.tools for turns in shots.values() for turn in turns):
        remedy = "Write the tools into the content of those rows."
        raise TellError("the fixed examples have tools, which no template can add", where="task.shots", remedy=remedy)
    lines = ["{%- set tell.system = tell.turns[:1] if tell.turns and tell.turns[0]['role'] == 'system' else [] -%}"]
    others = f"{{%- set tell.shots = {literal([turn.to_dict() for turn in shots.get(None, ())])} -%}}"
    named = [(text, turns) for text, turns in shots.items() if text is not None]
    for number, (text, turns) in enumerate(named):
        test = f"tell.system and tell.system[0]['content'] == {literal(text)}"
        lines.append(f"{{%- {'elif' if number else 'if'} {test} -%}}")
        lines.append(f"{{%- set tell.shots = {literal([turn.to_dict() for turn in turns])} -%}}")
    lines += ["{%- else -%}", others, "{%- endif -%}"] if named else [others]
    return [*lines, "{%- set tell.turns = tell.system + tell.shots + tell.turns[tell.system | length:] -%}"]


def _anchored(anchor: Anchor) -> list[str]:
    if not anchor:
        return []
    wanted = "loop.first and m['role'] == 'system'" if anchor.place == "system" else "m['role'] == 'user'"
    first = f"[{{'role': {literal(anchor.place)}, 'content': tell.anchor}}]"
    return [
        f"{{%- set tell.anchor = {literal(anchor.text)} -%}}",
        "{%- for m in tell.turns -%}",
        f"{{%- if not tell.placed and {wanted} -%}}",
        "{%- set tell.placed = true -%}",
        "{%- set said = m['content'] if m['content'] is string else "
        "(m['content'][0]['text'] if m['content'] and m['content'][0]['type'] == 'text' else '') -%}",
        *_heads(anchor),
        "{%- if tell.heads or (m['content'] is not string and m['content'] is not iterable) -%}",
        "{%- set tell.out = tell.out + [m] -%}",
        "{%- elif m['content'] is string -%}",
        "{%- set tell.out = tell.out + [{'role': m['role'], 'content': tell.anchor ~ '\\n\\n' ~ m['content']}] -%}",
        "{%- else -%}",
        "{%- set tell.out = tell.out + [{'role': m['role'], "
        "'content': [{'type': 'text', 'text': tell.anchor ~ '\\n\\n'}] + m['content']}] -%}",
        "{%- endif -%}",
        "{%- else -%}{%- set tell.out = tell.out + [m] -%}{%- endif -%}",
        "{%- endfor -%}",
        f"{{%- set tell.turns = tell.out if tell.placed else {first} + tell.out -%}}",
    ]


def _heads(anchor: Anchor) -> list[str]:
    """Whether the anchor heads a text as whole words, as `tell.anchor.anchor` says."""
    if not anchor.text[-1:].isalnum():
        return ["{%- set tell.heads = said.startswith(tell.anchor) -%}"]
    end = len(anchor.text)
    return [
        "{%- set tell.heads = said == tell.anchor -%}",
        "{%- if ''.isalnum is defined -%}",
        f"{{%- set tell.heads = said.startswith(tell.anchor) and not said[{end}:{end + 1}].isalnum() -%}}",
        f"{{%- else -%}}{{%- set tell.emoji = {_EMOJI} -%}}",
        f"{{%- for mark in {literal(list(_BREAKS))} + [tell.emoji] -%}}",
        "{%- if said.startswith(tell.anchor ~ mark) -%}{%- set tell.heads = true -%}{%- endif -%}",
        "{%- endfor -%}{%- endif -%}",
    ]
