"""Constrained answers are always what the grammar says, whatever the model would rather write."""

from __future__ import annotations

import json
import time

import jsonschema
import numpy as np
import pytest
import torch

import tiny
from decode.test_guide import sentencepiece
from run.runs import EXAMPLES
from tell.data.closed import ClosedField
from tell.data.constraint import Constraint
from tell.data.json_text import parse_strict
from tell.data.kind import Kind
from tell.data.sources import load as load_rows
from tell.decode.batch import KernelBatch, Packed, PlainBatch
from tell.decode.engine import Engine
from tell.decode.grammar import Grammar, Grammars
from tell.decode.guide import Fields, Guide, Vocabulary
from tell.decode.layers import describe
from tell.decode.sampler import Decoding
from tell.errors import TellError
from tell.kernels.decode_ops import kernels
from tell.rows.template import ChatTokenizer
from tell.train.step import Body
from train.packed import load

SUPPORT = EXAMPLES / "support"
SCHEMA = {
    "type": "object",
    "properties": {
        "category": {"enum": ["billing", "späte Lieferung", "spätes Paket", "配送", "配信"]},
        "urgent": {"type": "boolean"},
        "amount": {"type": ["integer", "null"], "maximum": 1000, "minimum": 0},
        "tags": {"type": "array", "items": {"enum": ["a", "ab", "c"]}, "maxItems": 3},
        "text": {"type": "string", "maxLength": 12},
    },
    "required": ["category", "urgent", "amount", "tags"],
    "additionalProperties": False,
}
LABELS = ("card", "card stolen", 'a "quoted" one', "größte", "größer", "\\n", "配送")


def grammar(chat: ChatTokenizer, constraint: Constraint | dict) -> Grammar:
    made = Constraint.of_schema(constraint) if isinstance(constraint, dict) else constraint
    return Grammars(chat).compile(made)


@pytest.fixture(scope="module")
def chat(tiny_model) -> ChatTokenizer:
    return ChatTokenizer(tiny_model("llama"))


def prompts_of(n: int) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [[11, 12, *rng.integers(10, 300, 3 + i).tolist()] for i in range(n)]


@pytest.mark.parametrize(
    ("family", "fast"), [*((f, True) for f in tiny.FAMILIES[::2]), ("llama", False), ("gemma2", False)]
)
def test_every_answer_is_valid(family, fast, tiny_model):
    """Greedy and sampled, with top-k and without, with a soft cap (gemma2) and a space before the text (mistral)."""
    folder = tiny_model(family)
    model, chat = load(folder), ChatTokenizer(folder)
    engine = Engine(model, fast=fast)
    schema, labels = grammar(chat, SCHEMA), grammar(chat, Constraint(labels=LABELS))
    for changes in ({"greedy": True}, {"temperature": 3.0, "top_p": 1.0, "top_k": 0}, {"top_k": 20}):
        decoding = Decoding(300, chat.stop_ids, batch_size=5, repetition_penalty=1.3, **changes)
        prompts = prompts_of(6)
        masks = [schema.mask() if i % 3 else labels.mask() for i in range(5)] + [None]
        answers = engine.generate(prompts, decoding, masks=masks)
        for i, answer in enumerate(answers[:-1]):
            text = chat.answer(answer.ids)
            assert answer.finish == "stop" and not masks[i].failed
            if i % 3:
                jsonschema.validate(parse_strict(text), SCHEMA)
            else:
                assert text in LABELS
        assert sum(mask.forced for mask in masks[:-1]) > 10


def test_no_mask_changes_nothing(tiny_model):
    """Rows without a mask answer as alone, next to rows with one; a penalty is off for all of them."""
    folder = tiny_model("llama")
    engine, chat = Engine(load(folder)), ChatTokenizer(folder)
    decoding = Decoding(20, chat.stop_ids, greedy=True, repetition_penalty=1.0)
    prompts, made = prompts_of(6), grammar(chat, SCHEMA)
    alone = engine.generate(prompts, decoding)
    mixed = engine.generate(prompts, decoding, masks=[made.mask() if i % 2 else None for i in range(6)])
    assert [a.ids for a in alone[::2]] == [a.ids for a in mixed[::2]]
    assert [a.ids for a in alone[1::2]] != [a.ids for a in mixed[1::2]]
    assert engine.generate(prompts, decoding, masks=[None] * 6) == alone


