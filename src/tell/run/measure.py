"""Every arm of a run on its test rows: answers, scores, validation loss, and what was forgotten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tell.anchor.anchor import Anchor
from tell.files import read_jsonl, write_jsonl
from tell.folder import RunFolder
from tell.progress import Display
from tell.rows.tokenize import tokenize
from tell.run.answer_loss import answer_loss_metric, answer_losses, kept_answer_losses
from tell.run.answers import (
    adapter_arm,
    adapter_folder,
    answer_costs,
    answer_limit,
    answer_rows,
    arm_numbers,
    arm_prompts,
    eval_numbers,
    score_rows,
    scorer_of,
)
from tell.run.benchmarks.run_benchmarks import run_benchmarks
from tell.run.forgetting import general_sets, loss_rows, losses_of, measure, numbers
from tell.run.general_rows import General
from tell.run.prepare import Task


def measure_arms(
    task: Task,
    arms: Sequence[str],
    folder: RunFolder,
    model: Any,
    engine: Any,
    anchor: Anchor,
    general: General | None,
    *,
    display: Display,
    begin: Callable[[str], None],
    check: Callable[[], None],
) -> tuple[dict, dict[str, float]]:
    """Answer, score and measure each arm; answers that lie in the folder are scored as they are.

    Args:
        model: the base model; each arm's adapter is merged into it for its turn.
        engine: decodes with `model`.
        begin: called with ``"evaluate <arm>"`` before each arm.
        check: called at every token and block of rows; may raise to stop.

    Returns:
        ``task``, ``arms``, ``differences``, ``forgetting``, ``eval`` and, where any is asked for, ``benchmarks`` of
        metrics.json; and the mean validation loss by arm, ``base`` among them, empty where no row is kept for
        validation.
    """
    from tell.decode.sampler import Decoding
    from tell.train.lora import adapter_merged

    config = task.config
    scorer = scorer_of(config, task.kind)
    limit = answer_limit(config, task.chat, task.train)
    decoding = Decoding.of(config.generate, max_new_tokens=limit, stop_ids=task.chat.stop_ids, seed=config.seed)
    state = general_sets(config, task.chat, general)
    rules = replace(task.rules, too_long="drop", nothing_to_train="drop", misfit="drop")
    validation = tokenize(task.validation, task.chat, source="validation", anchor=anchor, rules=rules)
    if lost := validation.dropped:
        first = f"the first: {lost[0].origin}: {lost[0].reason}"
        task.notice(f"{len(lost)} of {len(task.validation)} validation rows are left out, {first}", display)
    losses: dict[str, float] = {}
    measured: set[str] = set()

    def measure_weights(arm: str) -> None:
        measured.add(arm)
        if state is not None:
            measure(state, arm, model, engine, scorer, config, task.chat, display, check)
            write_jsonl(folder.general_losses(arm), loss_rows(state, arm))
        if len(validation):
            passes = {"micro_tokens": config.train.micro_tokens, "device": engine.device}
            per_row = losses_of(model, arm, validation, **passes)
            losses[arm] = round(float(per_row.mean()), 6)

    scored: dict[str, dict] = {}
    costs: dict[str, dict] = {}
    for arm in arms:
        begin(f"evaluate {arm}")
        with adapter_merged(model, adapter_folder(folder, arm)):
            path = folder.prediction(arm)
            prompts, used = arm_prompts(
                arm,
                task.chat,
                anchor,
                task.test,
                task.train,
                examples=config.eval.icl_examples,
                room=min(engine.max_positions - limit, config.train.max_length * 2),
                seed=config.seed,
                shots=task.shots,
            )
            if arm == "icl":
                task.notice(f"icl: {used} examples fit into the context", display)
            if path.exists():
                rows = read_jsonl(path)
            else:
                title = f"answer {arm}"
                rows = answer_rows(
                    engine, task.chat, prompts, task.test, decoding, title=title, display=display, check=check
                )
            more = {}
            if config.eval.answer_loss:
                values = kept_answer_losses(rows)
                if values is None:
                    values = answer_losses(
                        model,
                        task.chat,
                        prompts,
                        task.test,
                        positions=task.files.architecture.max_positions,
                        micro_tokens=config.train.micro_tokens,
                        device=engine.device,
                        title=f"answer loss {arm}",
                        display=display,
                        check=check,
                    )
                more = answer_loss_metric(values)
            scored[arm] = score_rows(scorer, rows, more)
            costs[arm] = answer_costs(task.files.architecture, prompts, rows)
            write_jsonl(path, rows)
            weights = adapter_arm(arm) or "base"
            if weights not in measured:
                measure_weights(weights)
    if "base" not in measured:  # what training changed needs a before
        measure_weights("base")
    values, gaps = arm_numbers(scored, seed=config.seed, samples=config.eval.bootstrap)
    metrics = {
        "task": {"kind": task.kind.name, "primary": scorer.primary},
        "arms": values,
        "differences": gaps,
        "forgetting": numbers(state, config) if state is not None else {},
        "eval": eval_numbers(costs),
    }
    if config.eval.benchmarks:
        metrics["benchmarks"] = run_benchmarks(
            config,
            arms,
            folder,
            model,
            engine,
            task.chat,
            task.files,
            anchor,
            display=display,
            begin=begin,
            check=check,
        )
    return metrics, losses
