import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from tell.score.text import TextScorer, rouge_l, words

ANSWERS = ["The cat sat on the mat.", "", "Ein Hund läuft schnell über die Straße", "完全不同的句子", "same", "word"]
REFERENCES = [
    "The cat sat on a mat.",
    "An empty answer is worth nothing",
    "Der Hund läuft über die Straße",
    "这是一个句子",
    "same",
    "",
]


def corpus_scores(answers, references):
    return {
        "chrf": sacrebleu.corpus_chrf(answers, [references], word_order=2).score,
        "bleu": sacrebleu.corpus_bleu(answers, [references], force=True).score,
    }


@given(
    st.lists(st.tuples(st.text("abc .,é\n", max_size=40), st.text("abc .,é\n", max_size=40)), min_size=1, max_size=8)
)
@settings(max_examples=60)
def test_corpus_scores_equal_sacrebleu(pairs):
    answers, references = map(list, zip(*pairs, strict=True))
    metrics = TextScorer().score(answers, references)
    for name, expected in corpus_scores(answers, references).items():
        assert metrics[name].value == pytest.approx(expected, abs=1e-9)


def test_resamples_equal_sacrebleu_on_the_drawn_rows():
    metrics = TextScorer().score(ANSWERS, REFERENCES)
    weights = np.random.default_rng(0).multinomial(len(ANSWERS), np.full(len(ANSWERS), 1 / len(ANSWERS)), size=(3, 4))
    for name in ("chrf", "bleu"):
        values = metrics[name].combine(weights @ metrics[name].stats)
        assert values.shape == (3, 4)
        for place in np.ndindex(3, 4):
            drawn = np.repeat(np.arange(len(ANSWERS)), weights[place])
            expected = corpus_scores([ANSWERS[i] for i in drawn], [REFERENCES[i] for i in drawn])[name]
            assert values[place] == pytest.approx(expected, abs=1e-9)


def test_per_row_equals_sentence_scores():
    metrics = TextScorer().score(ANSWERS, REFERENCES)
    for i, (answer, reference) in enumerate(zip(ANSWERS, REFERENCES, strict=True)):
        chrf = sacrebleu.sentence_chrf(answer, [reference], word_order=2).score
        bleu = sacrebleu.sentence_bleu(answer, [reference]).score  # effective order is its default
        assert metrics["chrf"].per_row[i] == pytest.approx(chrf, abs=1e-9)
        assert metrics["bleu"].per_row[i] == pytest.approx(bleu, abs=1e-9)
    assert metrics["exact_match"].per_row.tolist() == [0, 0, 0, 0, 1, 0]


def test_rouge_l_is_worked_by_hand():
    metrics = TextScorer().score(["the cat sat down", "Größe", "日本語"], ["the cat lay down now", "größe!", "日本人"])
    precision, recall = 3 / 4, 3 / 5
    expected = [2 * precision * recall / (precision + recall), 1.0, 2 / 3]
    assert metrics["rouge_l"].per_row == pytest.approx(expected)
    assert metrics["rouge_l"].value == pytest.approx(np.mean(expected))


ROUGE_L = [  # the F-measure of RougeScorer(["rougeL"]) of rouge-score 0.1.2 with `words` as its tokenizer
    ("the cat sat on the mat", "the cat lay on a mat", 0.6666666666666666),
    ("the cat sat on the mat", "the cat sat on the mat", 1.0),
    ("", "nothing was said", 0),
    ("something was said", "", 0),
    ("", "", 0),
    ("...", "\u2014!?", 0),
    ("mat the on sat cat the", "the cat sat on the mat", 0.5),
    ("a a a a", "a b a c a", 0.6666666666666665),
    ("a b c d e f g", "a c e g", 0.7272727272727273),
    ("x y z", "u v w", 0.0),
    ("Größe", "größe!", 1.0),
    ("STRASSE", "Straße", 1.0),
    ("日本語", "日本人", 0.6666666666666666),
    ("今日は good day", "今日 good days", 0.6666666666666665),
    (
        "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
        "\u0926\u0941\u0928\u093f\u092f\u093e \u0928\u092e\u0938\u094d\u0924\u0947",
        0.5,
    ),
    ("cafe\u0301 au lait", "café au lait", 1.0),
    ("Don't stop", "Don\u2019t stop", 1.0),
    ("It costs 3.50 EUR", "it costs 3,50 eur", 1.0),
    (
        "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e04\u0e23\u0e31\u0e1a",
        "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e04\u0e48\u0e30",
        0.6153846153846153,
    ),
    ("Höfnin opnar aftur eftir langan vetur", "Höfnin opnar eftir langan vetur viðgerða", 0.8333333333333334),
    ("\U0001f469\u200d\U0001f680 flies to the moon", "the \U0001f469\u200d\U0001f680 flies", 0.3333333333333333),
    ("مرحبا بالعالم", "مرحبا يا عالم", 0.4),
    ("foo_bar baz", "foo bar_baz", 1.0),
    ("line one\nline two\n\nline three", "line one line three", 0.8),
    ("\u0661\u0662\u0663 items", "123 items", 0.5),
    (
        "the quick brown fox jumps over the lazy dog " * 8,
        "a quick fox jumped over that lazy dog " * 9,
        0.5555555555555556,
    ),
    ("one", "one one one one one", 0.33333333333333337),
    ("ﬁne oﬃce", "fine office", 1.0),
    ("이것은 문장입니다", "이것은 좋은 문장입니다", 0.8),
    ("a\tb\xa0c", "a b c d", 0.8571428571428571),
]


@pytest.mark.parametrize(("answer", "reference", "expected"), ROUGE_L)
def test_rouge_l_equals_the_published_package(answer, reference, expected):
    assert rouge_l(answer, reference) == expected


def test_words_of_many_scripts():
    assert words("Don't STOP — Übung 42!") == ["don", "t", "stop", "übung", "42"]
    assert words("नमस्ते दुनिया") == ["नमस्ते", "दुनिया"]  # vowel signs stay in their word
    assert words("今日は good") == ["今", "日", "は", "good"]
    assert words("e\u0301te\u0301") == words("été")
    assert words("...") == []


def test_text_has_no_format():
    assert TextScorer().is_task_format("anything") is None


def test_unicode_forms_are_one():
    composed, decomposed = ["Jos\u00e9 bought a caf\u00e9 au lait"], ["Jose\u0301 bought a cafe\u0301 au lait"]
    for answers, references in ((composed, decomposed), (decomposed, composed)):
        scores = TextScorer().score(answers, references)
        assert {name: round(metric.value, 6) for name, metric in scores.items()} == {
            "chrf": 100.0,
            "bleu": 100.0,
            "rouge_l": 1.0,
            "exact_match": 1.0,
        }