def test_both_ways_write_the_same(tiny_model):
    """Tokens that must follow are fed in one pass; without the kernels, and one row at a time, too."""
    folder = tiny_model("llama")
    model, chat = load(folder), ChatTokenizer(folder)
    made, prompts, written = grammar(chat, SCHEMA), prompts_of(7), []
    for fast, size in ((True, 4), (False, 4), (False, 1)):
        decoding = Decoding(200, chat.stop_ids, greedy=True, batch_size=size)
        written.append(Engine(model, fast=fast).generate(prompts, decoding, masks=[made.mask() for _ in prompts]))
    assert written[0] == written[1] == written[2]


def test_the_likeliest_token_of_those_allowed(tiny_model):
    """Each token that is not forced is the model's best among the mask's, by transformers' own logits."""
    folder = tiny_model("llama")
    model, chat = load(folder), ChatTokenizer(folder)
    made, (prompt,) = grammar(chat, SCHEMA), prompts_of(1)
    (answer,) = Engine(load(folder)).generate([prompt], Decoding(200, chat.stop_ids, greedy=True), masks=[made.mask()])
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer.ids])).logits[0, len(prompt) - 1 :]
    mask, at, free = made.mask(), 0, 0
    forced = mask.start()
    while at < len(answer.ids):
        for token in forced:
            assert answer.ids[at] == token
            at += 1
        if at == len(answer.ids):
            break
        allowed = torch.from_numpy(mask.allowed(logits.shape[1]))
        assert answer.ids[at] == int(logits[at].masked_fill(~allowed, -torch.inf).argmax())
        forced, at, free = mask.take(answer.ids[at]), at + 1, free + 1
    assert mask.ended and free + mask.forced == len(answer.ids)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_several_tokens_at_once(family, tiny_model):
    """As if they had come with the prompt; with windows, a shared prefix and rows that change places."""
    body = Body(load(tiny_model(family)))
    rng = np.random.default_rng(3)
    prefix, rows = rng.integers(10, 300, 40).tolist(), [rng.integers(10, 300, n).tolist() for n in (45, 3, 17)]
    more = [rng.integers(10, 300, n).tolist() for n in (1, 6, 30)]
    decoding, device = Decoding(4, ()), torch.device("cpu")
    makers = [lambda: PlainBatch(body, decoding, 4, 100, prefix, device)]
    if kernels(torch.float32) is not None:
        packed = Packed(describe(body.core), body)
        makers.append(lambda: KernelBatch(packed, decoding, 4, 100, prefix))
    with torch.no_grad():
        for make in makers:
            whole, parts = make(), make()
            expected = whole.prefill([row + new for row, new in zip(rows, more, strict=True)], 0)
            parts.prefill([rows[0], [5, 6], rows[2], rows[1]], 0)
            parts.move([3], [1], 17)
            found = parts.extend([len(row) for row in rows], more)
            assert torch.allclose(found, expected, atol=1e-4)


def test_a_guide_decides_within_the_mask(tiny_model):
    """The guide's values are taken where the mask has them, in scripts whose characters begin with the same bytes."""
    folder = tiny_model("llama")
    chat, prompts = ChatTokenizer(folder), prompts_of(5)
    values = ('"billing"', '"späte Lieferung"', '"spätes Paket"', '"配送"', '"配信"')
    fields = Fields(Vocabulary(chat), [ClosedField(("category",), "value", values)], chat.stop_ids, '{"category":')
    engine, decoding = Engine(load(folder)), Decoding(200, chat.stop_ids, greedy=True)
    few = SCHEMA | {"properties": SCHEMA["properties"] | {"category": {"enum": ["billing", "other"]}}}
    for schema, expected in ((SCHEMA, [json.loads(v) for v in values]), (few, ["billing", None, None, None, None])):
        made = grammar(chat, schema)
        guides = [Guide(fields, [np.where(np.arange(5) == i, 50.0, -np.inf)], [np.zeros(5)]) for i in range(5)]
        answers = engine.generate(prompts, decoding, guides=guides, masks=[made.mask() for _ in prompts])
        for answer, value in zip(answers, expected, strict=True):
            found = parse_strict(chat.answer(answer.ids))
            jsonschema.validate(found, schema)
            assert value is None or found["category"] == value


