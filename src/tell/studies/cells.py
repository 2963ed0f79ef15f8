"""Cells: an arm at a point of the grid with a seed, named by a hash of everything its numbers depend on.

Keys without effect on an arm are set to their defaults before hashing: the untuned model is one cell for all amounts of
general data. Subsets by rows and tokens are nested by seed (`tell.data.subset`, `tell.mix.amount`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tell.config import Config, make_config
from tell.config_sections import (
    AnchorConfig,
    ArmName,
    EvalConfig,
    GeneralConfig,
    GenerateConfig,
    MixConfig,
    SearchConfig,
    TrainConfig,
)
from tell.data.general import SOURCES, general_target, is_builtin, is_empty
from tell.data.workbook import split_sheet, with_sheet
from tell.errors import TellError
from tell.models.find import SMOLLM2
from tell.models.wheel import HUB_NAME
from tell.names import ARMS
from tell.nested import dig, fill, nest
from tell.overrides import override
from tell.run.arms import AMOUNTS, LIKE_TELL, arm_config
from tell.run.claim import FREE as FREE_OF_RUNS
from tell.run.claim import PATHS, is_keyword, with_full_paths
from tell.run.constrained import constrains
from tell.run.task import anchor_of
from tell.score.benchmark_tasks import benchmark_tasks, local_files
from tell.score.scorer_code import find_scorer_code
from tell.studies.content import content_hash
from tell.studies.recipe import Recipe, points
from tell.studies.separation_cells import SEPARATE, SEPARATION_FORMAT, contrasts

CELL_FORMAT = 1  # increment when a change to defaults or code changes numbers under the same keys
RATES = 2  # the same, where `learning_rate_for` changes for mixtures with general rows: only names of such cells change
FOREIGN_ROWS = 2  # the same, where what a model other than theirs makes of the built-in rows changes
FREE = (*FREE_OF_RUNS, "train.checkpoint_every")  # without effect on numbers
TASK_ALONE = ("task-matched", "task-repeated", "pseudo-matched")
"""Mixtures of the task's rows alone, in an amount that depends on the general rows of TELL's."""
RIDERS = {arm.name: arm.adapter for arm in ARMS.values() if arm.adapter and arm.adapter != arm.name}
"""Arms scored in the cell of the arm whose adapter they use."""
# Training settings that also affect which rows are measured, and in what batches.
ROWS_TRAIN = frozenset({"max_length", "too_long", "nothing_to_train", "loss_on", "micro_tokens"})


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        name: ``<arm>-<16 hexadecimal digits>``, a hash of everything its numbers depend on.
        arm: the arm it trains or evaluates; ``separate`` trains nothing.
        config: of `tell.tune`, without ``out``; its arms may include a rider.
        separate: options of `tell.verbs.separate.separate`, which is called instead.
    """

    name: str
    arm: str
    config: Config
    separate: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Row:
    """One row of a study: a point, an arm and a seed, with the cell that has their numbers."""

    point: dict[str, Any]
    arm: str
    seed: int
    cell: str

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


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
    for row, cell in _every(recipe, variables, where):
        cells.setdefault(cell.name, cell)  # and of equal points (3e4 and 30000) the first one's row
        rows.setdefault(json.dumps([row.point, row.arm, row.seed], sort_keys=True), row)
    if not rows:
        raise TellError("requests no run", where=where, remedy="Add an arm besides general, or general data.")
    used = {row.cell for row in rows.values()}
    # Group by model, which is loaded once for cells in a row; a stable sort keeps all else in order.
    kept = [cell for name, cell in cells.items() if name in used]
    order = list(dict.fromkeys(cell.config.model.name for cell in kept))
    return list(rows.values()), sorted(kept, key=lambda cell: order.index(cell.config.model.name))


