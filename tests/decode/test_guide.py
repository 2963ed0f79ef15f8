"""Guides lead an answer to the values of its closed fields, by every way that the tokens allow and by no other."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

import tiny
from tell.data.closed import ITEM, ClosedField
from tell.data.kind import as_label
from tell.decode.engine import Engine
from tell.decode.guide import Decision, Fields, Guide, Vocabulary
from tell.decode.json_cursor import JsonCursor
from tell.decode.sampler import Decoding
from tell.rows.template import ChatTokenizer
from train.packed import load

KINDS = ("bytes", "pieces")
PLACE = '{"id": 3, "x":'


def sentencepiece(folder: Path) -> Path:
    """A tokenizer as Llama 2's: a space before the text, spaces as U+2581, unknown characters by bytes."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=260, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    trained.train_from_iterator(tiny.CORPUS.splitlines(keepends=True), trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary = model["vocab"] | {f"<0x{i:02X}>": len(model["vocab"]) + i for i in range(256)}
    merges = [tuple(pair) for pair in model["merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = trained.normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture(scope="module")
def vocabulary(tiny_model, tmp_path_factory) -> Callable[[str], Vocabulary]:
    made: dict[str, Vocabulary] = {}

    def of(kind: str) -> Vocabulary:
        if kind not in made:
            folder = tiny_model("llama") if kind == "bytes" else sentencepiece(tmp_path_factory.mktemp("pieces"))
            made[kind] = Vocabulary(ChatTokenizer(folder))
        return made[kind]

    return of


def texts_of(words: Vocabulary) -> list[tuple[int, str]]:
    """Every token that adds whole characters to a text, with these, as the tokenizer decodes it."""
    chat, found = words.chat, []
    for token in range(chat.size):
        text = chat.decode([*chat.encode("x"), token]).removeprefix("x")
        if text and "\ufffd" not in text and token not in chat.added_ids:
            found.append((token, text))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_by_their_text(kind, vocabulary):
    words = vocabulary(kind)
    tokens = texts_of(words)
    assert len(tokens) > 200 and sorted(words.beyond("")) == sorted(tokens)
    for text in ('"billing", ', ' "', "]", "the quick", "1", "\n", " ", '"refund"', "ß", ""):
        heads = [(token, added) for token, added in tokens if text.startswith(added)]
        assert sorted(words.within(text)) == sorted(heads), text
    for text in ('"', "b", " ", '",', "th", "never seen", "é"):
        further = [(t, added[len(text) :]) for t, added in tokens if added.startswith(text) and added != text]
        assert sorted(words.beyond(text)) == sorted(further), text
    for pattern in (r"\s*\]", r"\s*[,}\]]", r"[a-c]+$"):
        matched = [token for token, added in tokens if re.match(pattern, added)]
        assert matched and sorted(words.matching(re.compile(pattern))) == sorted(matched)


@pytest.mark.parametrize("kind", KINDS)
def test_characters_that_no_token_spells(kind, vocabulary):
    words = vocabulary(kind)
    whole = {text for _, text in texts_of(words)}
    for character in "aé þ日🙂\u0301":
        pieces = words.pieces(character)
        assert bool(pieces) == (character not in whole)
        if pieces:
            chat = words.chat
            assert len(pieces) == len(character.encode())
            assert chat.decode([*chat.encode("the x"), *pieces]) == f"the x{character}"
    assert words.pieces("") == ()


# --- where a growing JSON text stands


def reference(text: str) -> list[tuple]:
    """(place, text, items) after each character of a whole JSON text, by a parser that knows how it goes on."""
    states: list[tuple] = [(None, "", None)] * (len(text) + 1)
    read = json.JSONDecoder(strict=False).raw_decode

    def blank(i: int) -> int:
        return i + len(re.match(r"[ \t\r\n]*", text[i:]).group())

    def mark(start: int, end: int, place: tuple | None, begin: int = 0, items: Sequence[str] | None = None) -> None:
        for i in range(start, end + 1):
            states[i] = (place, "" if place is None else text[begin:i], None if items is None else list(items))

    def value(start: int, place: tuple, items: Sequence[str] | None) -> int:
        """The value that follows ``start``, up to the character after it and white space."""
        begin = blank(start)
        mark(start, begin, place, start, items)
        if text[begin] not in "{[":
            end = blank(read(text, begin)[1])
            mark(begin, end, place, start, items)
            return end
        at, own = begin + 1, []
        is_list = text[begin] == "["
        while True:
            inner = (*place, ITEM)
            after = blank(at)
            mark(at, after, inner if is_list else None, at, own)
            if text[after] in "}]":
                at = after
                break
            if is_list:
                end = value(at, inner, own)
                own.append("" if text[after] in "{[" else text[at:end].strip())
            else:
                key, colon = read(text, after)
                colon = blank(colon)
                mark(after, colon, None)
                end = value(colon + 1, (*place, key), None)
            at = end
            if text[at] != ",":
                break
            at += 1
        end = blank(at + 1)
        mark(at + 1, end, None)
        return end

    assert value(0, (), None) == len(text)
    return states


def check_cursor(text: str) -> None:
    cursor, expected = JsonCursor(), reference(text)
    for i in range(len(text) + 1):
        place, written, items = expected[i]
        assert cursor.place == place, (text[:i], cursor.place, place)
        if place is not None:
            assert cursor.text == written, text[:i]
            if place[-1:] == (ITEM,):
                assert cursor.done == items, text[:i]
        cursor.feed(text[i : i + 1])


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}',
        ' {"a" : "x" , "b":null}\n',
        '{"a": [], "b": {}, "c": ""}',
        '{"a": ["x", "y,]}", "z"], "b": true}',
        '{"a": [{"b": ["c", 1]}, {"b": []}, [[2], 3], 4]}',
        r'{"a\"}": "q\\", "b\\": "\"", "\u00e9": "\u00e9\n"}',
        '{"é": {"日本": ["🙂", "ß"]}}',
        '[1, [2, "x"], {"a": 3}]',
        '"only"',
        "-1.5e3",
        "[\n  [\n    1\n  ]\n]",
        '{"]": {"{": [":", ",", "]"]}}',
    ],
)
def test_the_cursor_at_every_character(text):
    check_cursor(text)


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=12,
    ),
    indent=st.sampled_from([None, 2]),
    ascii_only=st.booleans(),
    separators=st.sampled_from([None, (",", ":"), (" ,  ", "\t: ")]),
)
@settings(max_examples=150)
def test_the_cursor_in_all_that_json_writes(value, indent, ascii_only, separators):
    check_cursor(json.dumps(value, indent=indent, ensure_ascii=ascii_only, separators=separators))


