"""The arms of a run: which are requested, which are trained, and what each is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tell.config import Config
from tell.config_sections import TrainConfig
from tell.data.general import is_empty
from tell.errors import TellError
from tell.mix.amount import Draw
from tell.mix.mixture import GENERAL, PSEUDO, TASK, Mixture, build, build_counted, build_repeated
from tell.names import ARMS, TRAINED, arm_order
from tell.nested import dig, nest
from tell.overrides import override
from tell.presets import repeat_for
from tell.rows.row_table import RowTable
from tell.run.exemplars import Exemplars
from tell.run.general_rows import General

if TYPE_CHECKING:
    from tell.run.pseudo_rows import Pseudo

AMOUNTS = frozenset({"mix.pseudo"})
"""Keys that an arm sets only where the run leaves them off: how much of an ingredient the arms have that have any."""
Tables = Mapping[str, RowTable]


@dataclass(frozen=True)
class Ingredients:
    """Ingredients of a mixture: the task's rows, the general rows drawn for them, the teacher's, and the settings.

    Attributes:
        searched: the settings are a search's.
        exemplars: puts task rows into the prompts of others; None: none are wanted.
        pseudo: pseudo-labelled rows; None: none are wanted.
    """

    config: Config
    table: RowTable
    general: General | None
    draw: Draw | None
    searched: bool = False
    exemplars: Exemplars | None = None
    pseudo: Pseudo | None = None

    @property
    def tables(self) -> dict[str, RowTable]:
        """By source."""
        general = {} if self.general is None else {GENERAL: self.general.table}
        return {TASK: self.table} | general | ({} if self.pseudo is None else {PSEUDO: self.pseudo.table})

    @property
    def repeat(self) -> int:
        """How often each task row occurs in the mixture."""
        return self.config.mix.repeat or repeat_for(len(self.table))

    @property
    def pseudo_rows(self) -> int:
        """Pseudo-labelled rows in the mixture: each half as often as a task row, since its answer may be wrong."""
        return 0 if self.pseudo is None else len(self.pseudo.table) * -(-self.repeat // 2)


def _mixed(made: Ingredients, _: Mixture | None) -> tuple[Tables, Mixture]:
    mix = made.config.mix
    tables = made.tables
    return tables, build(tables, general=made.draw, repeat=made.repeat, ordering=mix.order, seed=made.config.seed)


def _task(made: Ingredients, _: Mixture | None) -> tuple[Tables, Mixture]:
    return {"task": made.table}, build_repeated(made.table, len(made.table), made.config.seed)


def _task_matched(made: Ingredients, mixed: Mixture | None) -> tuple[Tables, Mixture]:
    if mixed is None:
        raise ValueError("as many rows as the mixture has, without the mixture")
    return {"task": made.table}, build_repeated(made.table, len(mixed), made.config.seed)


def _task_repeated(made: Ingredients, mixed: Mixture | None) -> tuple[Tables, Mixture]:
    """As often as a search chose, else as many rows as the mixture has."""
    rows = len(made.table) * made.config.mix.repeat if made.config.mix.repeat and made.searched else None
    if rows is None:
        return _task_matched(made, mixed)
    return {"task": made.table}, build_repeated(made.table, rows, made.config.seed)


def _general(made: Ingredients, _: Mixture | None) -> tuple[Tables, Mixture] | None:
    if made.general is None or made.draw is None or not len(made.draw):
        return None
    tables, config = {"general": made.general.table}, made.config
    return tables, build(tables, general=made.draw, repeat=1, ordering=config.mix.order, seed=config.seed)


def _pseudo(made: Ingredients, _: Mixture | None) -> tuple[Tables, Mixture] | None:
    if not (rows := made.pseudo_rows):
        return None
    mix, tables, seed = made.config.mix, made.tables, made.config.seed
    further = {PSEUDO: rows}
    return tables, build(tables, general=made.draw, repeat=made.repeat, ordering=mix.order, seed=seed, further=further)


def _pseudo_matched(made: Ingredients, mixed: Mixture | None) -> tuple[Tables, Mixture] | None:
    """As many rows as TELL's mixture, task and pseudo-labelled ones in the shares that `_pseudo` has of them."""
    if mixed is None:
        raise ValueError("as many rows as the mixture has, without the mixture")
    if not (rows := made.pseudo_rows):
        return None
    tables = {name: table for name, table in made.tables.items() if name != GENERAL}
    task = len(made.table) * made.repeat
    count = min(max(1, round(len(mixed) * task / (task + rows))), len(mixed) - 1)
    counts = {TASK: count, PSEUDO: len(mixed) - count}
    return tables, build_counted(tables, counts, ordering=made.config.mix.order, seed=made.config.seed)


MIXTURES: dict[str, Callable[[Ingredients, Mixture | None], tuple[Tables, Mixture] | None]] = {
    "mixed": _mixed,
    "task": _task,
    "task-matched": _task_matched,
    "task-repeated": _task_repeated,
    "general": _general,
    "pseudo": _pseudo,
    "pseudo-matched": _pseudo_matched,
}
"""What `tell.arm.Arm.mixture` stands for: tables and mixture by the ingredients and TELL's mixture; None: no rows."""

if missing := {ARMS[arm].mixture for arm in TRAINED} - MIXTURES.keys():
    raise ValueError(f"no way to make the mixtures {missing}")


