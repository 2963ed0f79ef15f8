"""Recasts general rows by rule into the form of the task: an extraction as JSON, or a question with few answers.

What the rows say stays; what is asked about them is what a rule can answer exactly, so that no answer is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from tell.data.example import Example
from tell.seeds import below, permutation

T = TypeVar("T")
Form = Literal["json", "label"]
VERSION = 1  # raise when a change to the rules changes rows
MARK = " (recast)"  # at the end of the origin of a recast row
LEAST_KEYS, MOST_KEYS = 2, 5
LONGEST = 1600  # characters of a text: an answer about a longer one depends on too much
LONGEST_VALUE = 240  # characters of a value that is copied
MOST_EMPTY = 2  # of the keys or questions to choose from, those answered by false, null, [] or no
MOST_ITEMS = 8  # of a list; more are too much to copy
SHORT, MIDDLING = 20, 60  # words of a short and of a medium text

_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"')\]»”]*\s+|(?<=[。！？])|\n+")
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_NUMBER = re.compile(r"(?<![\w.,:])\d+(?:[.,:]\d+)*(?![.,:]?\w)")
_QUOTED = re.compile(r"[\"“„«]([^\"“”„«»\n]{1,80})[\"”“»]")
_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE)
_LETTER = re.compile(r"[^\W\d_]")


def sentences(text: str) -> list[str]:
    """The sentences of a text, split at their ends and at line breaks; parts without a letter or digit left out."""
    parts = (part.strip() for part in _SENTENCE_END.split(text))
    return [part for part in parts if part and re.search(r"\w", part)]


def _words(text: str) -> list[str]:
    return _WORD.findall(text)


def _numbers(text: str) -> list[str]:
    return _NUMBER.findall(text)


def _capitalised(text: str) -> list[str]:
    """Words with a capital first letter that begin no sentence, each once, in order."""
    found: dict[str, None] = {}
    for sentence in sentences(text):
        for word in _words(sentence)[1:]:
            if word[0].isupper() and len(word) > 1:
                found[word] = None
    return list(found)


def _has_question(text: str) -> bool:
    return "?" in text or "？" in text


def _length(text: str) -> str:
    count = len(_words(text))
    return "short" if count < SHORT else "medium" if count < MIDDLING else "long"


def _ending(text: str) -> str:
    names = {".": "period", "。": "period", "?": "question mark", "？": "question mark"}
    return {**names, "!": "exclamation mark", "！": "exclamation mark"}.get(text[-1], "other")


def _longest_word(text: str) -> str | None:
    return max(_words(text), key=len, default=None)  # the first of those equally long


def _first_word(text: str) -> str | None:
    return next(iter(_words(text)), None)


@dataclass(frozen=True)
class Key:
    """One key of an extraction.

    Attributes:
        kind: the type as the schema in the prompt names it.
        about: its definition in the prompt.
        value: of a text.
    """

    name: str
    kind: str
    about: str
    value: Callable[[str], object]


_LENGTH_KIND = f"short (under {SHORT} words), medium (under {MIDDLING}) or long"
_ENDINGS = ("period", "question mark", "exclamation mark", "other")
KEYS = (
    Key("numbers", "array of strings", "all numbers in digits that stand alone, as written, in order", _numbers),
    Key(
        "first_number", "string or null", "the first of the numbers in digits", lambda t: next(iter(_numbers(t)), None)
    ),
    Key("first_sentence", "string", "the first sentence, as written", lambda t: sentences(t)[0]),
    Key("last_sentence", "string", "the last sentence, as written", lambda t: sentences(t)[-1]),
    Key("first_word", "string or null", "the first word", _first_word),
    Key("longest_word", "string or null", "the longest word, the first of several", _longest_word),
    Key(
        "capitalised", "array of strings", "words with a capital letter that begin no sentence, each once", _capitalised
    ),
    Key("quoted", "array of strings", "what stands in quotation marks", _QUOTED.findall),
    Key("sentences", "integer", "how many sentences or lines there are", lambda t: len(sentences(t))),
    Key("has_question", "boolean", "whether there is a question mark", _has_question),
    Key("has_list", "boolean", "whether there is a list with bullets or numbers", lambda t: bool(_ITEM.search(t))),
    Key("has_number", "boolean", "whether there is a number in digits", lambda t: bool(_numbers(t))),
    Key("length", '"short", "medium" or "long"', _LENGTH_KIND, _length),
    Key("ending", " or ".join(f'"{name}"' for name in _ENDINGS), "the last character", _ending),
)
"""Of every row a few are asked, so that keys, types and schema change from row to row as they do from task to task."""

_ASK_JSON = (
    "Extract the following from the text, as one line of JSON with these keys:",
    "Read the text and fill in this record. Answer with one line of JSON and nothing else.",
    "Turn the text into a JSON object. Its keys are:",
    "Return a JSON object about the text below. Schema:",
)


def _copyable(value: object) -> bool:
    """Whether a value is short enough to be written exactly."""
    if isinstance(value, str):
        return len(value) <= LONGEST_VALUE
    if isinstance(value, list):
        return len(value) <= MOST_ITEMS and all(map(_copyable, value))
    return not isinstance(value, int) or value <= 2 * MOST_ITEMS


def _few_empty(found: Sequence[T], value: Callable[[T], object]) -> list[T]:
    """The parts that hold something, and at most `MOST_EMPTY` others: most of what could be asked is not in a text."""
    empty = [part for part in found if not value(part)][:MOST_EMPTY]
    return [part for part in found if value(part) or part in empty]


def _as_json(text: str, seed: int, name: str) -> tuple[str, str]:
    """Prompt and answer of an extraction."""
    mixed = [KEYS[i] for i in permutation(len(KEYS), seed, "recast keys kept", name)]
    found = _few_empty([(key, value) for key in mixed if _copyable(value := key.value(text))], lambda pair: pair[1])
    count = LEAST_KEYS + below(MOST_KEYS - LEAST_KEYS + 1, seed, "recast keys", name)
    chosen = [found[i] for i in permutation(len(found), seed, "recast order", name)[:count]]
    schema = "\n".join(f"- {key.name} ({key.kind}): {key.about}" for key, _ in chosen)
    ask = _ASK_JSON[below(len(_ASK_JSON), seed, "recast words", name)]
    prompt = f"{ask}\n{schema}\n\nText:\n{text}"
    if below(2, seed, "recast place", name):
        prompt = f"Text:\n{text}\n\n{ask}\n{schema}"
    return prompt, json.dumps({key.name: value for key, value in chosen}, ensure_ascii=False)


@dataclass(frozen=True)
class Question:
    """One question with a closed set of answers.

    Attributes:
        answer: of a text, one of `answers`.
    """

    text: str
    answers: tuple[str, ...]
    answer: Callable[[str], str]


def _yes(holds: Callable[[str], object]) -> Callable[[str], str]:
    return lambda text: "yes" if holds(text) else "no"


def _count_name(text: str) -> str:
    return ("one", "two", "three", "more")[min(len(sentences(text)), 4) - 1]


QUESTIONS = (
    Question("Does the text contain a number in digits?", ("yes", "no"), _yes(_numbers)),
    Question("Does the text contain a question mark?", ("yes", "no"), _yes(_has_question)),
    Question("Does the text contain a list with bullets or numbers?", ("yes", "no"), _yes(_ITEM.search)),
    Question("Does the text contain something in quotation marks?", ("yes", "no"), _yes(_QUOTED.search)),
    Question(
        "Does a word with a capital letter stand anywhere but at the beginning of a sentence?",
        ("yes", "no"),
        _yes(_capitalised),
    ),
    Question(f"How long is the text: {_LENGTH_KIND}?", ("short", "medium", "long"), _length),
    Question("With what does the text end?", _ENDINGS, _ending),
    Question("How many sentences or lines does the text have?", ("one", "two", "three", "more"), _count_name),
)
_ASK_LABEL = (
    "Answer with one of: {answers}.",
    "Possible answers: {answers}. Write the answer alone.",
    "Choose one of these labels: {answers}.",
)


def _as_label(text: str, seed: int, name: str) -> tuple[str, str]:
    """Prompt and answer of a question with few answers."""
    mixed = [QUESTIONS[i] for i in permutation(len(QUESTIONS), seed, "recast questions kept", name)]
    found = _few_empty(mixed, lambda question: question.answer(text) != "no")
    asked = found[below(len(found), seed, "recast question", name)]
    places = permutation(len(asked.answers), seed, "recast order", name)
    answers = ", ".join(asked.answers[i] for i in places)
    ask = _ASK_LABEL[below(len(_ASK_LABEL), seed, "recast words", name)].format(answers=answers)
    prompt = f"{asked.text} {ask}\n\nText:\n{text}"
    if below(2, seed, "recast place", name):
        prompt = f"Text:\n{text}\n\n{asked.text} {ask}"
    return prompt, asked.answer(text)


_FORMS: dict[Form, Callable[[str, int, str], tuple[str, str]]] = {"json": _as_json, "label": _as_label}


def recast(example: Example, form: Form, seed: int) -> Example | None:
    """A general row in the form of the task; None where it has no text that a rule could ask about.

    The text is the row's question or its answer, as the seed decides, where both can be used. The same seed and row
    give the same.

    Args:
        example: a general row.
        form: ``json``: an extraction, answered by one line of JSON; ``label``: a question answered by a label.
    """
    if any(message.extra or message.tools for message in example.messages):
        return None
    texts = [text for text in (example.question.strip(), example.answer.strip()) if _usable(text)]
    if not texts:
        return None
    text = texts[below(len(texts), seed, "recast text", example.hash)]
    prompt, answer = _FORMS[form](text, seed, example.hash)
    return Example.pair(prompt, answer, source=example.source, origin=f"{example.origin}{MARK}")


def recast_by(examples: Sequence[Example], form: Form, seed: int) -> dict[str, Example]:
    """The recast rows by the content hash of the row they were made of; rows that cannot be recast are left out."""
    made = {example.hash: recast(example, form, seed) for example in examples}
    return {name: found for name, found in made.items() if found is not None}


def _usable(text: str) -> bool:
    return len(text) <= LONGEST and _LETTER.search(text) is not None and bool(sentences(text))
