"""What an arm is, and the words that it is declared by. The arms themselves: `tell.names`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Mixture = Literal["task", "task-matched", "task-repeated", "general", "mixed", "pseudo", "pseudo-matched"]
Colour = Literal["blue", "orange", "green", "pink", "ochre", "grey", "violet"]
TASK_SOURCES = ("task", "exemplars")
"""Sources of a mixture that are task rows: as they are, and with other task rows in their prompts."""
KindName = Literal["json", "label", "labels", "text"]
"""Kinds of a task, by its answers (`tell.data.kind`): objects, one of few labels, lists of labels, free text."""
Closed = Literal["off", "likelihood", "readout", "fused"]
"""How closed fields (`tell.data.closed`) are answered: as the other text, by the model among their values, by the
readout, or by both multiplied."""
Constrain = Literal["off", "schema", "labels"]
"""What answers are constrained to: nothing, the task's JSON Schema, or its labels."""
CONSTRAINTS: dict[str, Constrain] = {"json": "schema", "label": "labels"}
"""By the kind of task; one without has nothing that answers could be constrained to."""


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
        constrained: its answers are constrained to the task's schema or labels, whatever ``generate.constrain`` says.
        settings: dotted keys of the configuration with the values that this arm is trained with instead of the run's.
        searched: its settings are searched where ``search.minutes`` is set (`tell.run.search`).
        teacher: the trained arm whose answers to unlabelled prompts this one is trained on; it is trained first.
        standard: among the arms of a run that names none.
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
    constrained: bool = False
    settings: Mapping[str, object] = field(default_factory=dict)
    searched: bool = False
    teacher: str | None = None
    standard: bool = True
    optional: int | None = None
    rival: int | None = None
    dashes: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.mixture is not None and self.adapter != self.name:
            raise ValueError(f"arm {self.name}: a trained arm answers with its own adapter")
        if self.settings and self.mixture is None:
            raise ValueError(f"arm {self.name}: only a trained arm has settings of its own")
        if self.teacher is not None and self.mixture is None:
            raise ValueError(f"arm {self.name}: only a trained arm has a teacher")


def ingredient(
    name: str, label: str, phrase: str, about: str, colour: Colour, marker: str, adapter: str = "", **more: Any
) -> Arm:
    """An arm with one ingredient more than `tell` or its control, trained where it is asked for by name.

    Args:
        adapter: of another arm; by default its own.
        more: as for `Arm`.
    """
    more = {"decides": True, "standard": False, "optional": 8, **more}
    return Arm(name, label, phrase, about, colour, marker, adapter=adapter or name, **more)
