"""search.json: what a search tried and chose for each arm."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, field_validator

from tell.config import Config
from tell.folder import RunFolder
from tell.nested import nest
from tell.overrides import override
from tell.run.arms import REPEAT, Chosen

RATE, GENERAL = "train.learning_rate", "general.rows"
CHOOSABLE = (RATE, REPEAT, GENERAL, "generate.closed", "generate.readout_weight")


class SearchedArm(BaseModel):
    """The search of one arm, as in search.json.

    Attributes:
        chosen: dotted keys that replace the run's; empty where the usual settings stay.
        tried: settings, fold, value of the metric, and loss on held-out general rows where it was measured.
        why: one sentence.
    """

    chosen: dict[Literal[CHOOSABLE], float | int | str]  # type: ignore[valid-type]  # pydantic reads the values
    metric: str
    tried: list[dict[str, Any]]
    why: str
    seconds: float

    @field_validator("chosen")
    @classmethod
    def _valid(cls, chosen: dict[str, Any]) -> dict[str, Any]:
        """The folder may be somebody else's: values that a configuration does not take are damage."""
        data: dict[str, Any] = {}
        for key, value in chosen.items():
            data = override(data, nest(key, value))
        Config.model_validate(data)
        return chosen


class SearchRecord(BaseModel):
    """search.json."""

    arms: dict[str, SearchedArm] = {}


def chosen_settings(folder: RunFolder) -> Chosen:
    """What the search of a run chose for each arm; empty where nothing was searched."""
    if not folder.search.exists():
        return {}
    return {arm: found.chosen for arm, found in folder.read_as(folder.search, SearchRecord).arms.items()}
