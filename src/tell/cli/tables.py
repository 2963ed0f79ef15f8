"""Tables printed at the end: the plan, the arms with intervals, answers side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tell.cli.display import clock, short
from tell.config import read_yaml
from tell.files import read_jsonl
from tell.folder import RunFolder
from tell.metric_names import ANSWER_LOSS, HELD_OUT, METRICS, MetricSpec, metric
from tell.number_text import as_typed, factor, has_interval, show
from tell.report.notices import run_notices
from tell.report.score_tables import CONSTANT
from tell.shown import brief, clean, left_out

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

METRICS_SHOWN, LABELS_SHOWN = 3, 4
ANSWER_LENGTH, PROMPT_LENGTH = 400, 150  # characters


def plan_box(plan: dict) -> RenderableType:
    """``plan.json`` as a panel: sources, steps, cost, notices."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    mix, train, predicted = plan["mixture"], plan["train"], plan["predicted"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for title in ("rows", "unique", "tokens raw", "templated", "trained", "per step"):
        table.add_column(title, justify="right")
    for source, rows in mix["rows"].items():
        cells = (rows, *(mix[key].get(source, 0) for key in ("unique_rows", "unit_tokens", "tokens", "trained_tokens")))
        per_step = train["examples_per_step"].get(source)
        table.add_row(source, *(f"{cell:,.0f}" for cell in cells), "" if per_step is None else f"{per_step:.2f}")
    ratio = mix.get("ratio")
    base = f", base weights in {plan['model']['base']}" if "base" in plan["model"] else ""
    lines = [
        f"{plan['model']['name']} ({short(plan['model']['parameters'])} parameters{base}), "
        f"{plan['task']['kind']} task, {plan['task']['test_rows']:,} test rows",
        f"order {mix['order']}, task rows x {mix['repeat']}"
        + (f", general:task {ratio:.3g} by tokens" if ratio is not None else ""),
        f"{train['steps']:,} steps of {train['batch_size']}, {short(train['tokens'])} tokens, "
        f"{train['flops']:.3g} FLOPs, learning rate {train['learning_rate']:g}",
    ]
    if plan.get("closed"):  # older plans lack it
        fields = (f"{field['field']} ({field['values']:,} values)" for field in plan["closed"])
        lines.append(f"decides {', '.join(fields)}")
    for arm, found in plan.get("pseudo", {}).items():
        rows = found["mixture"]["rows"]["pseudo"]
        lines.append(
            f"{arm}: {rows:,} pseudo-labelled rows, of {found['prompts']:,} prompts ({found['source']}) that "
            f"{found['teacher']} answers"
        )
    arms = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("arm", "steps", "tokens", "FLOPs", "time"):
        arms.add_column(title, justify="left" if title == "arm" else "right")
    for arm, costs in plan["arms"].items():
        time = clock(costs["seconds"])
        arms.add_row(arm, f"{costs['steps']:,}", f"{costs['tokens']:,}", f"{costs['flops']:.3g}", time)
    cost = f"about {clock(predicted['seconds'])} ({predicted['basis']}), {_memory(predicted)}"
    parts: list[RenderableType] = [Text("\n".join(lines)), Text(), table, Text()]
    if plan["arms"]:
        parts += [arms, Text()]
    parts.append(Text(cost, style="bold"))
    dropped = left_out((row["origin"], row["reason"]) for row in plan.get("dropped_rows", ()))
    parts += [Text(clean(text), style="yellow") for text in dropped]
    parts += [Text(f"note: {clean(notice)}", style="yellow") for notice in plan.get("notices", ())]
    return Panel(Group(*parts), title="plan", title_align="left", expand=False)


def _memory(predicted: dict) -> str:
    text = f"{predicted['memory_gb']:g} GB of memory"
    if total := predicted.get("device_memory_gb"):  # older plans lack it, and other devices
        text += f" of {total:g} GB"
    if level := predicted.get("recompute"):
        text += f", passes of {predicted['micro_tokens']:,} tokens, {level} of {predicted['layers']} layers recomputed"
    return text