@given(cuts=st.lists(st.integers(0, 60), max_size=6))
def test_the_cursor_takes_text_in_any_pieces(cuts):
    text = '{"a": ["x\\"y", {"b": 1}], "c": {"d": "e", "f": [2, 3'
    whole, parts = JsonCursor(), JsonCursor()
    whole.feed(text)
    for start, end in itertools.pairwise([0, *sorted(cuts), len(text)]):
        parts.feed(text[start:end])
    assert (
        (parts.place, parts.text, parts.done)
        == (whole.place, whole.text, whole.done)
        == (("c", "f", ITEM), " 3", ["2"])
    )


# --- what a guide allows


def guide_of(words: Vocabulary, field: ClosedField, evidence: Sequence[float] | None = None) -> Guide:
    n = field.classes + 2 * field.is_set
    evidence = np.zeros(n) if evidence is None else np.array(evidence, dtype=float)
    return Guide(Fields(words, [field], words.chat.stop_ids), [evidence], [np.full(n, -np.log(n))])


def decided(words: Vocabulary, field: ClosedField, ids: Sequence[int], fields: Fields) -> Decision | None:
    """The decision after ``ids``, by a guide that has followed them."""
    n = field.classes + 2 * field.is_set
    guide = Guide(fields, [np.zeros(n)], [np.full(n, -np.log(n))])
    found = None
    for i in range(len(ids) + 1):
        found = guide.decision(ids[:i])
    return found