@pytest.mark.parametrize("limit", [1, 4, 9])
def test_a_limit_in_the_middle_is_said(limit, tiny_model):
    folder = tiny_model("llama")
    engine, chat = Engine(load(folder)), ChatTokenizer(folder)
    masks = [grammar(chat, SCHEMA).mask() for _ in range(3)]
    for answer in engine.generate(prompts_of(3), Decoding(limit, chat.stop_ids), masks=masks):
        assert answer.finish == "length" and len(answer.ids) == limit  # forced tokens count too


def test_an_answer_that_is_certain_needs_no_model(tiny_model):
    """All of it is forced: no pass at all, every token reported, and it may fill the limit exactly."""
    folder = tiny_model("llama")
    engine, chat = Engine(load(folder)), ChatTokenizer(folder)
    made, told = grammar(chat, {"const": {"a": [1, 2]}}), []
    exact = len(engine.generate(prompts_of(1), Decoding(99, chat.stop_ids), masks=[made.mask()])[0].ids)
    for limit, finish in ((99, "stop"), (exact, "stop"), (exact - 1, "length")):
        told.clear()
        masks = [made.mask(), made.mask()]
        done = engine.generate(
            prompts_of(2), Decoding(limit, chat.stop_ids), masks=masks, on_token=lambda *of: told.append(of)
        )
        assert [answer.finish for answer in done] == [finish] * 2
        assert [token for row, token in told if row == 1] == done[1].ids
    assert json.loads(
        chat.answer(engine.generate(prompts_of(1), Decoding(99, chat.stop_ids), masks=[made.mask()])[0].ids)
    )


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_references_are_accepted(kind, tiny_model, tmp_path):
    """Every answer of the shipped task, in each white space it may be written in."""
    chat = ChatTokenizer(tiny_model("llama") if kind == "bytes" else sentencepiece(tmp_path))
    rows = [row for part in ("train", "test") for row in load_rows(str(SUPPORT / f"{part}.jsonl")).examples]
    schema = json.loads((SUPPORT / "schema.json").read_text())
    constraint, notices = Constraint.of(Kind("json", schema, False, None, ""), rows)
    assert constraint.white_space == "spaced" and not notices
    made = grammar(chat, constraint)
    assert [made.fault(row.answer) for row in rows] == [None] * 180
    for space, form in (("compact", {"separators": (",", ":")}), ("free", {"indent": 2}), ("either", {})):
        other = grammar(chat, constraint.model_copy(update={"white_space": space}))
        assert all(other.fault(json.dumps(json.loads(row.answer), **form)) is None for row in rows[:20])
        assert (made.fault(json.dumps(json.loads(rows[0].answer), **form)) is None) is (space == "either")


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ('{"category": "billing", "urgent": true, "amount": 3, "tags": []}', None),
        ('{"category": "billing", "urgent": true, "amount": 3, "tags": []', "it ends too early"),
        ('{"category": "other"', 'goes on with other"'),
        ('{"urgent": true', 'after {" it goes on with urgent'),
        ("Sure!", "goes on with Sure!"),
    ],
)
def test_what_the_grammar_refuses(answer, fault, chat):
    found = grammar(chat, SCHEMA).fault(answer)
    assert found is None if fault is None else fault in found


def test_escapes_as_the_references_have_them(chat):
    for escapes, fault in ((True, None), (False, "goes on")):
        found = grammar(chat, Constraint(schema={"type": "string"}, escapes=escapes)).fault('"caf\\u00e9"')
        assert found is fault or fault in found


def test_unsupported_keywords_are_all_named(chat):
    schema = {
        "properties": {
            "a": {"type": "array", "uniqueItems": True},
            "not": {"type": "string", "format": "postcode"},  # a key, not the keyword
            "b": {"not": {"type": "string"}, "enum": ["not", {"uniqueItems": 1}]},
            "c": {"type": "string", "pattern": "(?=x)y"},
        },
        "dependentRequired": {"a": ["b"]},
    }
    with pytest.raises(TellError) as caught:
        grammar(chat, schema)
    for part in (
        "uniqueItems at $.properties.a",
        "not at $.properties.b",
        "dependentRequired at $",
        "format postcode at $.properties.not",
        "pattern (?=x)y at $.properties.c",
    ):
        assert f"{part};" in caught.value.what + ";"
    assert caught.value.what.count(" at $") == 5 and "Remove that from the schema" in caught.value.remedy
    with pytest.raises(TellError, match=r"oneOf \(use anyOf\) at \$\.properties\.x"):
        grammar(chat, {"properties": {"x": {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}}})
    with pytest.raises(TellError, match="uniqueItems"):  # its own options do not switch the check off
        grammar(chat, {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}})


