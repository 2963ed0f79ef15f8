"""Scores free text: chrF++ and BLEU through sacrebleu, ROUGE-L through rouge-score, BLEURT where it is asked for."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tell.errors import require_package
from tell.score.bleurt import Bleurt
from tell.score.means import check_pairs, mean_metric
from tell.score.scored import Metric


class UnicodeTokenizer:
    """Words of any script for rouge-score, whose own tokenizer drops all but a-z and 0-9.

    Runs of letters, marks and digits, without case; scripts written without spaces are cut into
    characters.
    """

    def __init__(self) -> None:
        import regex  # sacrebleu depends on it; `re` knows no scripts

        unspaced = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
        self._word = regex.compile(rf"[{unspaced}]\p{{M}}*|(?:(?![{unspaced}])[\p{{L}}\p{{M}}\p{{N}}])+")

    def tokenize(self, text: str) -> list[str]:
        return self._word.findall(unicodedata.normalize("NFC", text).casefold())


class TextScorer:
    """Likeness to a reference text, both in Unicode's composed form (NFC).

    Metrics:
        chrf: corpus chrF++ (word order 2), 0 to 100, equal to ``sacrebleu.corpus_chrf``.
        bleu: corpus BLEU with sacrebleu's defaults, 0 to 100, equal to ``sacrebleu.corpus_bleu``.
        rouge_l: mean over rows of ROUGE-L's F1, 0 to 1.
        exact_match: equal but for surrounding whitespace. Binary.
        bleurt: mean over rows of BLEURT's score, where a checkpoint is given; it is then the primary metric.

    Per row stand the sentence scores; BLEU's with effective order, as sacrebleu recommends.

    Args:
        bleurt: a checkpoint, see `tell.score.bleurt.Bleurt`.
    """

    name = "text"

    def __init__(self, bleurt: str | None = None) -> None:
        for package in ("sacrebleu", "rouge_score"):
            require_package(package, "text", where="a text task")
        self._bleurt = Bleurt(bleurt) if bleurt else None
        self.primary = "bleurt" if bleurt else "chrf"

    def is_task_format(self, answer: str) -> None:
        """None: free text has no format to leak."""

    def score(self, answers: Sequence[str], references: Sequence[str]) -> dict[str, Metric]:
        """Metrics by name, each over the same n rows.

        Raises:
            TellError: the lengths differ, or there is no row.
        """
        check_pairs(answers, references)
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU, CHRF

        rouge = RougeScorer(["rougeL"], tokenizer=UnicodeTokenizer())
        # macOS writes é as two characters; no metric may tell the two forms apart.
        answers, references = ([unicodedata.normalize("NFC", text) for text in side] for side in (answers, references))
        pairs = list(zip(answers, references, strict=True))
        chrf = CHRF(word_order=2)
        learned = {"bleurt": mean_metric(self._bleurt.score(answers, references))} if self._bleurt else {}
        return learned | {
            "chrf": _corpus_metric(chrf, chrf, answers, references),
            "bleu": _corpus_metric(BLEU(force=True), BLEU(effective_order=True), answers, references),
            "rouge_l": mean_metric([rouge.score(ref, answer)["rougeL"].fmeasure for answer, ref in pairs]),
            "exact_match": mean_metric([answer.strip() == ref.strip() for answer, ref in pairs], binary=True),
        }


def _corpus_metric(corpus: Any, sentence: Any, answers: Sequence[str], references: Sequence[str]) -> Metric:
    """Segment statistics of a sacrebleu metric; its own bootstrap sums the same ones the same way."""
    rows = corpus._extract_corpus_statistics(list(answers), [list(references)])
    stats = np.array(rows, dtype=np.float64)
    return Metric(stats, _combine(corpus), _combine(sentence)(stats))


def _combine(metric: Any) -> Callable[[np.ndarray], np.ndarray]:
    def combine(sums: np.ndarray) -> np.ndarray:
        flat = sums.reshape(-1, sums.shape[-1]).tolist()
        scores = [metric._compute_score_from_stats(row).score for row in flat]
        return np.array(scores).reshape(sums.shape[:-1])

    return combine
