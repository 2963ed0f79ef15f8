"""The page's other sections: the request, losses, mixture, findings, anchor, how to run it again."""

from __future__ import annotations

from typing import Any

import numpy as np

from tell.arm import TASK_SOURCES
from tell.metric_names import metric
from tell.names import arm_order
from tell.number_text import is_number, show, show_count, show_duration, show_power
from tell.overrides import GENERAL_AMOUNTS
from tell.report.notices import run_notices
from tell.report.read_run import Manifest, Run, flatten, get, mapping, rows_of
from tell.report.svg import Scale, gaps, loss_chart, series_class, stream_figure

PAIR = ("a", "b", "similarity", "a_text", "b_text")
PAIRS, DROPPED = 20, 50
"""Most near-duplicate pairs and dropped rows listed; counts cover all of them."""


def facts(run: Run) -> list[tuple[str, str]]:
    """The run's request as (label, value), without unknown values."""
    general = get(run.config, "general", "source")
    amount = next(
        (f", {k} {v:g}" for k, v in mapping(run.config, "general").items() if k in GENERAL_AMOUNTS and is_number(v)), ""
    )
    split = mapping(run.findings, "split")
    rows = ", ".join(f"{split[k]:,} {label}" for k, label in SPLIT if is_number(split.get(k)))
    kind = mapping(run.findings, "kind")
    known = [
        ("Data", get(run.findings, "data", "path") or get(run.config, "task", "data")),
        ("Model", model_name(run)),
        ("Task", " – ".join(str(kind[k]) for k in ("name", "why") if kind.get(k))),
        ("Rows", rows),
        ("General data", f"{general}{amount}" if general else None),
        ("Preset", run.config.get("preset")),
        ("Date", run.date),
    ]
    return [(label, str(value)) for label, value in known if value]


SPLIT = (("train", "for training"), ("validation", "for validation"), ("test", "for testing"))


def model_name(run: Run) -> str | None:
    """The model the run names."""
    return get(run.config, "model", "name")


def data_name(run: Run) -> str:
    """The task data's file name without folder and endings, or its folder's if that is ``train`` or ``data``; else
    the run folder's name."""
    path = get(run.findings, "data", "path") or get(run.config, "task", "data")
    parts = [p for p in str(path or run.name).replace("\\", "/").split("/") if p not in ("", ".", "..")] or [run.name]
    stem = parts[-1].split(".")[0] or parts[-1]
    return parts[-2] if stem.lower() in ("train", "data", "dataset") and len(parts) > 1 else stem


def losses(run: Run) -> dict[str, object] | None:
    """A chart per trained arm on one loss axis, and the legend."""
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for arm in arm_order(run.logs):
        by: dict[str, tuple[list[float], list[float]]] = {}
        for i, row in enumerate(run.logs[arm]):
            step = row["step"] if is_number(row.get("step")) else i + 1
            parts = mapping(row, "by_source") or {"all rows": row.get("loss")}
            for source, loss in parts.items():
                if is_number(loss):
                    steps, values = by.setdefault(str(source), ([], []))
                    steps.append(step)
                    values.append(float(loss))
        if by:
            curves[arm] = dict(sorted(by.items(), key=_task_first))
    every = [v for by in curves.values() for _, values in by.values() for v in values]
    if not every:
        return None
    top = float(np.quantile(every, 0.995))  # a single spike must not flatten the curves
    scale = Scale.over([top], hold=[0.0], number=5)
    charts = []
    for i, (arm, by) in enumerate(curves.items()):
        validation = get(run.metrics, "train", "arms", arm, "validation_loss")
        charts.append(
            {
                "arm": arm,
                "steps": int(max(step for steps, _ in by.values() for step in steps)),
                "validation": show(validation) if is_number(validation) else "",
                "svg": loss_chart(by, key=f"loss-{i}", title=f"Training loss of {arm} over steps, by source", y=scale),
            }
        )
    sources = {source: None for by in curves.values() for source in by}
    return {"charts": charts, "legend": [(s, series_class(s)) for s, _ in sorted(sources.items(), key=_task_first)]}


def _task_first(item: tuple[str, object]) -> tuple[bool, str]:
    return item[0] != "task", item[0]


def mixture(run: Run) -> dict[str, object] | None:
    """The drawn stream and the counts per source."""
    mixed = mapping(run.metrics, "mixture") if "mixture" in run.metrics else mapping(run.plan, "mixture")
    if not mixed and run.manifest is not None:
        mixed = counted(run.manifest)
    if not mixed:
        return None
    columns = [(k, label) for k, label in MIXTURE if mapping(mixed, k)]
    sources = list(dict.fromkeys(s for k, _ in columns for s in mixed[k]))
    out: dict[str, object] = {
        "columns": [label for _, label in columns],
        "rows": sorted(((s, [mixed[k].get(s) for k, _ in columns]) for s in sources), key=_task_first),
        "ratio": mixed.get("ratio"),
        "repeat": mixed.get("repeat"),
        "order": mixed.get("order"),
        "figure": None,
    }
    if run.manifest is not None and len(run.manifest.source):
        task = np.isin(run.manifest.source, TASK_SOURCES)
        out["figure"], out["how"] = stream_figure(task, run.manifest.step)
        out["gaps"] = gaps(task)
    return out


MIXTURE = (
    ("rows", "Rows"),
    ("unique_rows", "Different rows"),
    ("tokens", "Tokens"),
    ("trained_tokens", "Trained tokens"),
    ("unit_tokens", "Tokens as counted for the ratio"),
)