DEEP = {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}, "maxItems": 2}}}
DOUBLING = {f"n{i}": {"anyOf": [{"$ref": f"#/$defs/n{i + 1}"}] * 2} for i in range(10)} | {"n10": {"type": "boolean"}}


@pytest.mark.parametrize(
    "schema",
    [
        DEEP,
        {"enum": [f"value number {i}" for i in range(2000)]},
        {"type": "string", "pattern": "^(a+)+$", "maxLength": 50},
        {"type": "string", "pattern": "((a|b){1,500}c){1,500}"},
        {"type": "string", "pattern": ".*a.{20}"},
        {"type": "array", "items": {"type": "string", "maxLength": 5000}, "maxItems": 100000},
        {"$ref": "#/$defs/n0", "$defs": DOUBLING},
        {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(500)}},
        {},
    ],
)
def test_a_hard_schema_is_bounded(schema, chat):
    """Compiled and followed for 30 tokens at random, or refused in one line; a mask never takes seconds."""
    begin = time.process_time()
    try:
        mask = grammar(chat, schema).mask()
    except TellError:
        return
    rng, ids = np.random.default_rng(0), mask.start()
    while len(ids) < 30 and not mask.ended and not mask.failed:
        token = int(rng.choice(np.flatnonzero(mask.allowed(chat.size))))
        if token in chat.stop_ids:
            break
        ids += [token, *mask.take(token)]
    assert time.process_time() - begin < 30  # of the CPU, far above what it takes: it ends at all


def test_a_schema_that_is_too_large(chat):
    with pytest.raises(TellError, match=r"has [\d,]+ characters; for a constraint it may have 500,000"):
        grammar(chat, {"enum": ["x" * 600_000]})


def test_a_mask_that_fails_ends_its_answer_alone(tiny_model):
    """The others go on; the one that failed is not passed off as complete."""
    folder = tiny_model("llama")
    engine, chat = Engine(load(folder)), ChatTokenizer(folder)
    made = grammar(chat, SCHEMA)
    masks = [made.mask() for _ in range(3)]
    assert masks[1]._matcher.consume_token(chat.encode("}")[0]) is False  # as a parser that gives up
    answers = engine.generate(prompts_of(3), Decoding(200, chat.stop_ids), masks=masks)
    assert masks[1].failed and answers[1].finish == "length"
    assert all(answers[i].finish == "stop" and not masks[i].failed for i in (0, 2))


def test_a_template_that_writes_before_answers(tiny_model, monkeypatch):
    """What it writes comes first, and is no part of the answer."""
    folder = tiny_model("qwen3")
    chat = ChatTokenizer(folder).thoughtful()  # the prompt then does not end with the empty thought
    assert chat.lead.strip()
    made = grammar(chat, SCHEMA)
    (answer,) = Engine(load(folder)).generate(prompts_of(1), Decoding(200, chat.stop_ids), masks=[made.mask()])
    assert answer.ids[: len(chat.encode(chat.lead))] == chat.encode(chat.lead)
    jsonschema.validate(parse_strict(chat.without_lead(answer.ids)), SCHEMA)


def test_a_tokenizer_that_cannot_be_read(chat, monkeypatch):
    class Other:
        def to_str(self) -> str:
            return '{"model": {"type": "Unknown"}}'

    monkeypatch.setattr(chat, "backend", Other())
    with pytest.raises(TellError, match="answers cannot be constrained with this tokenizer"):
        Grammars(chat)


def test_no_more_faults_are_looked_for_than_are_shown(chat, monkeypatch):
    """Each costs a compilation: seconds for a large schema."""
    tried, fault = [], Grammars._fault
    monkeypatch.setattr(Grammars, "_fault", lambda self, body: tried.append(body) or fault(self, body))
    properties = {f"p{i}": {"type": "string", "pattern": f"(?=a)b{i}"} for i in range(300)}
    with pytest.raises(TellError, match=r"a grammar cannot follow .*p7; and more\. ") as error:
        grammar(chat, {"type": "object", "properties": properties})
    assert str(error.value).count("pattern") == 8 and len(tried) < 20
