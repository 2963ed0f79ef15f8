"""Rows put together from a template's frame equal rows rendered and encoded whole."""

from __future__ import annotations

import random
import shutil
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from tell.anchor.anchor import NO_ANCHOR, Anchor
from tell.data.example import Example, Message
from tell.errors import TellError
from tell.rows.encode import SAMPLE, Encoder, FramesDiffer
from tell.rows.frame import Frames
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import CHUNK, FEW, tokenize

FRAMED = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")  # each turn between special tokens, words cut apart
PAIR = [Message("user", "Where?"), Message("assistant", "Here.")]
# Ends and beginnings that tempt: runs of signs that swallow a line break, digits, marks, white space, special tokens.
PIECES = [
    "yes",
    "No.",
    '"a"',
    "1 2",
    "(3)",
    "don't",
    "…",
    "。",
    "é",
    "e\u0301",
    "\u0301",
    "न\u0940",
    "😀",
    "```",
    "a\n\nb",
]
PIECES += [" lead", "trail ", "\n", "<|im_end|>", "</think>", "x" * 30, "--", "#!", "½", "?!\n\n?!"]
contents = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), min_size=1, max_size=6).map(
    lambda pieces: " ".join(pieces).encode("utf-8", "ignore").decode()
)


@pytest.fixture(scope="module")
def chat(tiny_model):
    made = {family: ChatTokenizer(tiny_model(family)) for family in FRAMED}
    return made.__getitem__


def example(*texts: str) -> Example:
    """A conversation of these contents; an odd number begins with a system turn."""
    roles = ["system"] * (len(texts) % 2) + ["user", "assistant"] * (len(texts) // 2)
    return Example.of([Message(r, t) for r, t in zip(roles, texts, strict=True)], source="task", origin="t:1")


def rows(examples, chat, frames, *, anchor=NO_ANCHOR, unit=None, size=3):
    encoder = Encoder(chat, unit or chat, anchor, frames)
    made = [row for _, chunk in encoder.encode(examples, size) for row in chunk]
    return [str(row) if isinstance(row, TellError) else row for row in made]


@pytest.mark.parametrize("family", FRAMED)
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(contents.filter(str.strip), min_size=2, max_size=5), min_size=1, max_size=4), st.booleans())
def test_framed_equals_whole(chat, family, conversations, anchored):
    tokenizer = chat(family)
    anchor = Anchor("Answer in JSON.", "user") if anchored else NO_ANCHOR
    examples = [example(*texts[: len(texts) - (family == "gemma2") * (len(texts) % 2)]) for texts in conversations]
    # the plain row in front is the one that is sampled, so that the others are put together unchecked
    framed = rows([Example.pair("a", "b"), *examples], tokenizer, Frames(tokenizer), anchor=anchor)[1:]
    assert framed == rows(examples, tokenizer, None, anchor=anchor)


@pytest.mark.parametrize("family", FRAMED)
def test_a_unit_of_another_tokenizer(chat, family):
    other = next(chat(name) for name in FRAMED if name != family)
    examples = [Example.pair(f"What is {n}?", f"It is {n}.") for n in range(7)]
    framed = rows(examples, chat(family), Frames(chat(family)), unit=other)
    assert framed == rows(examples, chat(family), None, unit=other)
    assert framed[3][2] == len(other.encode("What is 3?\nIt is 3."))


def test_which_tokenizers_have_frames(tiny_model):
    has = {family: Frames(ChatTokenizer(tiny_model(family))).of(PAIR) is not None for family in tiny.FAMILIES}
    assert {family for family, framed in has.items() if framed} == set(FRAMED)


def test_what_a_template_may_look_at_has_no_frame(chat):
    frames = Frames(chat("qwen3"))
    assert frames.of(PAIR) is not None
    for text in (" space", "space\n", "", "<think>\n\n</think>a", "a<|im_end|>\nb"):
        assert frames.of([Message("user", text), PAIR[1]]) is None
        assert frames.of([PAIR[0], Message("assistant", text)]) is None


def changed(folder, target, old, new):
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    path = target / "chat_template.jinja"
    source = path.read_text()
    assert old in source
    path.write_text(source.replace(old, new))
    return ChatTokenizer(target)


def test_a_template_that_fails_the_sample_is_followed(tiny_model, tmp_path):
    """One that adds to long prompts, which no probe shows."""
    more = "(message['content'] if message['content'] | length < 60 else message['content'] + ' (long)')"
    tokenizer = changed(tiny_model("llama"), tmp_path / "m", "message['content']", more)
    examples = [Example.pair(f"Say {n}. " + "Please, " * (n >= SAMPLE) * 9 + "do!", f"{n}") for n in range(FEW + 5)]
    with pytest.raises(FramesDiffer):
        rows(examples, tokenizer, Frames(tokenizer), size=CHUNK)
    table = tokenize(examples, tokenizer, source="task")
    assert len(table) == len(examples)
    for i in (0, SAMPLE, FEW + 4):
        assert table.row(i)[0].tolist() == tokenizer.encode(tokenizer.render(examples[i].messages))


def test_a_template_with_words_between_turns(tiny_model, tmp_path):
    """Text that ends in no special token has no frame; the end token stands for it behind the answer."""
    tokenizer = changed(tiny_model("llama"), tmp_path / "m", "'<|im_end|>' + '\n'", "'\nover\n'")
    assert Frames(tokenizer).of(PAIR) is None
    examples = [Example.pair(f"Say {n}.", f"{n}") for n in range(FEW)]
    table = tokenize(examples, tokenizer, source="task")
    text = tokenizer.render(examples[7].messages)
    assert table.row(7)[0].tolist() == tokenizer.encode(text.removesuffix("\nover\n") + "<|im_end|>")


def test_memory_follows_the_arrays(chat):
    """Ids never pile up in Python objects: 36 bytes an integer would be nine times the array."""
    tokenizer = chat("llama")
    words = random.Random(1).choices(tiny.CORPUS.split(), k=400)
    examples = [
        Example.pair(" ".join(words[n % 300 : n % 300 + 90]), f"{n}", origin=f"t:{n}") for n in range(6 * CHUNK)
    ]
    tokenize(examples[:FEW], tokenizer, source="general")  # what is made once
    tracemalloc.start()
    table = tokenize(examples, tokenizer, source="general")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    arrays = sum(getattr(table, name).nbytes for name in ("ids", "mask", "hashes", "origins", "tokens", "starts"))
    chunk = CHUNK * int(table.tokens.mean())  # tokens of one
    assert len(table.ids) > 5e5
    assert peak < 1.4 * arrays + 3 * 36 * chunk
    assert peak < 36 * len(table.ids) / 2
    assert isinstance(table.ids, np.ndarray) and table.ids.dtype == np.int32 and table.ids.base is None