def _every(recipe: Recipe, variables: Mapping[str, str], where: str) -> Iterator[tuple[Row, Cell]]:
    """Each row with its cell, in the order of the recipe's products."""
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
                if ARMS[lead].mixture == "general" and is_empty(config.general):
                    continue
                riders = [a for a in arms if RIDERS.get(a) == lead]
                if config.search.minutes and str(ARMS[lead].mixture).endswith("-matched"):
                    raise TellError(
                        f"{lead} has as many steps as TELL, whose repetitions are searched in another cell",
                        where=where,
                        remedy="Use sft-tuned, which is searched itself, or search cells of tell alone.",
                    )
                cell = make_cell(config, lead, riders)
                yield Row(point, arm, seed, cell.name), cell
            if recipe.separate is not None:
                cell = separation_cell(config, recipe.separate.model_dump())
                for name in contrasts(config):
                    yield Row(point, name, seed, cell.name), cell


def _shown(config: Config, key: str, raw: object) -> object:
    """A value of the grid for tables: numbers as the run reads them (YAML reads 3e4 as text), else as written."""
    value = dig(config.model_dump(by_alias=True), key)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if value is None or isinstance(value, int | float) else raw


def make_cell(config: Config, arm: str, riders: Sequence[str] = ()) -> Cell:
    """The cell of an arm and of others with its adapter, keys without effect on them at their defaults."""
    config = neutral(config, arm, decides=any(ARMS[name].decides for name in (arm, *riders)))
    config.eval.arms = cast(tuple[ArmName, ...], (arm, *riders))
    if not any(ARMS[name].in_context for name in config.eval.arms):
        config.eval.icl_examples, config.eval.icl_select = EvalConfig().icl_examples, EvalConfig().icl_select
    parts: dict[str, Any] = {"arms": config.eval.arms, "config": identity(config)}
    mixture = ARMS[ARMS[arm].adapter or arm].mixture
    mixed = mixture in (*LIKE_TELL, "general") and not is_empty(config.general)
    if mixed and config.train.learning_rate is None:
        parts["rates"] = RATES
    counts = mixture not in (None, "task") and not is_empty(config.general)  # of SFT's steps too
    if counts and is_builtin(config.general) and config.model.name not in (SMOLLM2, HUB_NAME):
        parts["general"] = [FOREIGN_ROWS, general_target(config, wrote_builtin=False)]
    return Cell(_name(arm, parts), arm, config)


def separation_cell(config: Config, options: Mapping[str, Any]) -> Cell:
    """The cell that compares hidden states, keys without effect on it at their defaults."""
    config = neutral(config, "base+anchor", decides=False)
    config.eval = EvalConfig(bootstrap=config.eval.bootstrap, arms=("base",))
    if config.anchor.text != "auto":  # else the model writes it, from these rows
        config.generate, config.task.rows, config.task.tokens = GenerateConfig(), None, None
    name = _name(SEPARATE, {"separate": {**options, "format": SEPARATION_FORMAT}, "config": identity(config)})
    return Cell(name, SEPARATE, config, options)


def _name(arm: str, parts: Mapping[str, Any]) -> str:
    data = {"format": CELL_FORMAT, **parts}
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return f"{arm}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def identity(config: Config) -> dict[str, Any]:
    """The keys that differ from their defaults, files and folders by their content.

    Without defaults, a new key of the configuration leaves the names of today's cells as they are.
    """
    data = config.model_dump(mode="json", exclude_defaults=True)
    for key in FREE:
        section, _, last = key.rpartition(".")
        (data.get(section, {}) if section else data).pop(last, None)
    if config.train.general_target == "text":  # the default used to be `text`, which cells do not name
        del data["train"]["general_target"]
    data = {key: value for key, value in data.items() if value != {}}
    known = SOURCES.get(config.general.source)
    if known is not None and known.named is not None:
        data["general"]["revision"] = known.named.revision
    if config.general.source == "auto":  # the default used to be `self`, so this one is hashed too
        data.setdefault("general", {})["source"] = "auto"
    for (section, key), content in contents(config).items():
        named = {"name": config.task.scorer} if key == "scorer" else {}  # a scorer counts by name and code
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
        if not isinstance(value, str) or is_keyword(section, key, value):
            continue
        if key == "text" and not value.startswith("@"):
            continue
        path = Path(value.removeprefix("@") if key == "text" else split_sheet(value)[0])
        if path.exists():
            found[section, key] = path
    return found


