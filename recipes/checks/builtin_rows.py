"""Answer the prompts on board by SmolLM2-135M: python recipes/checks/builtin_rows.py src/tell/data/builtin

Prompts of the mix are asked with the wish of ``general.self`` for a brief answer, which is not kept in the row, and
where that does not pass the filters, as they are, with at most `MOST` tokens; those of the witness set the other way
round. An answer in another language than its prompt is not kept. Both files of the folder are written again, their
order and prompts as they are.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

from tell.config import Config
from tell.config_sections import SelfConfig
from tell.data.builtin import PROMPTS, WITNESS
from tell.files import read_jsonl, write_jsonl
from tell.models.find import find_model
from tell.rows.template import ChatTokenizer
from tell.run.self_written import answered
from tell.run.session import Session

MOST = 400  # tokens of an answer
BRIEF, PLAIN = SelfConfig(), SelfConfig(answer_wish="", max_answer_tokens=MOST)
FILES = {PROMPTS: (7, BRIEF, PLAIN), WITNESS: (11, PLAIN, BRIEF)}  # seed, and how a prompt is asked first and then
# Words that nearly every sentence has one of; other scripts are told by their letters.
WORDS = {
    "en": "the a of to is and in for with that it you",
    "es": "el la los de que es y en para con una un se",
    "fr": "le la les de que est et en pour avec une un des",
    "de": "der die das und ist zu in ein eine mit nicht den",
    "pt": "o a os de que é e em para com uma um não",
    "it": "il la di che è e in per con una un non si",
    "nl": "de het een en van is in te voor met niet dat",
    "pl": "i w z na się jest to nie do że o jak",
    "tr": "ve bir bu da de için ile ne çok var olan",
    "id": "dan yang di untuk dengan ini itu dari adalah ke",
    "sv": "och att det en är på för med som av inte",
}
SCRIPTS = {
    "ru": "\u0400-\u04ff",
    "ar": "\u0600-\u06ff",
    "hi": "\u0900-\u097f",
    "zh": "\u4e00-\u9fff",
    "ja": "\u3040-\u9fff",
}


def is_in(language: str, text: str) -> bool:
    """Whether a text is in a language rather than in English."""
    if language == "en":
        return True
    if language in SCRIPTS:
        return len(re.findall(f"[{SCRIPTS[language]}]", text)) > len(re.findall("[A-Za-z]", text))
    words = re.findall(r"\w+", text.lower())
    own, english = (sum(word in WORDS[key].split() for word in words) for key in (language, "en"))
    return own > english


def main(folder: Path) -> None:
    config = Config()
    files = find_model("smollm2-135m")
    chat = ChatTokenizer(files.path)
    session = Session(files, config, chat)
    for name, (seed, first, then) in FILES.items():
        rows, thrown = read_jsonl(folder / name), Counter()
        config.general.self_ = first
        outputs = answered(session, [row["prompt"] for row in rows], seed, thrown)
        left = [i for i, output in enumerate(outputs) if output is None]
        config.general.self_ = then
        again = answered(session, [rows[i]["prompt"] for i in left], seed + 1, Counter())
        for i, output in zip(left, again, strict=True):
            outputs[i] = output
        for row, output in zip(rows, outputs, strict=True):
            row["completion"] = output if output is not None and is_in(row["language"], output) else None
        write_jsonl(folder / name, rows)
        kept = [row for row in rows if row["completion"] is not None]
        tokens = sum(len(chat.encode(row["prompt"] + row["completion"])) for row in kept)
        print(json.dumps({"file": name, "prompts": len(rows), "kept": len(kept), "asked again": len(left),
                          "tokens": tokens, "thrown at first": thrown}))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
