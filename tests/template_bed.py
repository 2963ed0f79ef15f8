"""Hold chat templates to the invariant of rows: ``python tests/template_bed.py FOLDER_OF_JINJA_FILES``.

A template gets a small tokenizer that knows the special tokens it writes. Rows of several kinds are made as a run makes
them; each must begin with the ids that decoding is given, carry loss right behind them and end where decoding stops.
Prints a table of the kinds that hold, and what the others are refused with; fails where a row breaks the rule.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from tell.data.example import Example, Message
from tell.errors import TellError
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import RowRules, prompt_ids, tokenize
from tiny import CORPUS

SPECIAL = re.compile(r"<[|｜][^|｜<>\s]+[|｜]>|<\|?\w+\|?>|\[\|[^|\]]+\|\]|</[a-zA-Z]\w*>|\[/?[A-Z_]{3,}\]")
THOUGHT = "<think>\nAdd two to one.\n</think>\n\nIt is 3."


def conversation(*turns: tuple[str, str]) -> list[Message]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [Message(roles[role], text) for role, text in turns]


PLAIN = [("u", "Which shelf for parcel 3? "), ("a", "north")]
MORE = [("u", "Is it yes?"), ("a", "yes"), ("u", "And now, yes or no?"), ("a", '{"shelf": "no"}')]
LONG = RowRules(max_length=20_000)
KINDS = {
    "one turn": conversation(*PLAIN),
    "turns": conversation(*MORE),
    "system": conversation(("s", "Answer with one word."), *PLAIN),
    "system + turns": conversation(("s", "Answer with one word."), *MORE),
    "greeting": conversation(("a", "How can I help?"), *PLAIN),
    "thought": conversation(("u", "What is 1 plus 2?"), ("a", THOUGHT)),
    "earlier thought": conversation(("u", "What is 1 plus 2?"), ("a", THOUGHT), *PLAIN),
}


def tokenizer_of(template: str, folder: Path, pieces: str) -> Path:
    """Files of a tokenizer with byte-level words, or with words that begin with a mark as Llama 2's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    special = list(dict.fromkeys(["<s>", "</s>", *SPECIAL.findall(template)]))
    special = [token for token in special if token not in ("<think>", "</think>")]
    backend = Tokenizer(models.BPE(byte_fallback=pieces == "metaspace"))
    initial = pre_tokenizers.ByteLevel.alphabet()
    if pieces == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
        initial = sorted({*map(chr, range(32, 127)), "\n", "▁"})
    else:
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=initial, show_progress=False)
    backend.train_from_iterator(CORPUS.splitlines(keepends=True), trainer)
    backend.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    backend.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def verdict(chat: ChatTokenizer, messages: list[Message]) -> str:
    """``holds``, ``FAILS`` with what is broken, or the words of the refusal."""
    example = Example.of(messages, source="task", origin="row")
    try:
        alone = tokenize([example], chat, source="task", rules=LONG)
        many = tokenize([example] * 300, chat, source="task", rules=LONG)
    except TellError as error:
        return error.what
    ids, mask = (part.tolist() for part in alone.row(0))
    prompt = prompt_ids(chat, example)
    if ids[: len(prompt)] != prompt:
        return "FAILS: the row does not begin with the prompt"
    if mask[len(prompt) - 1] or not mask[len(prompt)]:
        return "FAILS: loss does not begin behind the prompt"
    last = max(i for i, trained in enumerate(mask) if trained)
    if ids[last] not in chat.stop_ids:
        return "FAILS: decoding does not stop"
    written = chat.decode(ids[len(prompt) : last])
    if messages[-1].content.rsplit("</think>")[-1].strip() not in written:
        return f"FAILS: the answer is lost: {written!r}"
    if "</think>" in messages[-1].content and "Add two" not in written:
        return "FAILS: the thought is lost"
    if len(many) != 300 or any(many.row(i)[0].tolist() != ids for i in (0, 299)):
        return "FAILS: many rows differ from one"
    return "holds, earlier answers without loss" if alone.notices else "holds"


def results_of(path: Path) -> dict[str, str]:
    """Verdict of each kind, the same for both tokenizers or else named apart."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for pieces in ("bytes", "metaspace"):
        with tempfile.TemporaryDirectory() as place:
            chat = ChatTokenizer(tokenizer_of(path.read_text(encoding="utf-8"), Path(place), pieces))
            chat.family = "X"
            for kind, messages in KINDS.items():
                try:
                    found[kind][verdict(chat.thoughtful() if "thought" in kind else chat, messages)] = None
                except TellError as error:
                    found[kind][error.what] = None
    return {kind: " / ".join(verdicts) for kind, verdicts in found.items()}


def main(folder: Path) -> int:
    """Print a Markdown table: what holds, ``*`` where earlier answers are context, and the words of refusals."""
    print("| template | holds | refused |\n|---|---|---|")
    failures = 0
    for path in sorted(folder.glob("*.jinja"), key=lambda path: path.stem.partition("--")[::-1]):
        source, _, name = path.stem.partition("--")
        results = results_of(path)
        failures += any("FAILS" in words for words in results.values())
        holds = [kind + "*" * (words != "holds") for kind, words in results.items() if words.startswith("holds")]
        refused: dict[str, list[str]] = defaultdict(list)
        for kind, words in results.items():
            if not words.startswith("holds"):
                refused[words.removeprefix("the chat template of X ")].append(kind)
        told = "; ".join(f"{', '.join(kinds)}: {words}" for words, kinds in refused.items())
        held = "all" if holds == list(KINDS) else ", ".join(holds)
        print(f"| {name} ({source}) | {held} | {told.replace('|', chr(166))} |")
    return failures


if __name__ == "__main__":
    sys.exit(bool(main(Path(sys.argv[1]))))