def contents(config: Config) -> dict[tuple[str, str], str]:
    """Hashes of `inputs` and of a custom scorer's code, by (section, attribute).

    In a folder of benchmarks only the files of the requested ones count.
    """
    found = {}
    for place, path in inputs(config).items():
        if place != ("eval", "benchmark_data"):
            _, sheet = split_sheet(str(getattr(getattr(config, place[0]), place[1])))
            found[place] = with_sheet(content_hash(path), sheet)
        else:
            tasks = [task for group in benchmark_tasks(config.eval.benchmarks).values() for task in group]
            files = {task: local_files(task, path) for task in tasks}
            known = {task: {part: content_hash(file) for part, file in parts.items()} for task, parts in files.items()}
            found[place] = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    if (code := find_scorer_code(config.task.scorer)) is not None:
        found["task", "scorer"] = code.content
    return found


def changed_inputs(config: Config, before: Mapping[tuple[str, str], str]) -> list[str]:
    """Files, folders and scorers of a configuration whose content has changed, as it names them."""
    try:
        now = contents(config)
    except (OSError, TellError):  # a missing file has changed
        now = {}
    places = [place for place in {**before, **now} if before.get(place) != now.get(place)]
    return [str(getattr(getattr(config, section), key)) for section, key in places]


def neutral(config: Config, arm: str, *, decides: bool) -> Config:
    """A copy in which every key without effect on an arm has its default; ``decides``: closed fields are decided."""
    out = config.model_copy(deep=True)
    written = config.anchor.text == "auto"  # by the model, from the task rows
    own = ARMS[arm]
    trained_on = ARMS[own.adapter].mixture if own.adapter else None
    alone = trained_on in (None, "task")  # without general data
    if alone or is_empty(config.general):
        kept = {"source": config.general.source, "columns": config.general.columns}  # of the held-out rows
        out.general = GeneralConfig(**kept, tokens=0)
    elif config.general.source not in ("auto", "self"):
        out.general.self_ = GeneralConfig().self_
    if alone or trained_on in TASK_ALONE or is_empty(config.general):
        out.train.general_target = TrainConfig().general_target
    if trained_on is None:
        out.preset = Config().preset
        out.train = TrainConfig(**{key: getattr(config.train, key) for key in ROWS_TRAIN})
    if alone:
        out.mix, out.max_minutes = MixConfig(), None
    elif trained_on in ("task-matched", "task-repeated"):
        out.mix.order = MixConfig().order
    elif trained_on == "general":
        out.mix.repeat, out.mix.exemplars = None, MixConfig().exemplars
    for key in ARMS[own.adapter].settings if own.adapter else ():  # the arm's own are taken instead
        section, _, name = key.partition(".")
        if key not in AMOUNTS and not (section == "train" and name in ROWS_TRAIN):
            setattr(getattr(out, section), name, getattr(getattr(Config(), section), name))
    taught = own.adapter is not None and ARMS[own.adapter].teacher is not None  # by answers with closed fields decided
    if taught and own.adapter:
        out.mix.pseudo = arm_config(config, own.adapter).mix.pseudo
    else:
        out.mix.pseudo, out.task.unlabelled = MixConfig().pseudo, None
    if not (decides or taught) or config.generate.closed == "off":
        out.generate.closed, out.generate.readout_weight = "off", GenerateConfig().readout_weight
    if not (own.adapter and any(ARMS[one].searched for one in (own.adapter, ARMS[own.adapter].teacher) if one)):
        out.search = SearchConfig()
    if not config.eval.benchmarks:
        out.eval.benchmark_data = None
    if not own.anchored and own.adapter is None:
        out.anchor = AnchorConfig(text="none")
    elif not written:
        out.anchor = AnchorConfig(text=config.anchor.text, place=config.anchor.place)
    without_rows = (trained_on == "general" or (own.adapter is None and not own.in_context)) and not (
        (own.anchored and written)
        or (trained_on == "general" and config.general.by_task)
        or constrains(config, arm)  # to what the training answers look like
    )
    # Without a set limit, an answer may be 1.5 times as long as the longest training answer.
    if without_rows and config.generate.max_new_tokens is not None:
        if (out.task.rows, out.task.tokens) != (None, None) and out.train.too_long == "refuse":
            out.train.too_long = "drop"  # all rows are checked, not only those of the budget
        out.task.rows = out.task.tokens = None
    return out
