"""Chat template and tokenizer of a model without torch: `tokenizers` and jinja2 alone.

transformers' own tokenizer classes import torch, which planning must avoid. This module reads the same files
(``tokenizer.json``, ``tokenizer_config.json``, ``chat_template.jinja``); a test compares the result with
``AutoTokenizer.apply_chat_template``.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tell.data.example import Message, tools_of
from tell.errors import TellError, first_line, is_panic
from tell.files import MOST_JSON, read_bytes, read_json, read_text

if TYPE_CHECKING:
    from jinja2 import Template, nodes

    from tell.rows.sandbox import BoundedEnvironment

# What a model without a chat template gets; the end token closes each answer. A begin token comes first where
# the tokenizer itself would write one: Gemma, for one, fails without it.
DEFAULT_TEMPLATE = (
    "{% if begins %}{{ bos_token }}{% endif %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}"
    "{% elif m['role'] == 'user' %}{{ '### Instruction:\\n' + m['content'] + '\\n\\n' }}"
    "{% else %}{{ '### Response:\\n' + m['content'] + eos_token + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)


FETCH = "Fetch the model again."
MARK = 73_010_000_000_000_000_000  # a number that no row has; JSON and changes of case keep its digits


class ChatTokenizer:
    """Renders conversations and turns text into token ids.

    Attributes:
        folder: of the model's files.
        template: the jinja source in use.
        has_own_template: False where DEFAULT_TEMPLATE is used.
        eos_ids: ids that end an answer, from tokenizer and generation config.
        thinking: whether the template's switch for thoughts is on, where it has one.
        family: ``model_type`` of the model, for messages.
    """

    def __init__(self, folder: str | Path) -> None:
        from tokenizers import Tokenizer

        self.folder, self.thinking = Path(folder), False
        path = self.folder / "tokenizer.json"
        if not path.exists():
            remedy = "Save the tokenizer with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)."
            raise TellError("has no tokenizer.json", where=str(folder), remedy=remedy)
        try:
            self.backend = Tokenizer.from_buffer(read_bytes(path, most=MOST_JSON, remedy=FETCH))
        except BaseException as error:
            if isinstance(error, TellError) or not (isinstance(error, Exception) or is_panic(error)):
                raise
            what = f"is not a tokenizer, or truncated ({first_line(error)})"
            raise TellError(what, where=str(path), remedy=FETCH) from error
        self.backend.no_truncation()
        self.backend.no_padding()
        config = _read_json(self.folder / "tokenizer_config.json")
        self.special = {
            key: token
            for key in ("bos_token", "eos_token", "unk_token", "pad_token")
            if (token := _token_text(config.get(key))) is not None
        }
        template = _read_template(self.folder, config)
        self.has_own_template = template is not None
        self.template = template if template is not None else DEFAULT_TEMPLATE
        self._headers: dict[str, tuple[int, ...]] = {}
        self._lengths: dict[str, int] = {}
        self.eos_ids = self._find_eos_ids()
        self.family = str(_read_json(self.folder / "config.json").get("model_type") or self.folder.name)
        end = self.backend.id_to_token(self.eos_ids[0])
        if end and self.backend.token_to_id(self.special.get("eos_token", "")) is None:
            self.special["eos_token"] = end  # named in the generation config only
        if not self.has_own_template:
            self.template = self.template.replace("begins", str(bool(self.begin)).lower())

    @cached_property
    def fingerprint(self) -> str:
        """Short hash over tokenizer and template, for caches."""
        digest = hashlib.sha256((self.folder / "tokenizer.json").read_bytes())
        digest.update(self.template.encode())
        digest.update(json.dumps(self.special, sort_keys=True).encode())
        digest.update(b"thinking" * self.thinking)
        return digest.hexdigest()[:16]

    def _find_eos_ids(self) -> tuple[int, ...]:
        ids: list[int] = []
        text = self.special.get("eos_token")
        if text is not None and (token := self.backend.token_to_id(text)) is not None:
            ids.append(token)
        for name in ("generation_config.json", "config.json"):
            value = _read_json(self.folder / name).get("eos_token_id")
            found = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(token) is int and 0 <= token < 2**31 for token in found):
                raise TellError(f"eos_token_id is {value!r}", where=str(self.folder / name), remedy=FETCH)
            ids += found
        if not ids:
            remedy = "Set eos_token in tokenizer_config.json."
            raise TellError("defines no end token", where=str(self.folder), remedy=remedy)
        return tuple(dict.fromkeys(ids))

    @cached_property
    def begin(self) -> str:
        """The token that the tokenizer puts before plain text; empty where it puts none."""
        begin = self.special.get("bos_token")
        ids = self.backend.encode("x").ids
        return begin if begin is not None and ids and ids[0] == self.backend.token_to_id(begin) else ""

    @cached_property
    def parsed(self) -> nodes.Template:
        """The template as jinja's syntax tree; a TellError where it is not valid."""
        try:
            return self._environment.parse(self.template)
        except Exception as error:
            what = f"the chat template cannot be read ({first_line(error)})"
            raise TellError(what, where=str(self.folder), remedy=FETCH) from error

    @cached_property
    def _compiled(self) -> Template:
        return self._environment.from_string(self.template)

    @cached_property
    def _environment(self) -> BoundedEnvironment:
        from tell.rows.sandbox import chat_environment

        return chat_environment()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as the model's text, special tokens included.

        Raises:
            TellError: the template refuses the conversation (e.g. roles out of turn), or shows nothing of its tools.
        """
        text = self._render(messages, tools_of(messages), add_generation_prompt)
        if not all(m.is_plain for m in messages):
            self._check_tools(messages, text, add_generation_prompt)
        return text

    def _check_tools(self, messages: Sequence[Message], text: str, header: bool) -> None:
        """Refuse tools, tool calls and results that a template silently leaves out."""
        tools = tools_of(messages)
        called = [m for m in messages if m.role == "assistant" and m.extra]
        lost = [f"{len(tools)} tools"] if tools and self._render(messages, None, header) == text else []
        lost += ["a tool's result"] if self._loses_results(messages, tools, header) else []
        if called and self._render([replace(m, extra="") for m in messages], tools, header) == text:
            lost.append("tool calls")
        if lost:
            what = f"the chat template of {self.family} leaves out {' and '.join(lost)}"
            remedy = "Use a model whose template shows tools, or write tools, calls and results into content."
            raise TellError(what, where=str(self.folder), remedy=remedy)

    def _loses_results(self, messages: Sequence[Message], tools: list[dict] | None, header: bool) -> bool:
        """Whether a tool's result is missing from the text; templates may write it as JSON, trimmed or cut in lines."""
        marks = {i: str(MARK + i) for i, m in enumerate(messages) if m.role == "tool" and m.content.strip()}
        if not marks:
            return False
        marked = [m.with_content(marks.get(i, m.content)) for i, m in enumerate(messages)]
        text = self._render(marked, tools, header)
        return not all(mark in text for mark in marks.values())

    def _render(self, messages: Sequence[Message], tools: list[dict] | None, header: bool) -> str:
        try:
            template = self._compiled
            with self._environment.lock:
                self._environment.start()
                text = template.render(
                    messages=[m.to_dict() for m in messages],
                    tools=tools,  # None, as in transformers: templates test `is not none`
                    documents=None,
                    add_generation_prompt=header,
                    enable_thinking=self.thinking,  # Qwen3, GLM, SmolLM3
                    thinking=self.thinking,  # DeepSeek V3.1, Granite
                    tell_anchor=False,  # a model of `tell export`: its template would put an anchor on every row
                    **self.special,
                )
            text.encode()  # half a surrogate pair, from the template or a row, is not text to a tokenizer
        except Exception as error:
            what = f"the chat template of {self.family} refuses the conversation ({error})"
            remedy = "Let roles alternate user, assistant; a template without system role needs anchor.place user."
            raise TellError(what, where=str(self.folder), remedy=remedy) from error
        return text

    @cached_property
    def supports_system(self) -> bool:
        """Whether a system message reaches the text (Gemma's template, for one, refuses it)."""
        probe = "tell-system-probe"
        try:
            text = self.render([Message("system", probe), Message("user", "x")])
        except TellError:
            return False
        return probe in text

    def thoughtful(self) -> ChatTokenizer:
        """The same with the template's switch for thoughts on; itself where it has no switch."""
        other = copy.copy(self)
        other.thinking = True
        for name in ("fingerprint", "_probe", "end_of_turn", "stop_ids", "_opens"):
            vars(other).pop(name, None)
        user = [Message("user", "x")]
        ours, theirs = (chat.render(user, add_generation_prompt=True) for chat in (self, other))
        return self if ours == theirs else other

    @cached_property
    def _probe(self) -> tuple[str, str, bool]:
        """Text between the prompt of decoding and an answer, text after the answer, whether answers are trimmed."""
        answer = "tell-answer-probe"
        turns = [Message("user", "x"), Message("assistant", f"\t{answer}\t")]  # templates write spaces, never tabs
        prompt, text = self.render(turns[:1], add_generation_prompt=True), self.render(turns)
        before, found, after = text.rpartition(answer)
        lead = before[len(prompt) :].rstrip("\t") if before.startswith(prompt) else ""
        return lead, after if found else "", turns[1].content not in text

    @property
    def lead(self) -> str:
        """What the template writes between the prompt of decoding and an answer, e.g. a space (Mistral)."""
        return self._probe[0]

    @property
    def trims(self) -> bool:
        """Whether the template takes white space off the ends of answers."""
        return self._probe[2]

    @cached_property
    def end_of_turn(self) -> str:
        """The text that closes an answer, without white space before it: ``<|im_end|>``, ``</s>``, ``<end_of_turn>``.

        It ends with the first added token: Phi-3 writes ``<|end|>`` after each answer and ``<|endoftext|>`` after
        the last. Where the template writes none that the tokenizer knows, it is the end token: decoding stops at one.
        """
        tail = self._probe[1].strip()
        ends = [tail.index(token) + len(token) for token in self._added if token.strip() and token in tail]
        return tail[: min(ends)] if ends else self.special.get("eos_token", "")

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which decoding stops: the end tokens and the last token of ``end_of_turn``."""
        turn = self.encode(self.end_of_turn)
        single = [turn[-1]] if turn and turn[-1] in self.added_ids else []
        return tuple(dict.fromkeys([*self.eos_ids, *single]))

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Ids of tokens outside the vocabulary's merges: text is split at them first."""
        return frozenset(self.backend.get_added_tokens_decoder())

    @cached_property
    def size(self) -> int:
        """One more than the highest token id."""
        return max(self.backend.get_vocab_size(with_added_tokens=False) - 1, *self.added_ids, 0) + 1

    @cached_property
    def _added(self) -> set[str]:
        return {str(token.content) for token in self.backend.get_added_tokens_decoder().values()}

    def encode(self, text: str) -> list[int]:
        """Token ids of text that already includes its special tokens."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def length(self, text: str) -> int:
        """Tokens of `encode`, counted once: a plan asks for those of a few rows again for every arm."""
        if text not in self._lengths:
            self._lengths[text] = len(self.encode(text))
        return self._lengths[text]

    def encode_header(self, text: str) -> tuple[int, ...]:
        """`encode`, cached: all rows of a template share a few short headers."""
        if len(text) > 200:
            return tuple(self.encode(text))
        if text not in self._headers:
            self._headers[text] = tuple(self.encode(text))
        return self._headers[text]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def answer(self, ids: Sequence[int]) -> str:
        """A decoded answer in the form of references: without the template's text before answers (an empty thought),
        and with the tag of a thought that the prompt opened (R1)."""
        text = self.without_lead(ids)
        return f"<think>\n{text}" if self._opens and "</think>" in text and "<think>" not in text else text

    def without_lead(self, ids: Sequence[int], *, more: bool = False) -> str:
        """A decoded answer without what the template writes before answers.

        Args:
            more: further tokens follow; nothing is returned as long as all may still be what the template writes.
        """
        text, lead = self.decode(ids), self.decode(self.encode_header(self.lead))
        if not lead.strip():
            return text
        return "" if more and lead.startswith(text) else text.removeprefix(lead)

    @cached_property
    def _opens(self) -> bool:
        return self.render([Message("user", "x")], add_generation_prompt=True).rstrip().endswith("<think>")


def _read_json(path: Path) -> dict:
    try:
        return read_json(path, remedy=FETCH)
    except FileNotFoundError:
        return {}


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_template(folder: Path, config: dict) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_text(path, remedy=FETCH)
    template = config.get("chat_template")
    if template is None:
        template = _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {str(entry.get("name")): entry.get("template", 0) for entry in template if isinstance(entry, dict)}
        template = named.get("default") or next(iter(named.values()), 0)
    if template is not None and not isinstance(template, str):
        raise TellError("its chat_template is not text", where=str(folder), remedy=FETCH)
    return template