LIKE_TELL = frozenset({"mixed", "pseudo"})
"""Mixtures of `tell` and of its variants with a further ingredient."""
Chosen = Mapping[str, Mapping[str, object]]
"""Dotted keys with the values that a search chose (`tell.run.search`), by the arm that was searched."""
REPEAT = "mix.repeat"


def arm_config(config: Config, arm: str, chosen: Chosen = {}) -> Config:  # noqa: B006  # never changed
    """The run's configuration with what the trained arm behind ``arm`` sets itself, and what a search chose for it.

    TELL with a further ingredient has what was chosen for `tell`, so that the two differ by the ingredient alone. An
    amount of `AMOUNTS` that the run sets is kept.
    """
    trained = ARMS[arm].adapter or arm
    inherited = chosen.get("tell", {}) if ARMS[trained].mixture in LIKE_TELL else {}
    settings = {**inherited, **ARMS[trained].settings, **chosen.get(trained, {})}
    if not settings:
        return config
    data = config.model_dump(by_alias=True)
    for key, value in settings.items():
        if key in AMOUNTS and dig(data, key):
            continue
        data = override(data, nest(key, value))
    return Config.model_validate(data)


def mixed_configs(config: Config) -> list[Config]:
    """The configurations of the requested arms whose training depends on the general rows."""
    return [arm_config(config, arm) for arm in trained_arms(wanted_arms(config)) if ARMS[arm].mixture != "task"]


def arm_mixtures(arms: Sequence[str], made: Callable[[str], Ingredients]) -> dict[str, tuple[Tables, Mixture]]:
    """Tables and mixture of TELL, which controls are matched to, and of each of ``arms`` that has rows.

    Args:
        made: the ingredients of an arm.
    """
    tell = make_mixture("mixed", made("tell"), None)
    if tell is None:
        raise ValueError("TELL has no rows")
    mixtures = {"tell": tell}
    for arm in arms:
        if arm not in mixtures and (found := make_mixture(str(ARMS[arm].mixture), made(arm), tell[1])) is not None:
            mixtures[arm] = found
    return mixtures


def make_mixture(name: str, made: Ingredients, tell: Mixture | None) -> tuple[Tables, Mixture] | None:
    """Tables and mixture of that name in `MIXTURES`, with the exemplars that are wanted; None: no rows."""
    found = MIXTURES[name](made, tell)
    if found is None or made.exemplars is None or name == "task":  # which repeats no row
        return found
    tables, mixture = found[0], made.exemplars.into(found[1])
    return {**tables, **mixture.tables}, mixture


def wanted_arms(config: Config) -> list[str]:
    """The requested arms, in the order of the tables, without repeats.

    Raises:
        TellError: no arm, or the arm `general` without general data.
    """
    arms = list(dict.fromkeys(config.eval.arms))
    if not arms:
        raise TellError("no arm is requested", where="eval.arms", remedy="Name at least one, e.g. --arms base,tell.")
    if is_empty(config.general) and (lost := [arm for arm in arms if ARMS[arm].mixture == "general"]):
        raise TellError(
            f"the arm {lost[0]} needs general data", where="--arms", remedy="Drop the arm, or set --general."
        )
    return arms


def twins(arms: Sequence[str], *, decides: bool = False, constrains: bool = False) -> dict[str, str]:
    """Arms that answer as another of them does, mapped to that one.

    Args:
        decides: closed fields are decided by the arms that do.
        constrains: answers are constrained by the arms ending in +schema, and by no other.
    """
    first: dict[tuple, str] = {}
    out = {}
    for arm in arm_order(arms):
        about = ARMS[arm]
        ways = (decides and about.decides, constrains and about.constrained)
        standing = first.setdefault((about.adapter, about.anchored, about.in_context, *ways), arm)
        if standing != arm:
            out[arm] = standing
    return out


def trained_arms(arms: Sequence[str]) -> list[str]:
    """The trained arms whose adapters `arms` answer with, each after its teacher."""
    adapters = [adapter for arm in arms if (adapter := ARMS[arm].adapter) is not None]
    return list(dict.fromkeys(arm for adapter in adapters for arm in (ARMS[adapter].teacher, adapter) if arm))


def lead_arm(arms: Sequence[str], mixtures: Mapping[str, object]) -> str | None:
    """The arm whose mixture, manifest and totals represent the run: `tell`, else the first that is trained."""
    trained = [arm for arm in trained_arms(arms) if arm in mixtures]
    return "tell" if "tell" in trained else next(iter(trained), None)


def same_runs(
    arms: Sequence[str], mixtures: Mapping[str, tuple[Tables, Mixture]], training: Callable[[str, Mixture], TrainConfig]
) -> dict[str, str]:
    """Arms that are trained on the same rows as another in the same order and in the same way, mapped to that arm.

    Without general rows, `tell` and `sft-matched` are. The leading arm represents the others.

    Args:
        training: the training settings of an arm over its mixture.
    """
    lead = lead_arm(arms, mixtures)
    trained = sorted((arm for arm in trained_arms(arms) if arm in mixtures), key=lambda arm: arm != lead)
    first: dict[tuple[str, str], str] = {}
    same = {}
    for arm in trained:
        mixture = mixtures[arm][1]
        standing = first.setdefault((mixture.digest(), _training(training(arm, mixture), mixture)), arm)
        if standing != arm:
            same[arm] = standing
    return same


def _training(settings: TrainConfig, mixture: Mixture) -> str:
    """How an arm is trained, which its mixture does not show; without what has no effect on such rows."""
    return settings.model_dump_json(exclude=set() if GENERAL in mixture.sources else {"general_target"})
