"""General ability before and after tuning: benchmarks of lm-evaluation-harness for the arms of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tell.anchor.anchor import NO_ANCHOR, Anchor
from tell.config import Config, make_config, merge
from tell.errors import TellError
from tell.files import expanded, read_jsonl, write_json, write_jsonl
from tell.folder import RunFolder
from tell.home import tell_home
from tell.models.find import ModelFiles
from tell.models.flops import inference_flops
from tell.progress import Display, Silent
from tell.rows.template import ChatTokenizer
from tell.run.answers import adapter_arm, adapter_folder, adapter_ready, arm_anchor, arm_numbers, eval_numbers
from tell.score.benchmark_tasks import (
    GROUPS,
    LocalTask,
    benchmark_tasks,
    group_mean,
    local_tasks,
    read_task,
    task_shots,
)
from tell.score.means import mean_metric
from tell.score.scored import Metric
from tell.verbs.open_run import open_run

FORMAT = 1  # raise when asking or scoring changes its result
Tasks = Mapping[str, tuple[str, ...]]


def check_benchmarks(config: Config) -> Tasks:
    """Tasks under each benchmark of ``eval.benchmarks``, said before any work is done.

    Raises:
        TellError: an unknown benchmark, a missing file, or lm-evaluation-harness is not installed.
    """
    wanted = benchmark_tasks(config.eval.benchmarks)
    if wanted:
        harness_version()
    return local_tasks(wanted, config.eval.benchmark_data) if config.eval.benchmark_data else wanted


def harness_version() -> str:
    """
    Raises:
        TellError: it is not installed.
    """
    try:
        return version("lm_eval")
    except PackageNotFoundError as error:
        raise TellError(
            "benchmarks need lm-evaluation-harness, which is not installed",
            where="benchmarks",
            remedy='pip install "tell-llm[harness]"',
        ) from error


def benchmark_arms(arms: Sequence[str], anchor: Anchor) -> list[str]:
    """``base`` and the arms that differ from those before them: by their adapter, or by the anchor where it is used.

    Args:
        anchor: put on the questions; NO_ANCHOR where it is not. Examples in context (``icl``) are never.
    """
    found: dict[tuple[str | None, bool], str] = {}
    for arm in ("base", *arms):
        if arm != "icl":
            found.setdefault((adapter_arm(arm), bool(arm_anchor(arm, anchor))), arm)
    return list(found.values())


def run_benchmarks(
    config: Config,
    arms: Sequence[str],
    folder: RunFolder,
    model: Any,
    engine: Any,
    chat: ChatTokenizer,
    files: ModelFiles,
    anchor: Anchor,
    *,
    display: Display,
    begin: Callable[[str], None] = lambda stage: None,
    check: Callable[[], None] = lambda: None,
) -> dict:
    """``benchmarks`` of metrics.json: ``settings``, ``arms``, ``differences`` and ``eval``.

    What lies in ``predictions/benchmarks/<arm>/`` from the same questions asked in the same way is not asked again;
    nor what the untuned model answered in any run on this machine.

    Args:
        arms: which of `benchmark_arms` are scored; the untuned model always is.
        model: the base model; each arm's adapter is merged into it for its turn.
        begin: called with ``"benchmark <arm>"`` before each arm.
        check: called at every block of answers; may raise to stop.

    Raises:
        TellError: as `check_benchmarks`; bad rows in a file; a dataset that cannot be fetched.
    """
    tasks, rule = check_benchmarks(config), config.eval
    names = list(dict.fromkeys(name for group in tasks.values() for name in group))
    for name, group in tasks.items():
        if len(group) < len(whole := GROUPS.get(name, group)):
            display.note(f"{name}: {len(group)} of its {len(whole)} tasks are there")
    shots = {name: task_shots(name, rule.benchmark_shots) for name in names}
    local = _local(names, shots, config)
    for name, rows in (local or {}).items():
        if rows.dropped:
            display.note(f"{name}: {rows.dropped} rows are left out, their answer keys are unusable")
    used = anchor if rule.benchmark_anchor else NO_ANCHOR
    loaded: dict[str, Any] = {}

    def settings(name: str, arm: str) -> dict:
        on = arm_anchor(arm, used)
        return {
            "format": FORMAT,
            "harness": harness_version(),
            "data": local[name].digest if local else "hub",
            "limit": rule.benchmark_limit,
            "shots": shots[name],
            "chat": rule.benchmark_chat,
            "anchor": on.hash if on else None,
            "model": files.fingerprint,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": engine.device.type,
            **({"engine": engine.name} if engine.name != "own" else {}),  # which writes the answers
        }

    def answer(name: str, arm: str) -> tuple[list[dict], dict]:
        from tell.run.benchmarks.harness import EngineLM, answer_task, load_tasks

        if not loaded:
            loaded.update(load_tasks(names, local))
        with display.bar(f"{name} {arm}", None, "answers") as advance:

            def progress(n: int) -> None:
                advance(n)
                check()

            lm = EngineLM(
                model,
                engine,
                chat,
                anchor=arm_anchor(arm, used),
                templated=rule.benchmark_chat,
                micro_tokens=config.train.micro_tokens,
                batch_size=config.generate.batch_size,
                advance=progress,
            )
            rows = answer_task(lm, name, loaded[name], shots=shots[name], limit=rule.benchmark_limit)
        flops = inference_flops(files.architecture, sum(lm.fed), output_tokens=lm.new_tokens, lengths=lm.fed)
        return rows, {"prompt_tokens": lm.prompt_tokens, "new_tokens": lm.new_tokens, "flops": flops}

    metrics: dict[str, dict[str, Metric]] = {}
    costs: dict[str, dict] = {}
    for arm in benchmark_arms(arms, used):
        begin(f"benchmark {arm}")
        found = _answers(folder, arm, {name: settings(name, arm) for name in names}, model, answer)
        metrics[arm] = benchmark_metrics(tasks, {name: rows for name, (rows, _) in found.items()})
        sums = [cost for _, cost in found.values()]
        costs[arm] = {key: sum(cost[key] for cost in sums) for key in ("prompt_tokens", "new_tokens", "flops")}
    values, gaps = arm_numbers(metrics, seed=config.seed, samples=rule.bootstrap)
    return {
        "settings": {
            "harness": harness_version(),
            "tasks": {name: list(group) for name, group in tasks.items()},
            "data": rule.benchmark_data or "hub",
            "limit": rule.benchmark_limit,
            "shots": shots,
            "chat": rule.benchmark_chat,
            "anchor": rule.benchmark_anchor,
        },
        "arms": values,
        "differences": gaps,
        "eval": eval_numbers(costs),
    }


def _asked_alike(settings: Mapping[str, Any], config: Config) -> bool:
    """Whether earlier questions (``settings`` of `run_benchmarks`) were asked as the configuration would ask them."""
    rule = config.eval
    same = {"harness": harness_version(), "data": rule.benchmark_data or "hub", "limit": rule.benchmark_limit}
    same |= {"chat": rule.benchmark_chat, "anchor": rule.benchmark_anchor}
    shots = {name: task_shots(name, rule.benchmark_shots) for name in settings.get("shots") or ()}
    return bool(shots) and all(settings.get(key) == value for key, value in {**same, "shots": shots}.items())


def _local(names: Sequence[str], shots: Mapping[str, int], config: Config) -> dict[str, LocalTask] | None:
    place = config.eval.benchmark_data
    return {name: read_task(name, place, shots=shots[name]) for name in names} if place else None


def _answers(
    folder: RunFolder,
    arm: str,
    settings: Mapping[str, dict],
    model: Any,
    answer: Callable[[str, str], tuple[list[dict], dict]],
) -> dict[str, tuple[list[dict], dict]]:
    """Rows and cost of each task for one arm, from the folder, from the home cache, or asked now."""
    from tell.train.lora import adapter_merged

    out: dict[str, tuple[list[dict], dict]] = {}
    untuned = adapter_arm(arm) is None
    for name, asked in settings.items():
        kept = _read(folder.benchmark(arm, name), asked)
        if kept is None and untuned and (kept := _read(_shared(name, asked), asked)) is not None:
            _write(folder.benchmark(arm, name), asked, *kept)
        if kept is not None:
            out[name] = kept
    missing = [name for name in settings if name not in out]
    if missing:
        with adapter_merged(model, adapter_folder(folder, arm)):
            for name in missing:
                out[name] = answer(name, arm)
                _write(folder.benchmark(arm, name), settings[name], *out[name])
                if untuned:
                    with suppress(TellError):  # a home that cannot be written costs the next run's time, not this run
                        _write(_shared(name, settings[name]), settings[name], *out[name])
    return out


def _shared(name: str, settings: dict) -> Path:
    """Where the untuned model's answers lie for every run of this machine."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]
    return tell_home() / "benchmarks" / key / name


