"""Arms, parts of the method and metrics as declared values: used by the screen, pages, studies and verdict.

A new arm is an entry of ``_ARMS``, a new metric an entry of ``_SCORES`` or ``_MEASURES``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from tell.number_text import Unit

Mixture = Literal["task", "task-matched", "general", "mixed"]
Colour = Literal["blue", "orange", "green", "pink", "ochre", "grey", "violet"]
Closed = Literal["off", "likelihood", "readout", "fused"]
"""How closed fields (`tell.data.closed`) are answered: as the other text, by the model among their values, by the
readout, or by both multiplied."""


@dataclass(frozen=True)
class Arm:
    """One way to answer the test rows.

    Attributes:
        name: in configurations, files and metrics.json.
        label: on screen, pages and figures.
        phrase: as the subject of a sentence.
        about: its definition, one sentence.
        colour: in figures, a name of `tell.report.palette.COLOURS`.
        marker: in figures, matplotlib's letter.
        mixture: what its adapter is trained on (`tell.run.arms.MIXTURES`); None: it trains no adapter.
        adapter: the trained arm whose adapter it answers with; None: the untuned model.
        anchored: the anchor is put on its prompts.
        in_context: training examples are put in its prompts.
        decides: its closed fields are answered as ``generate.closed`` says, else as the other text.
        optional: given up to keep ``--max-minutes``, the lowest number first; None: never.
        dashes: of its line in figures; None: solid.
        rival: compared with `tell` in the verdict, the lowest number first; None: never.
    """

    name: str
    label: str
    phrase: str
    about: str
    colour: Colour
    marker: str
    mixture: Mixture | None = None
    adapter: str | None = None
    anchored: bool = True
    in_context: bool = False
    decides: bool = False
    optional: int | None = None
    rival: int | None = None
    dashes: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.mixture is not None and self.adapter != self.name:
            raise ValueError(f"arm {self.name}: a trained arm answers with its own adapter")


_ARMS = (
    Arm(
        "base",
        "untuned",
        "the untuned model",
        "The model as published, given the prompt alone.",
        "grey",
        "X",
        anchored=False,
        dashes=(1.5, 2),
    ),
    Arm(
        "base+anchor",
        "untuned, with the anchor",
        "the untuned model with the anchor",
        "The untuned model with the anchor on the prompt.",
        "grey",
        "P",
        optional=4,
        dashes=(4, 2),
    ),
    Arm(
        "icl",
        "examples in context",
        "the untuned model with examples in context",
        "The untuned model, shown as many training examples in its prompt as fit.",
        "ochre",
        "v",
        in_context=True,
        rival=5,
    ),
    Arm(
        "icl-readout",
        "examples in context, with the readout",
        "the untuned model with examples in context and the readout",
        "The untuned model with examples in context, its closed fields decided with the readout.",
        "ochre",
        "^",
        in_context=True,
        decides=True,
        optional=6,
        rival=3,
        dashes=(4, 2),
    ),
    Arm(
        "sft",
        "SFT, one epoch",
        "SFT",
        "LoRA tuned on the task rows alone, for one epoch, as in the paper.",
        "orange",
        "s",
        mixture="task",
        adapter="sft",
        optional=3,
        rival=4,
    ),
    Arm(
        "sft-matched",
        "SFT, as many steps as TELL",
        "step-matched SFT",
        "LoRA tuned on the task rows alone, repeated until it has had as many optimiser steps as TELL.",
        "pink",
        "D",
        mixture="task-matched",
        adapter="sft-matched",
        rival=2,
    ),
    Arm(
        "sft-readout",
        "SFT, as many steps, with the readout",
        "step-matched SFT with the readout",
        "The adapter of step-matched SFT, its closed fields decided with the readout, as TELL's are.",
        "pink",
        "d",
        adapter="sft-matched",
        decides=True,
        optional=7,
        rival=1,
        dashes=(4, 2),
    ),
    Arm(
        "general",
        "general data alone",
        "tuning on general data alone",
        "LoRA tuned on the general rows alone, with no task row.",
        "green",
        "^",
        mixture="general",
        adapter="general",
        optional=2,
        rival=6,
    ),
    Arm(
        "tell",
        "TELL",
        "TELL",
        "LoRA tuned by TELL: the task rows carry the anchor and are mixed into general instruction rows. Closed fields "
        "are decided with the readout.",
        "blue",
        "o",
        mixture="mixed",
        adapter="tell",
        decides=True,
    ),
    Arm(
        "tell-free",
        "TELL, without the readout",
        "TELL without the readout",
        "The adapter of TELL, its closed fields written as freely as the other text.",
        "blue",
        "h",
        adapter="tell",
        optional=5,
        dashes=(1.5, 2),
    ),
    Arm(
        "tell-anchor",
        "TELL, prompted without its anchor",
        "TELL without its anchor",
        "The adapter of TELL, scored without the anchor on the prompt.",
        "blue",
        "o",
        adapter="tell",
        anchored=False,
        decides=True,
        optional=1,
        dashes=(4, 2),
    ),
)
ARMS: dict[str, Arm] = {arm.name: arm for arm in _ARMS}
for _arm in _ARMS:
    if _arm.adapter is not None and ARMS[_arm.adapter].mixture is None:
        raise ValueError(f"arm {_arm.name}: no arm trains the adapter {_arm.adapter}")


@dataclass(frozen=True)
class Part:
    """One part of the method, and the pairs of arms that differ by it: the first has it, the second lacks it."""

    label: str
    about: str
    pairs: tuple[tuple[str, str], ...]


PARTS = (
    Part(
        "Readout",
        "Closed fields are decided, by the model and a classifier on the untuned model's hidden states.",
        (("tell", "tell-free"), ("sft-readout", "sft-matched"), ("icl-readout", "icl")),
    ),
    Part(
        "General rows",
        "The task rows are mixed into general rows, instead of being repeated alone for as many steps.",
        (("tell", "sft-readout"), ("tell-free", "sft-matched")),
    ),
    Part("Anchor", "The anchor is on the prompt.", (("tell", "tell-anchor"),)),
)
"""What "what each part brought" compares; each ingredient is given to the control too where it can be."""
for _one, _other in (_pair for _part in PARTS for _pair in _part.pairs):
    if _one not in ARMS or _other not in ARMS:
        raise ValueError(f"a part compares {_one} with {_other}, and one of them is no arm")
TRAINED = tuple(arm.name for arm in _ARMS if arm.mixture)
RIVALS = tuple(a.name for a in sorted((a for a in _ARMS if a.rival), key=lambda a: a.rival or 0))


def arm(name: str) -> Arm:
    """An arm by its name; one that is unknown (of a folder that another version wrote) is called by its name."""
    return ARMS.get(name) or Arm(name, name, name, "", "violet", "o")


def arm_order(names: Iterable[str]) -> list[str]:
    """Each name once: known arms in the order of `ARMS`, then the others as they came."""
    known = list(ARMS)
    return sorted(dict.fromkeys(names), key=lambda name: known.index(name) if name in ARMS else len(known))


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
if len(ARMS) < len(_ARMS) or len(METRICS) < len(_SCORES) + len(_MEASURES):
    raise ValueError("an arm or a metric is declared twice")


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
