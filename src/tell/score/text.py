"""Scores free text: chrF++ and BLEU by sacrebleu, ROUGE-L, and BLEURT if a checkpoint is given."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tell.errors import require_package
from tell.score.bleurt import Bleurt
from tell.score.means import check_pairs, mean_metric
from tell.score.scored import Metric, ScoredTask, scorer

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric as SacreMetric

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = rf"[{_UNSPACED}]\p{{M}}*|(?:(?![{_UNSPACED}])[\p{{L}}\p{{M}}\p{{N}}])+"


def words(text: str) -> list[str]:
    """Runs of letters, marks and digits of any script, case folded; scripts written without spaces by character."""
    import regex  # `re` has no scripts

    return regex.findall(_WORD, unicodedata.normalize("NFC", text).casefold())


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004), 0 where a text has no words.

    The subsequence's length is counted bit by bit (Hyyrö 2004): a cleared bit of ``open_`` is a matched word.
    """
    given, wanted = words(answer), words(reference)
    places: dict[str, int] = {}
    for i, word in enumerate(wanted):
        places[word] = places.get(word, 0) | 1 << i
    full = open_ = (1 << len(wanted)) - 1
    for word in given:
        hits = open_ & places.get(word, 0)
        open_ = (open_ + hits | open_ - hits) & full
    common = len(wanted) - open_.bit_count()
    if not common:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


@scorer("text", "bleurt", "chrf", "bleu", "rouge_l", "exact_match")
class TextScorer:
    """Similarity to a reference text, both in Unicode's composed form (NFC).

    Metrics:
        chrf: corpus chrF++ (word order 2), 0 to 100, equal to ``sacrebleu.corpus_chrf``.
        bleu: corpus BLEU with sacrebleu's defaults, 0 to 100, equal to ``sacrebleu.corpus_bleu``.
        rouge_l: mean over rows of ROUGE-L's F1, 0 to 1.
        exact_match: equal but for surrounding whitespace. Binary.
        bleurt: mean over rows of BLEURT's score, if a checkpoint is given; it is then the primary metric.

    The scores of single rows are sentence scores; BLEU's with effective order, as sacrebleu recommends.

    Args:
        bleurt: a checkpoint, see `tell.score.bleurt.Bleurt`.

    Raises:
        TellError: sacrebleu is not installed, or the checkpoint cannot be found.
    """

    def __init__(self, bleurt: str | None = None) -> None:
        require_package("sacrebleu", "text", where="a text task")
        self._bleurt = Bleurt(bleurt) if bleurt else None
        self.primary = "bleurt" if bleurt else "chrf"

    @classmethod
    def of(cls, task: ScoredTask) -> TextScorer:
        return cls(task.bleurt)

    def is_task_format(self, answer: str) -> None:
        """None: free text has no format to leak."""

    def score(self, answers: Sequence[str], references: Sequence[str]) -> dict[str, Metric]:
        """Metrics by name, each over the same n rows.

        Raises:
            TellError: the lengths differ, or there is no row.
        """
        check_pairs(answers, references)
        from sacrebleu.metrics import BLEU, CHRF

        # macOS writes é as two characters; no metric may distinguish the two forms.
        answers, references = ([unicodedata.normalize("NFC", text) for text in side] for side in (answers, references))
        pairs = list(zip(answers, references, strict=True))
        chrf = CHRF(word_order=2)
        learned = {"bleurt": mean_metric(self._bleurt.score(answers, references))} if self._bleurt else {}
        return learned | {
            "chrf": _corpus_metric(chrf, chrf, answers, references),
            "bleu": _corpus_metric(BLEU(force=True), BLEU(effective_order=True), answers, references),
            "rouge_l": mean_metric([rouge_l(answer, ref) for answer, ref in pairs]),
            "exact_match": mean_metric([answer.strip() == ref.strip() for answer, ref in pairs], binary=True),
        }


def _corpus_metric(
    corpus: SacreMetric, sentence: SacreMetric, answers: Sequence[str], references: Sequence[str]
) -> Metric:
    """Segment statistics of a sacrebleu metric; its own bootstrap sums the same ones the same way."""
    rows = corpus._extract_corpus_statistics(list(answers), [list(references)])
    stats = np.array(rows, dtype=np.float64)
    return Metric(stats, _combine(corpus), _combine(sentence)(stats))


def _combine(metric: SacreMetric) -> Callable[[np.ndarray], np.ndarray]:
    def combine(sums: np.ndarray) -> np.ndarray:
        flat = sums.reshape(-1, sums.shape[-1]).tolist()
        scores = [metric._compute_score_from_stats(row).score for row in flat]
        return np.array(scores).reshape(sums.shape[:-1])

    return combine
