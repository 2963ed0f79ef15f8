"""What is trained, what is dropped, and where the anchor stands."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tell.rows.tokenize as module
import tiny
from tell.anchor.anchor import Anchor
from tell.data.example import Example, Message
from tell.errors import TellError
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import RowRules, prompt_ids, tokenize

END = {"gemma2": "<end_of_turn>", "gemma3": "<end_of_turn>", "phi3": "<|end|>", "mistral": "</s>"}
# Answers that tempt: found in the prompt, merging with the header, with white space, in several bytes.
ANSWERS = ["yes", '{"category": "billing"}', "  spaced ", "\n\nlate", "ünïcode 😀", "assistant", "a"]


@pytest.fixture(scope="module")
def chat(tiny_model):
    made: dict[tuple, ChatTokenizer] = {}

    def get(family: str, **options) -> ChatTokenizer:
        key = (family, *options.items())
        if key not in made:
            made[key] = ChatTokenizer(tiny_model(family, **options))
        return made[key]

    return get


def one(chat: ChatTokenizer, messages, **options):
    """The only row of a table, as ids and mask, and the example."""
    example = Example.of(messages, source="task", origin="t.jsonl:1")
    table = tokenize([example], chat, source="task", **options)
    ids, mask = table.row(0)
    return example, np.array(ids), np.array(mask)


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("answer", ANSWERS)
def test_trained_is_the_answer_and_its_end(family, answer, chat):
    tokenizer = chat(family)
    turns = [Message("user", f"Say assistant, yes or no: {answer.strip()}"), Message("assistant", answer)]
    example, ids, mask = one(tokenizer, turns)
    ((first, last),) = runs(mask)
    # the row is the prompt that decoding starts from, then what decoding has to write
    assert ids[:first].tolist() == prompt_ids(tokenizer, example)
    written = tokenizer.backend.decode(ids[first:last].tolist(), skip_special_tokens=False)
    end = END.get(family, "<|im_end|>")
    assert written.removesuffix(end).strip() == answer.strip() and written.endswith(end)
    assert ids[last - 1] in tokenizer.stop_ids
    assert not set(ids[first : last - 1].tolist()) & set(tokenizer.stop_ids)
    # nothing is cut: the row is the whole text
    whole = tokenizer.backend.decode(ids.tolist(), skip_special_tokens=False)
    assert whole == tokenizer.render(example.messages)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_turn_is_trained(family, chat):
    tokenizer = chat(family)
    turns = [
        Message("user", "yes or no: is assistant a role?"),
        Message("assistant", "yes"),
        Message("user", "model yes, user no. Again?"),
        Message("assistant", " no "),
        Message("user", "And? yes!"),
        Message("assistant", "yes"),
    ]
    example, ids, mask = one(tokenizer, turns)
    end = END.get(family, "<|im_end|>")
    spans = [tokenizer.backend.decode(ids[a:b].tolist(), skip_special_tokens=False) for a, b in runs(mask)]
    # Qwen3 shows earlier answers without the empty thought that decoding has in front of them
    trained = ["yes"] if family == "qwen3" else ["yes", "no", "yes"]
    assert [span.removesuffix(end).strip() for span in spans] == trained
    assert len(tokenize([example], tokenizer, source="task").notices) == (family == "qwen3")
    assert all(span.endswith(end) for span in spans)
    assert ids[: runs(mask)[-1][0]].tolist() == prompt_ids(tokenizer, example)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_default_template_trains_the_end_token(family, chat):
    tokenizer = chat(family, template=False)
    example, ids, mask = one(tokenizer, [Message("user", "Hi"), Message("assistant", "\nyes")])
    ((first, last),) = runs(mask)
    assert ids[:first].tolist() == prompt_ids(tokenizer, example)
    assert ids[last - 1] == tokenizer.eos_ids[0] and tokenizer.decode(ids[first:last]) == "\nyes"


def test_thoughts_of_an_answer_are_trained(chat):
    """Qwen3's template leaves an empty thought before the answer; the header of decoding has it already."""
    _, ids, mask = one(chat("qwen3"), [Message("user", "Hi"), Message("assistant", "yes")])
    text = chat("qwen3").backend.decode(ids[~mask].tolist(), skip_special_tokens=False)
    assert "<think>\n\n</think>\n\n" in text