def _read(place: Path, settings: dict) -> tuple[list[dict], dict] | None:
    try:
        facts = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))
        if facts["settings"] != settings:
            return None
        return read_jsonl(place.with_suffix(".jsonl")), facts["cost"]
    except (OSError, ValueError, KeyError, TellError):  # not there, or cut short
        return None


def _write(place: Path, settings: dict, rows: list[dict], cost: dict) -> None:
    place.with_suffix(".json").unlink(missing_ok=True)
    write_jsonl(place.with_suffix(".jsonl"), rows)
    write_json(place.with_suffix(".json"), {"settings": settings, "cost": cost})  # last: it says that all is there


def kept_answers(folder: RunFolder, arm: str, task: str) -> list[dict]:
    """A row a question, as `tell.run.benchmarks.harness.answer_task` made them; empty where a run has not kept them."""
    try:
        return read_jsonl(folder.benchmark(arm, task).with_suffix(".jsonl"))
    except (OSError, ValueError, TellError):
        return []


def benchmark_metrics(tasks: Tasks, rows: Mapping[str, list[dict]]) -> dict[str, Metric]:
    """Metrics of benchmarks and tasks, by the names they have in metrics.json.

    The first metric of the harness goes by the benchmark's name alone, others as ``openbookqa acc_norm``. A group has
    the mean of each metric that all its tasks have.
    """
    single = {
        name: {metric: mean_metric([row["scores"][metric] for row in found]) for metric in found[0]["scores"]}
        for name, found in rows.items()
        if found
    }
    out: dict[str, Metric] = {}
    for name, group in tasks.items():
        shared = [m for m in single[group[0]] if all(m in single[task] for task in group)]
        mean = {name: {m: group_mean([single[task][m] for task in group]) for m in shared}}
        for benchmark, metrics in {**mean, **{task: single[task] for task in group}}.items():
            for i, (metric, values) in enumerate(metrics.items()):
                out[benchmark if i == 0 else f"{benchmark} {metric.rpartition(',')[2]}"] = values
    return out


