"""Cells: a point of the grid, an arm and a seed, named by content, so that nothing is ever run twice.

Keys that have no effect on an arm are set to their defaults before the name is made: the untuned model is one cell for
all amounts of general data. Subsets by rows and tokens are nested by seed (`tell.data.subset`, `tell.mix.amount`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tell.config import (
    AnchorConfig,
    Config,
    EvalConfig,
    GeneralConfig,
    GenerateConfig,
    MixConfig,
    TrainConfig,
    make_config,
    override,
)
from tell.data.general import is_empty
from tell.errors import TellError
from tell.names import ARMS, TRAINED
from tell.run.claim import FREE as FREE_OF_RUNS
from tell.run.claim import KEYWORDS, PATHS, with_full_paths
from tell.run.task import anchor_of
from tell.score.benchmark_tasks import benchmark_tasks, local_files
from tell.score.scorer_code import find_scorer_code
from tell.studies.content import content_hash
from tell.studies.nested import dig, fill, nest
from tell.studies.recipe import Recipe, points
from tell.studies.separation_cells import SEPARATE, SEPARATION_FORMAT, contrasts

CELL_FORMAT = 1  # raise when a default, or what a run does with the same keys, changes its numbers
FREE = (*FREE_OF_RUNS, "train.checkpoint_every")  # change no number
RIDERS = {
    arm.name: arm.adapter for arm in ARMS.values() if arm.adapter not in (None, arm.name)
}  # an arm scored in the cell of another, whose adapter it uses
# Of the training settings, what also decides which rows are measured, and in what passes.
ROWS_TRAIN = frozenset({"max_length", "too_long", "nothing_to_train", "loss_on", "micro_tokens"})


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        name: ``<arm>-<16 hexadecimal digits>`` over all that its numbers depend on.
        arm: what it is about; its configuration may ask for a rider too. ``separate`` trains nothing.
        config: what `tell.tune` is called with, without ``out``.
        separate: options of `tell.verbs.separate.separate`, which is called instead.
    """

    name: str
    arm: str
    config: Config
    separate: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Row:
    """One line of a study's table: where its numbers are asked for, and the cell that has them."""

    point: dict[str, Any]
    arm: str
    seed: int
    cell: str

    def to_dict(self) -> dict[str, Any]:
        return {"point": self.point, "arm": self.arm, "seed": self.seed, "cell": self.cell}


def grid_of(recipe: Recipe, variables: Mapping[str, str], *, where: str = "recipe") -> tuple[list[Row], list[Cell]]:
    """Rows and cells of a study, seed by seed, so that the first whole curve comes early.

    Args:
        variables: the recipe's, and the folders of its built data sets.
        where: for errors.

    Raises:
        TellError: a value that a run refuses, or no cell at all.
    """
    rows: dict[str, Row] = {}
    cells: dict[str, Cell] = {}

    def add(row: Row) -> None:  # 3e4 and 30000 are one point, whichever product says it
        rows.setdefault(json.dumps([row.point, row.arm, row.seed], sort_keys=True), row)

    base = fill(recipe.config, variables)
    for seed in recipe.seeds:
        for raw, arms in points(recipe, seed):
            nested: Mapping[str, Any] = base
            for key, value in raw.items():
                nested = override(nested, nest(key, fill(value, variables)))
            config = with_full_paths(make_config({**nested, "seed": seed}, where=where))
            point = {key: _shown(config, key, value) for key, value in raw.items()}
            for arm in arms:
                lead = RIDERS.get(arm, arm) if RIDERS.get(arm) in arms else arm
                if lead == "general" and is_empty(config.general):
                    continue
                riders = [a for a in arms if RIDERS.get(a) == lead and a != arm] if lead == arm else [arm]
                cell = make_cell(config, lead, riders)
                cells.setdefault(cell.name, cell)
                add(Row(point, arm, seed, cell.name))
            if recipe.separate is not None:
                cell = separation_cell(config, recipe.separate.model_dump())
                cells.setdefault(cell.name, cell)
                for name in contrasts(config):
                    add(Row(point, name, seed, cell.name))
    if not rows:
        raise TellError("asks for no run at all", where=where, remedy="Add an arm besides general, or general data.")
    asked = {row.cell for row in rows.values()}  # of equal points, the first one's cells
    cells = {name: cell for name, cell in cells.items() if name in asked}
    # A model that changes from cell to cell would be loaded as often; a stable sort keeps all else in order.
    order = list(dict.fromkeys(cell.config.model.name for cell in cells.values()))
    return list(rows.values()), sorted(cells.values(), key=lambda cell: order.index(cell.config.model.name))


def _shown(config: Config, key: str, raw: Any) -> Any:
    """A value of the grid for tables: numbers as the run reads them (YAML takes 3e4 for text), else as written."""
    value = dig(config.model_dump(by_alias=True), key)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if value is None or isinstance(value, int | float) else raw


def make_cell(config: Config, arm: str, riders: Sequence[str] = ()) -> Cell:
    """The cell of an arm, with keys that have no effect on it at their defaults."""
    config = neutral(config, arm)
    config.eval.arms = (arm, *riders)
    if "icl" not in config.eval.arms:
        config.eval.icl_examples = EvalConfig().icl_examples
    return Cell(_name(arm, {"arms": config.eval.arms, "config": identity(config)}), arm, config)