def arms_table(metrics: dict) -> RenderableType:
    """A row per arm: the primary metric and a few others, each with its 95 % interval, and general loss."""
    from rich.table import Table

    arms, forgetting = metrics.get("arms", {}), metrics.get("forgetting") or {}
    columns, sets = [metric(name) for name in _columns(metrics)], _sets(forgetting)
    n = max((entry.get("n", 0) for scores in arms.values() for entry in scores.values() if entry), default=0)
    table = Table(title=f"{n:,} test rows, 95 % intervals", title_justify="left", header_style="bold")
    table.add_column("arm", no_wrap=True)
    for title in (*(spec.phrase for spec in columns), *(f"loss, {name}" for name in sets)):
        table.add_column(title, justify="right")
    for arm, scores in arms.items():
        losses = forgetting.get("arms", {}).get(arm) or {}
        cells = [_cell(scores.get(spec.name), spec) for spec in columns]
        cells += [_cell(losses.get(name, {}).get("loss"), METRICS["loss"]) for name in sets]
        table.add_row(arm, *cells, style="bold" if arm == "tell" else "")
    if constant := metrics.get("baseline"):
        cells = [_cell(constant["scores"].get(spec.name), spec) for spec in columns]
        table.add_row(CONSTANT, *cells, *("" for _ in sets), style="dim")
    for arm, other in (metrics.get("same") or {}).items():
        table.add_row(arm, f"one run with {other}", style="dim")
    return table


def _columns(metrics: dict) -> list[str]:
    primary: str = (metrics.get("task") or {}).get("primary") or ""
    found = dict.fromkeys(name for scores in metrics.get("arms", {}).values() for name in scores)
    others = [name for name in found if ":" not in name and name not in (primary, ANSWER_LOSS)]
    loss = [ANSWER_LOSS] if ANSWER_LOSS in found and primary != ANSWER_LOSS else []
    return ([primary] if primary in found else []) + others[: METRICS_SHOWN - 1] + loss


def _sets(forgetting: dict) -> list[str]:
    """The general sets that are in no mix, if there are any."""
    found = list(forgetting.get("sets") or {})
    return [name for name in found if name != HELD_OUT] or found


def _cell(entry: dict | None, spec: MetricSpec) -> str:
    """``92.6 % [86, 96]``"""
    value, ci = (entry or {}).get("value"), (entry or {}).get("ci")
    digits = 2 if spec.unit == "nats" else None
    shown = show(value, spec.unit, digits=digits)
    if value is not None and has_interval(ci):
        whole = factor(spec.unit) > 1  # limits in whole per cent
        low, high = (show(limit, spec.gap_unit, digits=0 if whole else digits) for limit in ci)
        shown += f" [{low}, {high}]"
    return as_typed(shown)


def benchmarks_table(benchmarks: dict) -> RenderableType:
    """``benchmarks`` of metrics.json: a row per metric, a column per arm and per difference to `base`."""
    from rich.table import Table

    arms, gaps, settings = benchmarks["arms"], benchmarks["differences"], benchmarks["settings"]
    how = [f"lm-evaluation-harness {settings['harness']}", "95 % intervals"]
    how += [f"the first {settings['limit']:,} questions of each task"] if settings["limit"] else []
    how += [text for key, text in (("chat", "chat template"), ("anchor", "with anchor")) if settings[key]]
    table = Table(title=", ".join(how), title_justify="left", header_style="bold")
    shown = {**arms, **{pair: found for pair, found in gaps.items() if pair.endswith(" - base")}}
    for title in ("benchmark", "shots", "questions", *shown):
        table.add_column(title, justify="left" if title == "benchmark" else "right", no_wrap=title == "benchmark")
    for name, entry in next(iter(arms.values())).items():
        shots = settings["shots"].get(name.partition(" ")[0], 0)  # the tasks of a group have no examples
        cells = (_cell(found[name], MetricSpec(name, name, "share")) for found in shown.values())
        table.add_row(name, str(shots), f"{entry['n']:,}", *cells)
    return table