def test_template_that_changes_the_answer_is_refused(chat, tiny_model, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny_model("llama"), folder)
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("message['content'] +", "message['content'] | upper +"))
    tokenizer = ChatTokenizer(folder)
    with pytest.raises(TellError, match=r"t\.jsonl:1: the chat template of llama changes the answer's text"):
        one(tokenizer, [Message("user", "yes"), Message("assistant", "yes")])


def test_an_unclosed_answer_is_closed(tiny_model, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny_model("llama"), folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer = ChatTokenizer(folder)
    turns = [Message("user", "Hi"), Message("assistant", "so 😀"), Message("user", "Ja"), Message("assistant", "no")]
    example, ids, mask = one(tokenizer, turns)
    assert ids[-1] == tokenizer.eos_ids[0] and mask[-1]
    (a, b), (c, _) = runs(mask)
    assert tokenizer.decode(ids[a:b]).strip() == "so 😀"  # all bytes of the last character
    assert ids[:c].tolist() == prompt_ids(tokenizer, example)


def test_loss_on_all_trains_everything_but_the_first(chat):
    _, ids, mask = one(
        chat("llama"), [Message("user", "Hi"), Message("assistant", "yes")], rules=RowRules(loss_on="all")
    )
    assert mask.sum() == len(ids) - 1 and not mask[0]


@pytest.mark.parametrize("answer", ["", "  \n"])
def test_nothing_to_train(answer, chat):
    examples = [
        Example.pair("a", "b", origin="t.csv:1"),
        Example.pair("Is it so?", answer, origin="t.csv:2"),
        Example.pair("c", "d", origin="t.csv:3"),
    ]
    with pytest.raises(TellError, match=r"t\.csv:2: nothing to train.*nothing_to_train: drop"):
        tokenize(examples, chat("llama"), source="task")
    for loss_on in ("answer", "all"):
        rules = RowRules(nothing_to_train="drop", loss_on=loss_on)
        table = tokenize(examples, chat("llama"), source="task", rules=rules)
        assert table.origins.tolist() == ["t.csv:1", "t.csv:3"]
        assert [(d.origin, d.reason) for d in table.dropped] == [("t.csv:2", "nothing to train: the answer is empty")]


def test_too_long_is_named_never_cut(chat):
    examples = [Example.pair("Hi", "word " * n, origin=f"t.csv:{n}") for n in (1, 90, 2)]
    full = tokenize(examples, chat("llama"), source="task")
    limit = int(full.tokens[1]) - 1
    with pytest.raises(TellError, match=rf"t\.csv:90: {limit + 1} tokens, longer than max_length {limit}"):
        tokenize(examples, chat("llama"), source="task", rules=RowRules(max_length=limit, too_long="refuse"))
    table = tokenize(examples, chat("llama"), source="task", rules=RowRules(max_length=limit))
    assert table.origins.tolist() == ["t.csv:1", "t.csv:2"] and [d.origin for d in table.dropped] == ["t.csv:90"]
    assert np.array_equal(table.row(1)[0], full.row(2)[0])  # the rows kept are whole
    fits = tokenize(examples, chat("llama"), source="task", rules=RowRules(max_length=limit + 1, too_long="refuse"))
    assert len(fits) == 3


def test_all_rows_dropped_gives_an_empty_table(chat):
    table = tokenize([Example.pair("a", "b " * 50)], chat("llama"), source="task", rules=RowRules(max_length=8))
    assert len(table) == 0 and len(table.dropped) == 1 and table.starts.tolist() == [0]


def same(a, b) -> bool:
    return all(
        np.array_equal(getattr(a, f.name), getattr(b, f.name))
        if isinstance(getattr(a, f.name), np.ndarray)
        else getattr(a, f.name) == getattr(b, f.name)
        for f in dataclasses.fields(a)
    )


def test_chunking_changes_nothing(chat, monkeypatch):
    examples = [Example.pair(f"question {n}", "word " * (n % 7 + 1), origin=f"t:{n}") for n in range(23)]
    whole = tokenize(examples, chat("qwen2"), source="task", rules=RowRules(max_length=40))
    for chunk in (1, 5, 23):
        monkeypatch.setattr(module, "CHUNK", chunk)
        seen: list[int] = []
        part = tokenize(examples, chat("qwen2"), source="task", rules=RowRules(max_length=40), progress=seen.append)
        assert same(whole, part) and sum(seen) == 23
    alone = [tokenize([example], chat("qwen2"), source="task") for example in examples]
    assert [t.tokens[0] for t in alone if t.tokens[0] <= 40] == whole.tokens.tolist()


def test_columns(chat):
    """Hashes and origins are the examples'; ``unit`` counts bare contents, anchor included, in the named unit."""
    anchor = Anchor("Translate the sentence.")
    examples = [Example.pair(f"Wo ist {n}?", "Hier. 😀", origin=f"t:{n}") for n in range(3)]
    llama, gemma = chat("llama"), chat("gemma2", vocab=320)
    table = tokenize(examples, llama, source="task", anchor=anchor, unit=gemma)
    assert table.hashes.tolist() == [e.hash for e in examples] and table.origins.tolist() == ["t:0", "t:1", "t:2"]
    bare = ["Translate the sentence.\n\nWo ist 0?\nHier. 😀", examples[0].question]
    assert table.unit[0] == len(gemma.encode(bare[0]))
    assert tokenize(examples, llama, source="task").unit[0] == len(llama.encode("Wo ist 0?\nHier. 😀"))
    assert table.trained.tolist() == [int(table.row(i)[1].sum()) for i in range(3)]
    assert table.tokens.tolist() == [len(table.row(i)[0]) for i in range(3)]


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Co"]), min_size=1, max_size=30)
ANCHOR = "Below is an instruction that describes a task."


@settings(max_examples=40)
@given(
    family=st.sampled_from(tiny.FAMILIES),
    place=st.sampled_from(["system", "user"]),
    prompts=st.lists(TEXT, min_size=1, max_size=3),
    answers=st.lists(TEXT.filter(str.strip), min_size=3, max_size=3),
    headed=st.booleans(),
)
def test_anchor_once_in_task_rows_never_in_general(family, place, prompts, answers, headed, chat):
    tokenizer = chat(family)
    if place == "system" and not tokenizer.supports_system:
        place = "user"
    turns = []
    for prompt, answer in zip(prompts, answers, strict=False):
        turns += [Message("user", prompt), Message("assistant", answer)]
    if headed:  # data published with its instruction: the anchor is there already
        turns = list(Anchor(ANCHOR, place).apply(turns))
    example = Example.of(turns, source="task", origin="t:1")
    table = tokenize([example], tokenizer, source="task", anchor=Anchor(ANCHOR, place))
    text = tokenizer.backend.decode(np.array(table.row(0)[0]).tolist(), skip_special_tokens=False)
    assert text.count(ANCHOR) == 1
    trained = tokenizer.decode(np.array(table.row(0)[0])[table.row(0)[1]])
    assert ANCHOR not in trained
    ids = prompt_ids(tokenizer, example, Anchor(ANCHOR, place))
    assert tokenizer.decode(ids).count(ANCHOR) == 1
    if not headed:
        plain = tokenize([example], tokenizer, source="general")
        assert ANCHOR not in tokenizer.decode(plain.row(0)[0])
        assert table.hashes == plain.hashes


@settings(max_examples=60)
@given(family=st.sampled_from(tiny.FAMILIES), template=st.booleans(), prompt=TEXT, answer=TEXT.filter(str.strip))
def test_rows_begin_with_the_prompt_of_decoding(family, template, prompt, answer, chat):
    tokenizer = chat(family, **({} if template else {"template": False}))
    example, ids, mask = one(tokenizer, [Message("user", prompt), Message("assistant", answer)])
    ((first, last),) = runs(mask)
    assert ids[:first].tolist() == prompt_ids(tokenizer, example)
    assert tokenizer.decode(ids[first:last]).strip() == tokenizer.decode(tokenizer.encode(answer)).strip()