def separation_cell(config: Config, options: Mapping[str, Any]) -> Cell:
    """The cell that compares hidden states, with keys that have no effect on it at their defaults."""
    config = neutral(config, "base+anchor")
    config.eval = EvalConfig(bootstrap=config.eval.bootstrap, arms=("base",))
    if config.anchor.text != "auto":  # else the model writes it, from these rows
        config.generate, config.task.rows, config.task.tokens = GenerateConfig(), None, None
    return Cell(
        _name(SEPARATE, {"separate": {**options, "format": SEPARATION_FORMAT}, "config": identity(config)}),
        SEPARATE,
        config,
        options,
    )


def _name(arm: str, parts: Mapping[str, Any]) -> str:
    data = {"format": CELL_FORMAT, **parts}
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return f"{arm}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def identity(config: Config) -> dict[str, Any]:
    """The keys that differ from their defaults, files and folders by their content.

    Defaults are left out, so that a key added to the configuration tomorrow leaves today's names as they are.
    """
    data = config.model_dump(mode="json", exclude_defaults=True)
    for key in FREE:
        section, _, last = key.rpartition(".")
        (data.get(section, {}) if section else data).pop(last, None)
    data = {key: value for key, value in data.items() if value != {}}
    if config.general.source == "auto":  # named although it is the default: the default was `self` once
        data.setdefault("general", {})["source"] = "auto"
    for (section, key), content in contents(config).items():
        named = {"name": config.task.scorer} if key == "scorer" else {}  # whose code decides as much as its name
        data[section][key] = {**named, "content": content}
    anchor = anchor_of(config)
    if anchor is not None:
        data["anchor"] = {"text": anchor.text} | ({"place": anchor.place} if anchor else {})
    return data


def inputs(config: Config) -> dict[tuple[str, str], Path]:
    """Files and folders that a configuration names, by (section, attribute)."""
    found: dict[tuple[str, str], Path] = {}
    for section, key in PATHS:
        value = getattr(getattr(config, section), key)
        if not isinstance(value, str) or value in KEYWORDS or (key == "text" and not value.startswith("@")):
            continue
        path = Path(value.removeprefix("@") if key == "text" else value)
        if path.exists():
            found[section, key] = path
    return found


def contents(config: Config) -> dict[tuple[str, str], str]:
    """What lies at `inputs`, and the code of a scorer of one's own, by (section, attribute).

    Of a folder of benchmarks the files of those asked for count, so that it may hold others too.
    """
    found = {}
    for place, path in inputs(config).items():
        if place != ("eval", "benchmark_data"):
            found[place] = content_hash(path)
        else:
            tasks = [task for group in benchmark_tasks(config.eval.benchmarks).values() for task in group]
            files = {task: local_files(task, path) for task in tasks}
            known = {task: {part: content_hash(file) for part, file in parts.items()} for task, parts in files.items()}
            found[place] = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    if (code := find_scorer_code(config.task.scorer)) is not None:
        found["task", "scorer"] = code.content
    return found


def changed_inputs(config: Config, before: Mapping[tuple[str, str], str]) -> list[str]:
    """Files, folders and scorers of a configuration that are not what they were, as it names them."""
    try:
        now = contents(config)
    except (OSError, TellError):  # what is gone has changed
        now = {}
    places = [place for place in {**before, **now} if before.get(place) != now.get(place)]
    return [str(getattr(getattr(config, section), key)) for section, key in places]


def neutral(config: Config, arm: str) -> Config:
    """A copy in which every key that has no effect on an arm has its default."""
    out = config.model_copy(deep=True)
    written = config.anchor.text == "auto"  # from the task rows, by the model
    alone = arm in ("base", "base+anchor", "icl", "sft")  # without general data
    if alone or is_empty(config.general):
        kept = {"source": config.general.source, "columns": config.general.columns}  # rows held out come from there
        out.general = GeneralConfig(**kept, tokens=0)
    elif config.general.source not in ("auto", "self"):
        out.general.self_ = GeneralConfig().self_
    if arm not in {*TRAINED, *RIDERS}:
        out.preset = Config().preset
        out.train = TrainConfig(**{key: getattr(config.train, key) for key in ROWS_TRAIN})
    if alone:
        out.mix, out.max_minutes = MixConfig(), None
    elif arm == "sft-matched":
        out.mix.order = MixConfig().order
    elif arm == "general":
        out.mix.repeat = None
    if not config.eval.benchmarks:
        out.eval.benchmark_data = None
    if arm == "base":
        out.anchor = AnchorConfig(text="none")
    elif not written:
        out.anchor = AnchorConfig(text=config.anchor.text, place=config.anchor.place)
    without_rows = arm in ("base", "base+anchor", "general") and not (
        (arm != "base" and written) or (arm == "general" and config.general.by_task)
    )
    # Without a limit of its own, an answer may be half as long again as the longest training answer.
    if without_rows and config.generate.max_new_tokens is not None:
        if (out.task.rows, out.task.tokens) != (None, None) and out.train.too_long == "refuse":
            out.train.too_long = "drop"  # all rows are looked at, not those of the budget alone
        out.task.rows = out.task.tokens = None
    return out