def answers_side_by_side(run: RunFolder, arms: Iterable[str], *, rows: int = 3) -> RenderableType | None:
    """Reference and the arms' answers to the same prompts; rows that are scored differently come first."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    found = {arm: run.prediction(arm) for arm in arms if run.prediction(arm).exists()}
    if not found:
        return None
    answers = {arm: {row["hash"]: row for row in read_jsonl(path)} for arm, path in found.items()}
    first, *others = answers.values()
    shared = [key for key in first if all(key in other for other in others)]
    shared.sort(key=lambda key: len({_judged(arm[key]) for arm in answers.values()}) == 1)
    parts: list[RenderableType] = []
    for key in shared[:rows]:
        table = Table(header_style="bold", expand=True)
        for title in ("reference", *found):
            table.add_column(title, ratio=1, overflow="fold")
        cells = [first[key]["reference"], *(arm[key]["answer"] for arm in answers.values())]
        table.add_row(*(Text(_cut(cell, ANSWER_LENGTH)) for cell in cells))
        prompt = " ".join(clean(first[key]["prompt"]).split())
        parts += [Text(f"› {_cut(prompt, PROMPT_LENGTH)}", style="italic"), table]
    return Group(*parts)


def _judged(row: dict) -> str:
    """A row's scores without losses, which differ between arms even for equal answers."""
    return json.dumps({k: v for k, v in row.get("scores", {}).items() if k != ANSWER_LOSS}, sort_keys=True)


def _cut(text: str, length: int) -> str:
    text = clean(text).strip()
    return text if len(text) <= length else f"{text[:length].rstrip()} ..."


def label_lines(metrics: dict) -> list[str]:
    """The labels that are answered worst, and those most often taken for another; none for a task without labels."""
    arms = (metrics.get("labels") or {}).get("arms") or {}
    arm = "tell" if "tell" in arms else next(iter(arms), "")
    rows = [row for row in arms.get(arm, ()) if row["support"]]
    worst = sorted((row for row in rows if row["f1"] < 1), key=lambda row: row["f1"])[:LABELS_SHOWN]
    taken = [(n, of, row) for row in rows for of, n in row.get("answers", {}).items() if of != row["label"]]
    taken.sort(key=lambda entry: -entry[0])
    weak = (f"{brief(row['label'])} {as_typed(show(row['f1'], 'share', digits=0))} ({_rows(row)})" for row in worst)
    often = (f"{brief(row['label'])} as {brief(of)} ({n} of {_rows(row)})" for n, of, row in taken[:LABELS_SHOWN])
    lines = [("lowest F1", ", ".join(weak)), ("most often mistaken", ", ".join(often))]
    return [f"{arm}, {what}: {text}" for what, text in lines if text]


def _rows(row: dict) -> str:
    return f"{row['support']} row{'' if row['support'] == 1 else 's'}"


def show_metrics(console: Console, metrics: dict) -> None:
    """The verdict and the table of arms."""
    from rich.text import Text

    from tell.score.verdict import verdict

    console.print(arms_table(metrics))
    for line in label_lines(metrics):
        console.print(Text(line))
    console.print(Text(verdict(metrics), style="bold"))


def show_run(console: Console, run: RunFolder) -> None:
    """Print the results of a finished run: arms, three answers, and the path of the report."""
    from rich.text import Text

    metrics = run.read(run.metrics)
    sides = [arm for arm in ("base", "tell") if arm in metrics["arms"]]
    answers = answers_side_by_side(run, sides or list(metrics["arms"])[:2])
    if answers is not None:
        console.print(answers)
    show_metrics(console, metrics)
    for text in run_notices(run.read(run.findings), read_yaml(run.config)):
        console.print(Text(f"note: {clean(text)}", style="yellow"))
    lines = [f"adapter  {run.adapter}"] if run.adapter.exists() else []
    lines += [f"report   {run.report}"] if run.report.exists() else []
    lines.append(f"try it   tell chat {run.root}" + ("" if run.adapter.exists() else " --arm base"))
    console.print(Text("\n".join(lines)), soft_wrap=True)