def walk(words: Vocabulary, field: ClosedField, start: str) -> Iterator[str]:
    """The texts at which all ways that a guide allows from ``start`` end: with a stop token, or where it lets go.

    Branches depend on the text alone, so each is followed once.
    """
    chat = words.chat
    fields = Fields(words, [field], chat.stop_ids)
    waiting = [chat.encode(start) if start else []]
    lead = chat.decode(waiting[0])
    seen: set[tuple] = set()
    while waiting:
        ids = waiting.pop()
        text = chat.decode(ids)
        parts = tuple(ids[-4:]) if text.endswith("\ufffd") else ()
        if (text, parts) in seen:
            continue
        seen.add((text, parts))
        assert len(text) < 80, text
        found = decided(words, field, ids, fields)
        if found is None:
            assert text != lead, "nothing was decided"
            yield text.removeprefix(start)
            continue
        assert not found.branch.further and found.branch.members.any(axis=1).all()
        for token in found.branch.tokens.tolist():
            if token in chat.stop_ids:
                assert not field.path, "a JSON answer does not end at a value"
                yield text
            else:
                waiting.append([*ids, token])


LABELS = [
    ("yes", "no"),
    ("yes", "yes please", "ye"),
    ("1", "10", "100", "2"),
    ("café", "caffè", "cafe"),
    ("þjóð", "日本", "日本語", "🙂", "🙃"),
    ("positive", "negative", "neutral", "positive negative"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", LABELS, ids="-".join)
def test_every_way_spells_a_label(kind, values, vocabulary):
    words = vocabulary(kind)
    ends = set(walk(words, ClosedField((), "value", values), ""))
    assert {as_label(text) for text in ends} == set(values)


VALUES: list[list] = [
    ["billing", "shipping", "bill"],
    [1, 10, 100, 1.5, -1],
    [None, True, False],
    ["a", None, 1, 12],
    ["café", "þ", "日本", "日本語", "🙂"],
    ['say "no"', "a\\b", "two\nlines", ""],
    [[], None],
    ["1", 1, "10", 10],
    [True, "true"],
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [PLACE, PLACE + " "])
@pytest.mark.parametrize("values", VALUES, ids=json.dumps)
def test_every_way_spells_a_json_value(kind, values, start, vocabulary):
    """And stops where the value has ended; a number only where nothing can follow it."""
    spelled = tuple(json.dumps(value, ensure_ascii=False) for value in values)
    found = set()
    for text in walk(vocabulary(kind), ClosedField(("x",), "value", spelled), start):
        written = next(v for v in sorted(spelled, key=len, reverse=True) if text.lstrip().startswith(v))
        rest = text.lstrip()[len(written) :]
        assert re.match(r"\s*[,}\]]|\s+\Z", rest) or (rest == "" and written[-1] in '"]'), text
        found.add(written)
    assert found == set(spelled)


@pytest.mark.parametrize("kind", KINDS)
def test_an_open_field_may_have_another_value(kind, vocabulary):
    words = vocabulary(kind)
    field = ClosedField(("x",), "value", ('"billing"', '"shipping"', "null"), open=True)
    fields, chat = Fields(words, [field], words.chat.stop_ids), words.chat
    first = decided(words, field, chat.encode(PLACE + " "), fields)
    assert first.branch.further
    shared = dict(zip(first.branch.tokens.tolist(), first.branch.members.tolist(), strict=True))
    assert shared[chat.backend.token_to_id('"')] == [True, True, False, True]
    begun = decided(words, field, chat.encode(PLACE + ' "'), fields)
    assert begun.branch.further and not begun.branch.members[:, 2:].any()
    later = decided(words, field, chat.encode(PLACE + ' "bil'), fields)
    assert not later.branch.further and later.branch.members.tolist() == [[True, False, False, False]] * len(
        later.branch.tokens
    )
    assert decided(words, field, chat.encode(PLACE + ' "other'), fields) is None  # a further value is free
    outside = next(t for t, _ in words.beyond("") if t not in begun.branch.tokens)
    logits = np.full(chat.size, -5.0)
    logits[outside] = -1.0
    for evidence, expected in ([0, 0, 0, 30.0], True), ([30.0, 0, 0, 0], False), ([0, 0, 0, -np.inf], False):
        picked = Decision(begun.branch, np.array(evidence), np.zeros(4)).pick(logits)
        assert (picked == outside) == expected, evidence


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_that_may_be_empty(kind, vocabulary):
    """Decided once, before its first item, whether that is a string or an object."""
    words = vocabulary(kind)
    field = ClosedField(("x",), "empty", ("[]",), open=True)
    fields, chat = Fields(words, [field], words.chat.stop_ids), words.chat
    closing = chat.backend.token_to_id("]")
    for text, is_decided in (
        *((" ", True), (" [", True), (' ["a', False), (' ["a", ', False), (' [{"a": 1}, ', False)),
        *((" [{", False), (" []", False), (" [1, ", False)),
    ):
        found = decided(words, field, chat.encode(PLACE + text), fields)
        assert (found is not None) == is_decided, text
    inside = decided(words, field, chat.encode(PLACE + " ["), fields)
    assert inside.branch.further and inside.branch.members[inside.branch.tokens.tolist().index(closing)].tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize(("log_probs", "picked"), [([-1, -9, -9], 0), ([-3, -1, -9], 0), ([-9, -1, -9], 1)])
def test_evidence_is_added_to_log_probabilities(log_probs, picked):
    from tell.decode.guide import Branch

    branch = Branch(np.array([0, 1]), np.eye(2, dtype=bool), np.zeros(2, dtype=bool), False)
    assert Decision(branch, np.array([3.0, 0.0]), np.log([0.5, 0.5])).pick(np.array(log_probs, float)) == picked


def test_a_token_that_values_share_has_their_mean_factor():
    from tell.decode.guide import Branch

    members = np.array([[True, True, False], [False, False, True]])
    branch = Branch(np.array([4, 5]), members, np.zeros(2, dtype=bool), False)
    prior, evidence = np.log([0.2, 0.6, 0.2]), np.array([2.0, -1.0, 0.0])
    mean = np.log((0.2 * np.exp(2.0) + 0.6 * np.exp(-1.0)) / 0.8)
    for shift in (-0.01, 0.01):
        logits = np.full(8, -30.0)
        logits[5] = mean + shift
        logits[4] = 0.0
        assert Decision(branch, evidence, prior).pick(logits) == (4 if shift < 0 else 5)


# --- lists


ITEMS = ("red", "red wine", "blue", "ræð")


def written_list(words: Vocabulary, field: ClosedField, evidence, log_probs: Callable[[int], np.ndarray]) -> list:
    """The list that a guide writes with a model of these log probabilities at each step."""
    guide, ids = guide_of(words, field, evidence), words.chat.encode(PLACE)
    for i in range(len(ids)):
        guide.decision(ids[:i])
    for step in range(120):
        decision = guide.decision(ids)
        if decision is None:
            break
        ids.append(decision.pick(log_probs(step)))
    text = words.chat.decode(ids)
    value, end = json.JSONDecoder().raw_decode(text, text.index('"x":') + 4 + (text[text.index('"x":') + 4] == " "))
    assert re.match(r"\s*([,}\]]|\Z)", text[end:]), text
    return value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chosen", [c for n in range(5) for c in itertools.combinations(range(4), n)])
def test_a_list_has_the_items_that_evidence_is_for(kind, chosen, vocabulary):
    """Whatever the model says: each once, in any order, and then the list ends."""
    words = vocabulary(kind)
    field = ClosedField(("x",), "items", tuple(json.dumps(v, ensure_ascii=False) for v in ITEMS))
    for fails, holds, noise in ((-np.inf, 50.0, 1.0), (-20.0, 20.0, 0.0)):
        evidence = [holds if i in chosen else fails for i in range(4)] + [0.0, -np.inf]
        rng = np.random.default_rng(len(chosen))
        found = written_list(words, field, evidence, lambda _: noise * rng.normal(size=words.chat.size))  # noqa: B023
        assert sorted(found) == sorted(ITEMS[i] for i in chosen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "values", [("a", "b", "c"), (1, 10, 2), ("red", "red wine", "ræð"), (None, True, "x")], ids=str
)
def test_no_item_twice_and_none_that_is_ruled_out(kind, values, vocabulary):
    words = vocabulary(kind)
    field = ClosedField(("x",), "items", tuple(json.dumps(v, ensure_ascii=False) for v in values))
    lengths = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        out = rng.random(3) < 0.3
        evidence = [*np.where(out, -np.inf, rng.normal(size=3)), 0.0, -np.inf]
        found = written_list(words, field, evidence, lambda _: 4 * rng.normal(size=words.chat.size))  # noqa: B023
        allowed = [json.dumps(v) for v, ruled in zip(values, out, strict=True) if not ruled]
        spelled = [json.dumps(v) for v in found]
        assert set(spelled) <= set(allowed) and len(set(spelled)) == len(spelled), (seed, found)
        lengths.add(len(found))
    assert len(lengths) > 2


def test_further_items_of_an_open_list_are_free(vocabulary):
    words = vocabulary("bytes")
    chat = words.chat
    field = ClosedField(("x",), "items", ('"red"', '"blue"'), open=True, new=0.2)
    fields = Fields(words, [field], chat.stop_ids)
    for text, is_further in ((" [", True), (' ["', True), (' ["r', False), (' ["red", ', True), (' ["red", "', True)):
        assert decided(words, field, chat.encode(PLACE + text), fields).branch.further == is_further, text
    assert decided(words, field, chat.encode(PLACE + ' ["gr'), fields) is None
    assert decided(words, field, chat.encode(PLACE + ' ["red", "gr'), fields) is None


def test_no_list_ends_with_a_comma(vocabulary):
    """Once a comma is written an item follows, even where the evidence is against all others."""
    words = vocabulary("bytes")
    field = ClosedField(("x",), "items", ('"red"', '"blue"'))
    guide = guide_of(words, field, [-30.0, -30.0, 0.0, -np.inf])
    ids = words.chat.encode(PLACE + ' ["red",')
    for i in range(len(ids)):
        guide.decision(ids[:i])
    decision = guide.decision(ids)
    logits = np.full(words.chat.size, -9.0)
    logits[words.matching(re.compile(r"\s*\]"))] = -0.1
    assert "]" not in words.chat.decode([decision.pick(logits)])


# --- in the engine


PROMPTS = [[11, 40, 57], [11, 40, 90, 91, 92, 93], [11, 40], [11, 40, 200, 201], [11, 40, 7, 9, 31]]
LABEL = ClosedField((), "value", ("positive", "negative", "neutral, rather", "négatif"))


def label_guides(words: Vocabulary, chat: ChatTokenizer, rows: Sequence[int], *, seed: int = 0) -> list[Guide | None]:
    fields = Fields(words, [LABEL], chat.stop_ids)
    rng = np.random.default_rng(seed)
    evidence = rng.normal(size=(len(PROMPTS), LABEL.classes))
    prior = np.full(LABEL.classes, -np.log(LABEL.classes))
    return [Guide(fields, [evidence[i]], [prior]) if i in rows else None for i in range(len(PROMPTS))]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral"])
@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_guided_answers_are_labels_and_the_other_rows_are_as_ever(family, penalty, tiny_model):
    chat = ChatTokenizer(tiny_model(family))
    words, model = Vocabulary(chat), load(tiny_model(family))
    fast, plain = Engine(model), Engine(model, fast=False)
    for rule in (
        {"greedy": True},
        {"greedy": False, "temperature": 1.5, "top_k": 30},
        {"top_k": 0, "temperature": 2.0},
    ):
        decoding = Decoding(24, chat.stop_ids, repetition_penalty=penalty, seed=3, **rule)
        free = fast.generate(PROMPTS, decoding)
        for batch_size in (5, 2):
            decoding = Decoding(24, chat.stop_ids, repetition_penalty=penalty, seed=3, batch_size=batch_size, **rule)
            for rows in ((0, 1, 2, 3, 4), (1, 3), (4,), ()):
                answers = fast.generate(PROMPTS, decoding, guides=label_guides(words, chat, rows))
                assert answers == plain.generate(PROMPTS, decoding, guides=label_guides(words, chat, rows))
                for i, answer in enumerate(answers):
                    if i in rows:
                        assert answer.finish == "stop" and as_label(chat.answer(answer.ids)) in LABEL.values
                    else:
                        assert answer == free[i]


def test_the_models_likelihood_and_the_evidence_both_count(tiny_model):
    chat = ChatTokenizer(tiny_model("llama"))
    words, engine = Vocabulary(chat), Engine(load(tiny_model("llama")))
    fields, decoding = Fields(words, [LABEL], chat.stop_ids), Decoding(24, chat.stop_ids, greedy=True)
    prior = np.zeros(LABEL.classes)

    def said(evidence) -> list[str]:
        guides = [Guide(fields, [np.array(evidence, dtype=float)], [prior]) for _ in PROMPTS]
        return [as_label(chat.answer(answer.ids)) for answer in engine.generate(PROMPTS, decoding, guides=guides)]

    for c, label in enumerate(LABEL.values):
        assert said(np.where(np.arange(4) == c, 60.0, 0.0)) == [label] * len(PROMPTS)
        assert label not in said(np.where(np.arange(4) == c, -np.inf, 0.0))


def test_banned_tokens_of_a_guided_row(tiny_model):
    """Where one way to spell a label is banned another one is taken."""
    chat = ChatTokenizer(tiny_model("llama"))
    words, engine = Vocabulary(chat), Engine(load(tiny_model("llama")))
    open_ = Decoding(24, chat.stop_ids, greedy=True)
    first = engine.generate(PROMPTS, open_, guides=label_guides(words, chat, range(5)))
    used = {token for answer in first for token in answer.ids}
    single = {token for token, text in words.beyond("") if len(text) == 1} | set(words.pieces("é"))
    banned = tuple(sorted(used - single))
    assert banned
    closed = Decoding(24, chat.stop_ids, greedy=True, banned_ids=banned)
    again = engine.generate(PROMPTS, closed, guides=label_guides(words, chat, range(5)))
    assert not {token for answer in again for token in answer.ids} & set(banned)
    assert all(as_label(chat.answer(answer.ids)) in LABEL.values for answer in again)


@pytest.mark.parametrize("fast", [True, False])
def test_an_untaught_model_is_led_past_the_opening(tiny_model, fast):
    chat = ChatTokenizer(tiny_model("llama"))
    words, engine = Vocabulary(chat), Engine(load(tiny_model("llama")), fast=fast)
    colour = ClosedField(("colour é",), "value", ('"red"', '"dark red"'))
    fields, decoding = Fields(words, [colour], chat.stop_ids, '{ "colour é":'), Decoding(40, (), greedy=True)
    guides = [Guide(fields, [np.zeros(2)], [np.zeros(2)]) for _ in PROMPTS]
    texts = [chat.answer(answer.ids) for answer in engine.generate(PROMPTS, decoding, guides=guides)]
    for text in texts:
        assert text.startswith('{ "colour é":')
        assert text.removeprefix('{ "colour é":').lstrip().startswith(colour.values)
    free = [chat.answer(answer.ids) for answer in engine.generate(PROMPTS, decoding)]
    assert not any(text.startswith("{") for text in free)


def test_json_answers_in_the_engine(tiny_model):
    """After what a prompt has forced the model to write, each closed field has one of its values."""
    chat = ChatTokenizer(tiny_model("llama"))
    words, model = Vocabulary(chat), load(tiny_model("llama"))
    spec = [
        ClosedField(("a",), "value", ('"low"', '"high"')),
        ClosedField(("b",), "value", ("true", "false", "null")),
        ClosedField(("c",), "items", ('"red"', '"blue"')),
    ]
    fields = Fields(words, spec, chat.stop_ids)
    starts = [chat.encode(text) for text in ('{"a":', '{"b":', '{"c":')]

    class Begun:
        """A guide of an answer that has begun with some tokens already."""

        def __init__(self, begun: list[int], guide: Guide) -> None:
            self.begun, self.guide = begun, guide
            for i in range(len(begun)):
                guide.decision(begun[:i])

        def decision(self, ids: Sequence[int]) -> Decision | None:
            return self.guide.decision([*self.begun, *ids])

    answers = []
    for fast in (True, False):
        sizes = [f.classes + 2 * f.is_set for f in spec]
        evidence = [np.zeros(n) for n in sizes]
        evidence[2][-1] = -np.inf
        guides = [Begun(ids, Guide(fields, evidence, [np.full(n, -1.0) for n in sizes])) for ids in starts]
        got = Engine(model, fast=fast).generate(starts, Decoding(20, (), greedy=True), guides=guides)
        answers.append([answer.ids for answer in got])
    assert answers[0] == answers[1]
    for start, ids, key in zip(starts, answers[0], "abc", strict=True):
        text = chat.decode([*start, *ids]).split(":", 1)[1].lstrip()
        value, _ = json.JSONDecoder().raw_decode(text)
        allowed = {"a": ["low", "high"], "b": [True, False, None], "c": [[], ["red"], ["blue"]]}[key]
        assert value in allowed or sorted(value) == ["blue", "red"]
