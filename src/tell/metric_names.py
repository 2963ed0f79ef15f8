"""Metrics as declared values: used by the screen, pages, studies and verdict.

A new metric is an entry of ``_SCORES`` or ``_MEASURES``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tell.number_text import Unit


@dataclass(frozen=True)
class MetricSpec:
    """A metric: its name, unit and format.

    Attributes:
        name: in metrics.json and recipes.
        label: on pages and figures, with a capital.
        unit: of its values, see `show`.
        about: its definition, one sentence.
        higher_is_better: False for losses and leaks.
        own: of a user's scorer; sentences call it by its name, which the user wrote.
    """

    name: str
    label: str
    unit: Unit
    about: str = ""
    higher_is_better: bool = True
    own: bool = False

    @property
    def phrase(self) -> str:
        """What a sentence calls it."""
        field = self.name.startswith(FIELD) and self.unit == "share"
        return f"accuracy of the field {self.name.removeprefix(FIELD)}" if field else self._inside

    @property
    def _inside(self) -> str:
        """The label after other words."""
        if self.own:
            return self.name
        return self.label if self.label[:2].isupper() else self.label[:1].lower() + self.label[1:]

    @property
    def gap_unit(self) -> Unit:
        """The unit of a difference of two of its values."""
        return "points" if self.unit == "share" else self.unit

    @property
    def axis_label(self) -> str:
        """The label with its unit, for an axis."""
        return self.label + {"share": " (%)", "points": " (points)", "nats": " (nats a token)"}.get(self.unit, "")

    @property
    def change(self) -> MetricSpec:
        """Its change from the untuned model."""
        name, label = self.name + CHANGE, f"Change of {self._inside}"
        return replace(self, name=name, label=label, unit=self.gap_unit, own=False)


HELD_OUT, PROBE, WITNESS = "general held out", "probe", "witness"  # sets of general rows; the last two are in no mix
ANSWER_LOSS = "answer_loss"
FIELD, BENCHMARK = "field:", "benchmark "  # how names of metrics begin
LOSS, TASK_FORMAT, CHANGE = " loss", " task format", " change"  # how names of a set's measures and of changes end
_SCORES = (
    MetricSpec(
        "schema_adherence",
        "Schema adherence",
        "share",
        "Share of test rows whose whole answer is JSON by a strict parser and valid under the JSON Schema.",
    ),
    MetricSpec("valid_json", "Valid JSON", "share", "Share of test rows whose whole answer parses as JSON."),
    MetricSpec("field_accuracy", "Field accuracy", "share", "Share of the reference's fields that are given exactly."),
    MetricSpec("exact_match", "Exact match", "share", "Share of test rows whose answer equals the whole reference."),
    MetricSpec(
        "item_f1",
        "Item F1",
        "share",
        "Over all items of the answers' lists, the harmonic mean of precision and recall.",
    ),
    MetricSpec("accuracy", "Accuracy", "share", "Share of test rows whose label equals the reference's."),
    MetricSpec("macro_f1", "Macro-F1", "share", "Mean over labels of F1, the harmonic mean of precision and recall."),
    MetricSpec("valid_label", "Valid label", "share", "Share of test rows whose answer is one of the task's labels."),
    MetricSpec(
        "sample_f1", "Sample F1", "share", "Mean over test rows of F1 of the answer's labels and the reference's."
    ),
    MetricSpec("exact_set", "Exact set", "share", "Share of test rows whose labels are the reference's and no others."),
    MetricSpec("micro_f1", "Micro-F1", "share", "F1 of all labels of all test rows together."),
    MetricSpec(
        "valid_labels",
        "Valid labels",
        "share",
        "Share of test rows whose answer lists labels of the task and no others.",
    ),
    MetricSpec("rouge_l", "ROUGE-L", "share", "F-measure of the longest common subsequence with the reference."),
    MetricSpec("chrf", "chrF++", "score", "Overlap of character and word n-grams with the reference, 0 to 100."),
    MetricSpec("bleu", "BLEU", "score", "Corpus BLEU against the reference, 0 to 100 (sacrebleu)."),
    MetricSpec(
        "bleurt", "BLEURT", "plain", "Mean learned score: about 0 for a wrong translation, 1 for a perfect one."
    ),
    MetricSpec(
        ANSWER_LOSS,
        "Answer loss",
        "nats",
        "Mean negative log-likelihood of the reference answer given the arm's prompt, in nats a token; it is smooth.",
        higher_is_better=False,
    ),
)
_MEASURES = (
    MetricSpec(
        "linear_probe",
        "Linear probe",
        "share",
        "Share of queries whose group a linear classifier on hidden states names, trained without them; chance: 50 %.",
    ),
    MetricSpec(
        "silhouette",
        "Silhouette",
        "plain",
        "How much nearer a query's hidden state is to its own group than to the other, -1 to 1 (Rousseeuw 1987).",
    ),
    MetricSpec("mmd2", "MMD²", "plain", "Squared maximum mean discrepancy of the two groups' hidden states, unbiased."),
    MetricSpec(
        "length_probe",
        "Length alone",
        "share",
        "Share of queries whose group their length in tokens alone names: what the other numbers must exceed.",
    ),
    MetricSpec("loss", "Loss", "nats", "Mean negative log-likelihood of the reference answer, in nats a token.", False),
    MetricSpec(
        "task_format",
        "Answered in the task's format",
        "share",
        "Share of general prompts answered in the task's format; more than before means leakage.",
        higher_is_better=False,
    ),
)
SCORES = tuple(spec.name for spec in _SCORES)  # of answers to test rows: the scorers' own and the answer loss
METRICS: dict[str, MetricSpec] = {spec.name: spec for spec in (*_SCORES, *_MEASURES)}
if len(METRICS) < len(_SCORES) + len(_MEASURES):
    raise ValueError("a metric is declared twice")


def canonical(name: str) -> str:
    """``probe loss`` for ``probe``: a set of general rows named alone means the loss on it."""
    return name + LOSS if name in (HELD_OUT, PROBE, WITNESS) else name


def metric(name: str) -> MetricSpec:
    """A metric by its name in metrics.json, in predictions or in a study.

    Besides those of `METRICS`: ``field:<x>``, ``<set> loss``, ``<set> task format``, ``benchmark <x>``, each of them
    with `` change`` for the change from the untuned model, and a user's own, whose range is unknown.
    """
    name = canonical(name)
    if name.endswith(CHANGE):
        return metric(name.removesuffix(CHANGE)).change
    if name in METRICS:
        return METRICS[name]
    if name.startswith(FIELD):
        field = name.removeprefix(FIELD)
        about = f"Share of test rows whose answer gives the field {field} as the reference does."
        return MetricSpec(name, f"Field {field}", "share", about)
    if name.startswith(BENCHMARK):
        return MetricSpec(
            name, name.removeprefix(BENCHMARK), "share", "Share of the benchmark's questions answered right."
        )
    if name.endswith(LOSS):
        label, rows = "Loss on held-out general rows", "rows of the general data that were held out"
        if name == PROBE + LOSS:
            label, rows = "Loss on general text", "general text that was in no mix"
        about = f"Mean negative log-likelihood of {rows}, in nats a token; a rise is what was forgotten."
        return MetricSpec(name, label, "nats", about, higher_is_better=False)
    if name.endswith(TASK_FORMAT):
        return replace(METRICS["task_format"], name=name, label="General prompts answered in the task's format")
    label = name.replace("_", " ")
    label = label[:1].upper() + label[1:] if label.islower() else label
    return MetricSpec(name, label, "plain", "A metric of this run's own scorer.", own=True)
