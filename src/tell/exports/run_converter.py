"""``python run_converter.py PRE SCRIPT ARGUMENT...``: llama.cpp's converter, which may not know the tokenizer.

The converter recognises byte-level tokenizers by a hash of what they make of one text, so that a vocabulary newer than
the converter, or one's own, is refused although llama.cpp splits words just as it does. Such a one gets the name
``PRE``, which the parent found from the own rule for words of that tokenizer (`tell.exports.converter.word_rule`); the
check of the export compares token ids. Runs in a process of its own with the packages of the converter, and imports
nothing of TELL.
"""

from __future__ import annotations

import runpy
import sys


def main() -> None:
    pre, script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    if pre:
        _name(pre)
    runpy.run_path(script, run_name="__main__")


def _name(pre: str) -> None:
    """Have tokenizers that the converter does not recognise called ``pre``."""
    try:
        from conversion.base import TextModel
    except ImportError:  # a checkout from before that package, which recognises the tokenizer itself or refuses it
        return
    known = TextModel.get_vocab_base_pre

    def named(self: object, tokenizer: object) -> str:
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            return pre

    TextModel.get_vocab_base_pre = named


if __name__ == "__main__":
    main()
