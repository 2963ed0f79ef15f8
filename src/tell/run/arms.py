"""The arms of a run: which are asked for, which are trained, and what each is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tell.config import TRAINED_ARMS, Config
from tell.errors import TellError
from tell.mix.amount import Draw
from tell.mix.mixture import Mixture, build, build_repeated
from tell.presets import repeat_for
from tell.rows.row_table import RowTable
from tell.run.general_rows import General

ADAPTED = TRAINED_ARMS | {"tell-anchor"}


def arm_mixtures(
    config: Config, table: RowTable, general: General | None, draw: Draw | None
) -> dict[str, tuple[dict[str, RowTable], Mixture]]:
    """Tables and mixture of every arm that trains. An arm is a mixture, nothing else."""
    seed, mix = config.seed, config.mix
    tables = {"task": table}
    if general is not None:
        tables["general"] = general.table
    tell = build(tables, general=draw, repeat=mix.repeat or repeat_for(len(table)), ordering=mix.order, seed=seed)
    arms = {"tell": (tables, tell)}
    only_task = {"task": table}
    arms["sft"] = (only_task, build_repeated(table, len(table), seed))
    arms["sft-matched"] = (only_task, build_repeated(table, len(tell), seed))
    if general is not None and draw is not None and len(draw):
        only_general = {"general": general.table}
        arms["general"] = (only_general, build(only_general, general=draw, repeat=1, ordering=mix.order, seed=seed))
    return arms


def wanted_arms(config: Config) -> list[str]:
    """The arms asked for, in the order of the tables, without repeats.

    Raises:
        TellError: no arm, or the arm `general` without general data.
    """
    arms = [arm for arm in dict.fromkeys(config.eval.arms)]
    if not arms:
        raise TellError("no arm is asked for", where="eval.arms", remedy="Name at least one, e.g. --arms base,tell.")
    if "general" in arms and config.general.empty:
        raise TellError("the arm general needs general data", where="--arms", remedy="Drop the arm, or set --general.")
    return arms


def trained_arms(arms: Sequence[str]) -> list[str]:
    """The adapters that `arms` answer with: `tell-anchor` is scored with TELL's."""
    return list(dict.fromkeys("tell" if arm == "tell-anchor" else arm for arm in arms if arm in ADAPTED))


def lead_arm(arms: Sequence[str], mixtures: Mapping[str, object]) -> str | None:
    """The arm that a run's mixture, manifest and totals tell of: `tell`, else the first that is trained."""
    trained = [arm for arm in trained_arms(arms) if arm in mixtures]
    return "tell" if "tell" in trained else next(iter(trained), None)


def same_runs(arms: Sequence[str], mixtures: Mapping[str, tuple[dict[str, RowTable], Mixture]]) -> dict[str, str]:
    """Arms that are trained on the very rows of another, in the same order, and which: they are one run.

    Without general rows, `tell` and `sft-matched` are. The leading arm stands for the others.
    """
    lead = lead_arm(arms, mixtures)
    trained = sorted((arm for arm in trained_arms(arms) if arm in mixtures), key=lambda arm: arm != lead)
    first: dict[str, str] = {}
    same = {}
    for arm in trained:
        standing = first.setdefault(mixtures[arm][1].digest(), arm)
        if standing != arm:
            same[arm] = standing
    return same
