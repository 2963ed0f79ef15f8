"""What the page calls things: arms and metrics with their definitions, for labels and the glossary."""

from __future__ import annotations

from typing import NamedTuple

from tell.names import unit_of


class Term(NamedTuple):
    """A metric's label, unit (see ``text.number``), definition, and whether more of it is better."""

    label: str
    unit: str
    definition: str
    higher: bool = True


ARMS: dict[str, tuple[str, str]] = {
    "base": ("untuned model", "The model as it was published, given the prompt alone."),
    "base+anchor": ("untuned, with the anchor", "The untuned model with the anchor put on the prompt."),
    "icl": ("examples in context", "The untuned model, shown as many training examples in its prompt as fit."),
    "sft": ("task rows once", "LoRA tuned on the task rows alone, for one epoch, as in the paper."),
    "sft-matched": (
        "task rows, as many steps as tell",
        "LoRA tuned on the task rows alone, repeated until it has had as many optimiser steps as tell.",
    ),
    "general": ("general rows alone", "LoRA tuned on the general rows alone, with no task row."),
    "tell": (
        "task rows inside general rows",
        "LoRA tuned by TELL: the task rows carry the anchor and stand among general instruction rows.",
    ),
    "tell-anchor": ("tell, asked without its anchor", "The tell adapter, scored without its anchor on the prompt."),
}

METRICS: dict[str, Term] = {
    "schema_adherence": Term(
        "Schema adherence",
        "share",
        "Share of test rows whose whole answer is JSON by a strict parser and valid under the JSON Schema.",
    ),
    "valid_json": Term("Valid JSON", "share", "Share of test rows whose whole answer parses as JSON."),
    "field_accuracy": Term("Field accuracy", "share", "Share of the reference's fields that the answer gives exactly."),
    "exact_match": Term("Exact match", "share", "Share of test rows whose answer equals the reference as a whole."),
    "accuracy": Term("Accuracy", "share", "Share of test rows whose label equals the reference's."),
    "valid_label": Term("Valid label", "share", "Share of test rows whose answer is one of the task's labels."),
    "macro_f1": Term("Macro-F1", "share", "Mean over labels of F1, the harmonic mean of precision and recall."),
    "chrf": Term("chrF++", "score", "Overlap of character and word n-grams with the reference, 0 to 100 (sacrebleu)."),
    "bleu": Term("BLEU", "score", "Corpus BLEU against the reference, 0 to 100 (sacrebleu)."),
    "bleurt": Term(
        "BLEURT", "plain", "Mean of BLEURT's learned score: about 0 for a wrong translation, 1 for a perfect."
    ),
    "rouge_l": Term("ROUGE-L", "share", "F-measure of the longest common subsequence with the reference."),
    "answer_loss": Term(
        "Answer loss",
        "plain",
        "Mean negative log-likelihood of the reference answer given the arm's own prompt, in nats a token: it moves "
        "smoothly where a score is right or wrong.",
        False,
    ),
    "linear_probe": Term(
        "Linear probe",
        "share",
        "Share of queries whose group a linear classifier on hidden states names, trained without them; chance: 50 %.",
    ),
    "silhouette": Term(
        "Silhouette",
        "plain",
        "How much nearer a query's hidden state is to its own group than to the other, -1 to 1 (Rousseeuw 1987).",
    ),
    "mmd2": Term("MMD²", "plain", "Squared maximum mean discrepancy of the two groups' hidden states, unbiased."),
    "length_probe": Term(
        "Length alone",
        "share",
        "Share of queries whose group is named by their length in tokens alone: what the other numbers must exceed.",
    ),
    "loss": Term("Loss", "plain", "Mean negative log-likelihood of the reference answer, in nats a token.", False),
    "task_format": Term(
        "Answered in the task's format",
        "share",
        "Share of general prompts that are answered in the task's format; more than before means leakage.",
        False,
    ),
}

GLOSSARY: tuple[tuple[str, str], ...] = (
    ("anchor", "One fixed instruction text that stands on every task row, never on a general row."),
    (
        "95 % interval",
        "Where the value would lie in 95 of 100 repetitions with other test rows of the same kind. It covers the "
        "choice of test rows, not the choice of training rows or seed.",
    ),
    (
        "difference",
        "tell minus the other arm on the same test rows, so its interval is narrower than the two arms' intervals "
        "suggest. Where the interval holds 0, the two cannot be told apart.",
    ),
    ("general rows", "Instructions and answers that have nothing to do with the task."),
    ("step", "One update of the weights, from one batch of rows."),
    ("trained tokens", "Tokens that carry loss: the answers with their end token, not the prompts."),
    ("ratio", "General tokens for each token of task data, task rows counted once."),
    ("FLOPs", "Floating-point operations spent in training, a measure of compute that no machine changes."),
)


def term(metric: str) -> Term:
    """The metric's entry, or one made from its name where the page does not know it (a user's own scorer)."""
    if metric.startswith("field:"):
        name = metric.removeprefix("field:")
        return Term(
            f"Field {name}", "share", f"Share of test rows whose answer gives the field {name} as the reference does."
        )
    return METRICS.get(metric) or Term(
        metric.replace("_", " ").capitalize(), unit_of(metric), "A scorer of this run's own."
    )


def arm_order(arms: list[str]) -> list[str]:
    """Each arm once: known ones in the glossary's order, then the others as they came."""
    names = list(ARMS)
    return sorted(dict.fromkeys(arms), key=lambda a: names.index(a) if a in ARMS else len(names))
