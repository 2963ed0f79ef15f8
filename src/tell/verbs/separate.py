"""`tell separate`: how far hidden states of task and general queries are apart, without and with the anchor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tell.anchor.anchor import Anchor
from tell.anchor.separation import CONTRASTS, FEWEST, Separation, length_hits, separate_states, tsne
from tell.config import Config
from tell.data.example import Example
from tell.data.general import is_given
from tell.errors import TellError
from tell.files import write_json
from tell.folder import RunFolder
from tell.progress import Display, Silent
from tell.rows.tokenize import prompt_ids
from tell.run.answers import check_prompts
from tell.run.choose_anchor import choose_anchor
from tell.run.session import ModelCache, Session
from tell.run.task import Task, anchor_of, load_task, place_anchor
from tell.score.intervals import difference
from tell.score.means import mean_metric
from tell.seeds import permutation
from tell.verbs.hidden_states import (
    QUERIES,
    general_queries,
    jackknifed,
    layer_numbers,
    separation_numbers,
    share,
)
from tell.verbs.open_run import open_run

if TYPE_CHECKING:
    from tell.train.states import State


@dataclass(frozen=True)
class Comparison:
    """The hidden states to compare.

    Attributes:
        layer: a number (0: the embeddings), ``middle`` or ``all``; the figure shows the middle one of those requested.
        queries: rows of each group, fewer where there are fewer.
        state: of the last token of the prompt, which the template fixes, or the mean over all its tokens.
        match_length: choose general queries of the task queries' lengths in tokens, instead of a random sample.
        adapter: an arm of the run whose adapter is applied.
    """

    layer: str = "middle"
    queries: int = QUERIES
    state: State = "last"
    match_length: bool = False
    adapter: str | None = None


def separate(
    config: Config,
    *,
    run: str | Path | None = None,
    compare: Comparison = Comparison(),
    out: str | Path | None = None,
    overwrite: bool = False,
    display: Display | None = None,
    models: ModelCache | None = None,
) -> dict:
    """Separation of task and general queries in hidden states, without and with the anchor (the paper's figures 3, 4).

    The control puts the anchor on other general queries: what separates these from general ones is the prefix, not
    the task.

    Args:
        config: task data, anchor (``auto`` is the run's, or written by the model) and general source; without one, the
            general probe's prompts.
        run: the folder `config` is of; its test rows are the queries then, else all rows of the data. Only
            ``config.model.trust_remote_code`` allows code of the model, not the folder.
        compare: which states.
        out: folder for ``separation.json``, ``separation.svg`` and ``separation.png``.
        models: keeps the loaded model for the next call.

    Returns:
        The content of ``separation.json``: ``layers``, by number, with ``probe``, ``silhouette`` and ``mmd2`` of each
        of `CONTRASTS` and what the anchor adds; ``length``, the probe on token counts alone; ``picture``.

    Raises:
        TellError: bad data, model, layer or arm; a missing extra.
    """
    display, files = display or Silent(), _output(out, overwrite)
    if compare.adapter is not None and run is None:
        raise TellError("an adapter needs its run", where="--adapter", remedy="Pass a run folder instead of data.")
    given = is_given(config.general)
    if not given:
        display.note("no general source given: TELL's own general prompts are used")
    opened = open_run(run, trust_remote_code=config.model.trust_remote_code) if run is not None else None
    place = opened.adapter(compare.adapter) if opened is not None and compare.adapter is not None else None
    task = load_task(config, display)
    layers = layer_numbers(compare.layer, task.files.architecture.layers)
    session = Session(task.files, task.config, task.chat, display, models=models or ModelCache(), stream=True)
    session.load()
    anchor = anchor_of(config)
    if anchor is None:
        anchor = opened.anchor if opened else choose_anchor(task, session)[0]
    anchor = place_anchor(task, anchor)
    rows = task.test if run is not None else [*task.train, *task.validation, *task.test]
    prompts = _prompts(task, anchor, rows, compare)
    n = len(prompts["task"])
    if n < compare.queries:
        display.note(f"{n} queries of each group: there are no more")
    states = _states(session, prompts, layers, place, compare)
    contrasts = {name: pair for name, pair in CONTRASTS.items() if pair[0] in prompts}
    tokens = {name: np.array([len(ids) for ids in rows]) for name, rows in prompts.items()}
    result: dict[str, Any] = {
        "model": task.files.name,
        "adapter": compare.adapter,
        "task": config.task.data,
        "general": config.general.source if given else "written for TELL",
        "anchor": anchor.to_dict(),
        "state": compare.state,
        "queries": n,
        "match_length": compare.match_length,
        "seed": config.seed,
        "chance": 0.5,
        "tokens": {name: float(np.median(lengths)) for name, lengths in tokens.items()},
        "length": {
            name: share(length_hits(tokens[a], tokens[b], seed=config.seed), config)
            for name, (a, b) in contrasts.items()
        },
        "layers": _layers(states, layers, contrasts, config, display),
    }
    shown = len(layers) // 2
    result["notices"] = _notices(result, str(layers[shown]))
    if files:
        pairs = {name: (states[a][shown], states[b][shown]) for name, (a, b) in contrasts.items()}
        _draw(result, layers[shown], pairs, files)
    return result


def _states(
    session: Session, prompts: dict[str, list[list[int]]], layers: list[int], place: Path | None, compare: Comparison
) -> dict[str, np.ndarray]:
    """(layers, rows, width) hidden states of each group."""
    from tell.train.states import hidden_states

    micro_tokens = session.config.train.micro_tokens
    with (
        session.adapter(place),
        session.display.bar("hidden states", sum(map(len, prompts.values())), "queries") as advance,
    ):
        return {
            name: hidden_states(
                session.model, ids, layers, progress=advance, states=(compare.state,), micro_tokens=micro_tokens
            )[0]
            for name, ids in prompts.items()
        }


def _layers(
    states: dict[str, np.ndarray],
    layers: list[int],
    contrasts: dict[str, tuple[str, str]],
    config: Config,
    display: Display,
) -> dict[str, dict]:
    """The numbers of each layer, by its number as text."""
    out = {}
    with display.bar("separation", len(layers) * len(contrasts), "comparisons") as advance:
        for k, number in enumerate(layers):
            found: dict[str, Separation] = {}
            for name, (a, b) in contrasts.items():
                found[name] = separate_states(states[a][k], states[b][k], seed=config.seed)
                advance(1)
            out[str(number)] = _numbers(found, config)
    return out


def _draw(result: dict, layer: int, pairs: dict[str, tuple[np.ndarray, np.ndarray]], files: Path) -> None:
    """Add the picture of one layer, and write all to the folder."""
    from tell.verbs.separation_figure import draw

    places = {name: tsne(a, b, seed=result["seed"]) for name, (a, b) in pairs.items()}
    result["picture"] = {
        "layer": layer,
        "places": {name: np.round(xy.astype(float), 3).tolist() for name, xy in places.items()},
    }
    draw(result, files)
    write_json(RunFolder(files).separation("json"), result)


def _prompts(task: Task, anchor: Anchor, rows: Sequence[Example], compare: Comparison) -> dict[str, list[list[int]]]:
    """Token ids of the queries of each group, as the model's template renders them; all groups of one size.

    Data published with its instruction at the head has it removed where queries go without the anchor.

    Raises:
        TellError: too few rows, or one too long.
    """
    order = permutation(len(rows), task.config.seed, "separate", "task")[: compare.queries]
    chosen = [rows[int(i)] for i in order]
    check_prompts(task.chat, anchor, chosen, task.files.architecture.max_positions)
    bare = [replace(e, messages=anchor.remove(e.messages)) for e in chosen]
    alone = [prompt_ids(task.chat, e) for e in bare]
    lengths = [len(ids) for ids in alone for _ in range(2)] if compare.match_length else None
    general = general_queries(task, most=2 * len(chosen), anchor=anchor, lengths=lengths)
    n = min(len(chosen), len(general) // 2)
    if n < FEWEST:
        raise TellError(
            f"{len(chosen)} task and {len(general)} general queries",
            where=str(task.config.task.data),
            remedy=f"Give at least {FEWEST} task and {2 * FEWEST} general rows.",
        )
    groups = {"task": alone[:n], "general": [prompt_ids(task.chat, e) for e in general[0 : 2 * n : 2]]}
    if anchor:
        groups["task + anchor"] = [prompt_ids(task.chat, e, anchor) for e in chosen[:n]]
        groups["general + anchor"] = [prompt_ids(task.chat, e, anchor) for e in general[1 : 2 * n : 2]]
    return groups


def _numbers(found: dict[str, Separation], config: Config) -> dict:
    """Numbers of one layer: each contrast, and what the anchor adds, paired over the same queries."""
    out: dict[str, Any] = {name: separation_numbers(value, config) for name, value in found.items()}
    if "with anchor" in found:
        rule = {"seed": config.seed, "samples": config.eval.bootstrap}
        after, before = found["with anchor"], found["without anchor"]
        out["with - without"] = {
            "probe": difference(mean_metric(after.hits), mean_metric(before.hits), **rule),
            "silhouette": jackknifed(
                after.silhouettes.mean() - before.silhouettes.mean(),
                after.silhouettes_without - before.silhouettes_without,
            ),
        }
    return out


def _notices(result: dict, layer: str) -> list[str]:
    """Caveats of the numbers, as notices."""
    length, numbers = result["length"], result["layers"][layer]
    notices = []
    for name, found in length.items():
        if found["ci"][0] > result["chance"]:
            notices.append(f"{name}: token length alone tells the groups apart in {found['value']:.0%} (chance 50%)")
    if "control" in numbers:
        probe = numbers["control"]["probe"]
        what = "separates too" if probe["ci"][0] > result["chance"] else "separates nothing"
        notices.append(f"control: on general queries the anchor {what}, probe {probe['value']:.0%} at layer {layer}")
    return notices


def _output(out: str | Path | None, overwrite: bool) -> Path | None:
    """The checked folder to write to.

    Raises:
        TellError: it is a file, or has results already.
    """
    if out is None:
        return None
    folder = Path(out)
    if folder.is_file():
        raise TellError("is a file", where=f"--out {folder}", remedy="Name a folder.")
    if RunFolder(folder).separation("json").exists() and not overwrite:
        raise TellError("already has results", where=f"--out {folder}", remedy="Name another, or add --overwrite.")
    return folder