def benchmark(
    run: str | Path,
    benchmarks: Sequence[str] | None = None,
    *,
    arms: Sequence[str] | None = None,
    data: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool | None = None,
    anchor: bool | None = None,
    trust_remote_code: bool = False,
    display: Display | None = None,
) -> dict:
    """Score a finished run on benchmarks, before and after; metrics.json gets them under ``benchmarks``, and so does
    the report.

    Args:
        run: a run folder with its adapters.
        benchmarks: ``gsm8k``, ``openbookqa``, ``agieval``, ``agieval_en``, ``agieval_cn`` or tasks of AGIEval; default:
            those of the run's configuration.
        arms: default: those of the run that have an adapter; the untuned model is always scored.
        data, limit, shots, chat, anchor: as ``eval.benchmark_data`` and so on; None keeps the run's own.
        trust_remote_code: run code that comes with the model, as the run did; its own word is not enough.

    Returns:
        metrics.json as it is now.

    Raises:
        TellError: no run, no adapter for an arm, or as `run_benchmarks`.
    """
    opened = open_run(run, trust_remote_code=trust_remote_code)
    given = {
        "benchmarks": benchmarks and list(benchmarks),
        "benchmark_data": data and str(expanded(data).resolve()),
        "benchmark_limit": limit,
        "benchmark_shots": shots,
        "benchmark_chat": chat,
        "benchmark_anchor": anchor,
    }
    changes = {"eval": {key: value for key, value in given.items() if value is not None}}
    config = make_config(merge(opened.config.model_dump(by_alias=True, mode="json"), changes), where="benchmarks")
    path = opened.folder.require(opened.folder.metrics, "`tell tune`")
    if not check_benchmarks(config):
        raise TellError(
            "no benchmark is asked for", where="benchmarks", remedy="Name one, e.g. --benchmarks openbookqa."
        )
    if arms is None:
        arms = [arm for arm in config.eval.arms if adapter_ready(opened.folder, arm)]
    for arm in arms:
        opened.adapter(arm)  # said before the model is loaded
    model = opened.load(config, display=display)
    metrics = opened.folder.read(path)
    earlier = metrics.get("benchmarks") or {}
    if _asked_alike(earlier.get("settings") or {}, config):  # numbers of another call stay: their answers are kept
        names = dict.fromkeys([*earlier["settings"]["tasks"], *config.eval.benchmarks])
        config = config.model_copy(update={"eval": config.eval.model_copy(update={"benchmarks": tuple(names)})})
        arms = list(dict.fromkeys([*(arm for arm in earlier["arms"] if adapter_ready(opened.folder, arm)), *arms]))
    metrics["benchmarks"] = run_benchmarks(
        config,
        arms,
        opened.folder,
        model,
        opened.engine,
        opened.chat,
        opened.files,
        opened.anchor,
        display=display or Silent(),
    )
    write_json(path, metrics)
    if opened.folder.report.exists():  # it shows them
        from tell.report.page import write_page

        write_page(opened.folder)
    return metrics