def counted(manifest: Manifest) -> dict[str, Any]:
    """The mixture's counts from the manifest alone, where the run has no ``metrics.json``."""
    names = [str(s) for s in dict.fromkeys(manifest.source)]
    masks = {name: manifest.source == name for name in names}
    out: dict[str, Any] = {
        "rows": {n: int(m.sum()) for n, m in masks.items()},
        "unique_rows": {n: len(set(manifest.hash[m])) for n, m in masks.items()} if any(manifest.hash) else {},
    }
    for key, column in (("tokens", "tokens"), ("trained_tokens", "trained"), ("unit_tokens", "unit")):
        if column in manifest.numbers:
            out[key] = {n: int(manifest.numbers[column][m].sum()) for n, m in masks.items()}
    return out


def findings(run: Run) -> dict[str, object]:
    """Overlap, dropped rows, notices."""
    overlap = []
    for key, label in (("train_test", "training and test rows"), ("general_test", "general and test rows")):
        if entry := mapping(run.findings, "overlap", key):
            pairs = [{k: p.get(k, "") for k in PAIR} for p in rows_of(entry, "pairs") if isinstance(p, dict)]
            counts = {k: entry.get(k) for k in ("exact", "near")} | {"hidden": max(0, len(pairs) - PAIRS)}
            overlap.append({"label": label, "pairs": pairs[:PAIRS], **counts})
    left_out = rows_of(run.findings, "dropped_rows")
    dropped = [{k: r.get(k, "") for k in ("origin", "reason")} for r in left_out if isinstance(r, dict)]
    return {
        "overlap": overlap,
        "overlap_dropped": get(run.findings, "overlap", "dropped"),
        "duplicates": get(run.findings, "split", "exact_duplicates_removed"),
        "dropped": dropped[:DROPPED],
        "dropped_count": len(dropped),
        "notices": run_notices(run.findings, run.config) if run.findings else [],
    }


def anchor(run: Run) -> dict[str, object] | None:
    """The anchor with its candidates and every column that was recorded of them."""
    if not run.anchor:
        return None
    candidates = [c for c in rows_of(run.anchor, "candidates") if isinstance(c, dict)]
    columns = [k for k in dict.fromkeys(k for c in candidates for k in c) if k != "text"]
    text = run.anchor.get("text")
    rows = [
        {"text": c.get("text"), "chosen": c.get("text") == text, "values": [_value(c.get(k)) for k in columns]}
        for c in candidates
    ]
    return {
        "text": text or "",
        "place": run.anchor.get("place"),
        "origin": ORIGINS.get(str(run.anchor.get("origin")), run.anchor.get("origin")),
        "hash": run.anchor.get("hash"),
        "columns": [c.replace("_", " ") for c in columns],
        "rows": rows,
    }


def search(run: Run) -> list[dict[str, object]]:
    """The settings that were tried on folds of the task rows, for each arm that was searched."""
    found = []
    for arm, one in mapping(run.search, "arms").items():
        tried = [entry for entry in rows_of(one, "tried") if isinstance(entry, dict)]
        for entry in tried:
            if all(is_number(fold) for fold in rows_of(entry, "folds")):
                entry["folds"] = [fold + 1 for fold in rows_of(entry, "folds")]  # people count from one
        keys = dict.fromkeys(key for entry in tried for key in entry if key != "value")
        columns = [key for key in keys if any(entry.get(key) not in (None, USUAL.get(key)) for entry in tried)]
        unit = metric(str(get(one, "metric"))).unit
        rows = [([_value(entry.get(key)) for key in columns], show(entry.get("value"), unit)) for entry in tried]
        labels = [SEARCHED.get(key, key) for key in columns]
        label = metric(str(get(one, "metric"))).label
        found.append({"arm": arm, "why": get(one, "why", default=""), "columns": labels, "metric": label, "rows": rows})
    return found


USUAL = {"general": 1.0}  # a column of it alone says nothing
SEARCHED = {
    "train.learning_rate": "Learning rate",
    "mix.repeat": "Repetitions",
    "general": "Share of the general rows",
    "folds": "Folds held out",
    "general_loss": "Loss on held-out general rows",
    "generate.closed": "Closed fields",
    "generate.readout_weight": "Weight of the readout",
}
ORIGINS = {
    "hand": "written by hand",
    "self": "written by the model itself",
    "derived": "composed from the schema or the labels",
    "none": "none",
}


def again(run: Run) -> dict[str, object]:
    """Everything needed to reproduce the run."""
    computed = mapping(run.findings, "computed")
    told = {str(value) for value in computed.values()}
    machine = {k: v for k, v in flatten(mapping(run.findings, "machine")).items() if str(v) not in told}
    arms = mapping(run.metrics, "train", "arms")
    keys = [(k, label, show) for k, label, show in TRAIN if any(get(a, k) is not None for a in arms.values())]
    return {
        "command": run.findings.get("command"),
        "versions": list(mapping(run.findings, "versions").items()),
        "computed": "; ".join(f"{k}: {v}" for k, v in computed.items()),
        "machine": [(k.replace("_", " "), _value(v)) for k, v in machine.items()],
        "seed": run.config.get("seed"),
        "config": run.config_text,
        "digest": run.manifest.digest if run.manifest else None,
        "anchor": run.anchor.get("hash"),
        "columns": [label for _, label, _ in keys],
        "train": [(a, [show(get(arms, a, k)) for k, _, show in keys]) for a in arm_order(arms)],
    }


TRAIN = (
    ("steps", "Steps", show_count),
    ("tokens", "Tokens", show_count),
    ("trained_tokens", "Trained tokens", show_count),
    ("flops", "FLOPs", show_power),
    ("seconds", "Time", show_duration),
    ("learning_rate", "Learning rate", lambda v: f"{v:g}" if is_number(v) else "–"),
    ("validation_loss", "Validation loss", show),
)


def _value(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return str(value)
