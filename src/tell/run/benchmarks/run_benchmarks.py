"""General ability before and after tuning: benchmarks of lm-evaluation-harness for the arms of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tell.anchor.anchor import NO_ANCHOR, Anchor
from tell.config import Config
from tell.errors import TellError
from tell.files import read_jsonl, write_json, write_jsonl
from tell.folder import RunFolder
from tell.home import tell_home
from tell.models.flops import inference_flops
from tell.names import ARMS
from tell.run.answers import adapter_folder, arm_anchor, arm_numbers, eval_numbers
from tell.run.session import Session
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

FORMAT = 1  # raise when a change to prompts or scoring changes results
Tasks = Mapping[str, tuple[str, ...]]


def check_benchmarks(config: Config) -> Tasks:
    """Tasks of each benchmark in ``eval.benchmarks``, checked before any work is done.

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
    """``base`` and the arms that differ from those before them: in their adapter, or in the anchor where it is used.

    Args:
        anchor: put on the questions; NO_ANCHOR where it is not. In-context examples (``icl``) never are.
    """
    found: dict[tuple[str | None, bool], str] = {}
    for arm in ("base", *arms):
        if not ARMS[arm].in_context:
            found.setdefault((ARMS[arm].adapter, bool(arm_anchor(arm, anchor))), arm)
    return list(found.values())


@dataclass(frozen=True)
class Questions:
    """The benchmarks of a configuration: their tasks, shots, data and anchor.

    Attributes:
        tasks: of each benchmark.
        shots: examples before each question, by task.
        local: the rows of each task where they are read from files; None: the hub's.
        anchor: put on the questions.
    """

    config: Config
    tasks: Tasks
    shots: dict[str, int]
    local: dict[str, LocalTask] | None
    anchor: Anchor
    _loaded: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config, anchor: Anchor, session: Session) -> Questions:
        """Those of ``eval.benchmarks``.

        Raises:
            TellError: as `check_benchmarks`; bad rows in a file.
        """
        tasks, rule = check_benchmarks(config), config.eval
        for name, group in tasks.items():
            if len(group) < len(whole := GROUPS.get(name, group)):
                session.display.note(f"{name}: {len(group)} of its {len(whole)} tasks have data")
        shots = {name: task_shots(name, rule.benchmark_shots) for group in tasks.values() for name in group}
        place = rule.benchmark_data
        local = {name: read_task(name, place, shots=shots[name]) for name in shots} if place else None
        for name, rows in (local or {}).items():
            if rows.dropped:
                session.display.note(f"{name}: {rows.dropped} rows are left out: their answer keys are unusable")
        return cls(config, tasks, shots, local, anchor if rule.benchmark_anchor else NO_ANCHOR)

    def settings(self, name: str, arm: str, session: Session) -> dict:
        """Cache key of an arm's answers to a task: all that they depend on apart from its adapter."""
        rule, on, engine = self.config.eval, arm_anchor(arm, self.anchor), session.engine
        return {
            "format": FORMAT,
            "harness": harness_version(),
            "data": self.local[name].digest if self.local else "hub",
            "limit": rule.benchmark_limit,
            "shots": self.shots[name],
            "chat": rule.benchmark_chat,
            "anchor": on.hash if on else None,
            "model": session.files.fingerprint,
            "dtype": str(session.model.dtype).removeprefix("torch."),
            "device": engine.device.type,
            **({"base": base} if (base := session.config.model.base) != "full" else {}),
            **({"engine": engine.name} if engine.name != "own" else {}),  # which writes the answers
        }

    def ask(self, name: str, arm: str, session: Session) -> tuple[list[dict], dict]:
        """Answers to a task of the arm whose adapter is applied, and their cost."""
        from tell.run.benchmarks.harness import EngineLM, Passes, answer_task, load_tasks

        if not self._loaded:
            self._loaded.update(load_tasks(list(self.shots), self.local))
        rule = self.config.eval
        with session.display.bar(f"{name} {arm}", None, "answers") as advance:

            def progress(n: float) -> None:
                advance(n)
                session.check()

            lm = EngineLM(
                session.model,
                session.engine,
                session.chat,
                anchor=arm_anchor(arm, self.anchor),
                templated=rule.benchmark_chat,
                passes=Passes(self.config.train.forward_tokens, self.config.generate.batch_size),
                advance=progress,
            )
            rows = answer_task(lm, name, self._loaded[name], shots=self.shots[name], limit=rule.benchmark_limit)
        flops = inference_flops(session.files.architecture, sum(lm.fed), output_tokens=lm.new_tokens, lengths=lm.fed)
        return rows, {"prompt_tokens": lm.prompt_tokens, "new_tokens": lm.new_tokens, "flops": flops}


def run_benchmarks(
    config: Config,
    arms: Sequence[str],
    anchor: Anchor,
    session: Session,
    folder: RunFolder,
    begin: Callable[[str], None] = lambda stage: None,
) -> dict:
    """``benchmarks`` of metrics.json: ``settings``, ``arms``, ``differences`` and ``eval``.

    Answers in ``predictions/benchmarks/<arm>/`` to the same questions and settings are reused, as are the untuned
    model's answers from any run on this machine.

    Args:
        arms: which of `benchmark_arms` are scored; the untuned model always is.
        begin: called with ``"benchmark <arm>"`` before each arm.

    Raises:
        TellError: as `check_benchmarks`; bad rows in a file; a dataset that cannot be fetched.
    """
    questions, rule = Questions.of(config, anchor, session), config.eval
    metrics: dict[str, dict[str, Metric]] = {}
    costs: dict[str, dict] = {}
    for arm in benchmark_arms(arms, questions.anchor):
        begin(f"benchmark {arm}")
        found = _answers(questions, arm, folder, session)
        metrics[arm] = benchmark_metrics(questions.tasks, {name: rows for name, (rows, _) in found.items()})
        sums = [cost for _, cost in found.values()]
        costs[arm] = {key: sum(cost[key] for cost in sums) for key in ("prompt_tokens", "new_tokens", "flops")}
    values, gaps = arm_numbers(metrics, seed=config.seed, samples=rule.bootstrap)
    return {
        "settings": {
            "harness": harness_version(),
            "tasks": {name: list(group) for name, group in questions.tasks.items()},
            "data": rule.benchmark_data or "hub",
            "limit": rule.benchmark_limit,
            "shots": questions.shots,
            "chat": rule.benchmark_chat,
            "anchor": rule.benchmark_anchor,
        },
        "arms": values,
        "differences": gaps,
        "eval": eval_numbers(costs),
    }


def asked_alike(settings: Mapping[str, Any], config: Config) -> bool:
    """Whether earlier ``settings`` (of `run_benchmarks`) are those that the configuration gives."""
    rule = config.eval
    same = {"harness": harness_version(), "data": rule.benchmark_data or "hub", "limit": rule.benchmark_limit}
    same |= {"chat": rule.benchmark_chat, "anchor": rule.benchmark_anchor}
    shots = {name: task_shots(name, rule.benchmark_shots) for name in settings.get("shots") or ()}
    return bool(shots) and all(settings.get(key) == value for key, value in {**same, "shots": shots}.items())


def _answers(questions: Questions, arm: str, folder: RunFolder, session: Session) -> dict[str, tuple[list[dict], dict]]:
    """Rows and cost of each task for one arm: from the folder, from the home cache, or computed now."""
    out: dict[str, tuple[list[dict], dict]] = {}
    untuned = ARMS[arm].adapter is None
    settings = {name: questions.settings(name, arm, session) for name in questions.shots}
    for name, asked in settings.items():
        kept = _read(folder.benchmark(arm, name), asked)
        if kept is None and untuned and (kept := _read(_shared(name, asked), asked)) is not None:
            _write(folder.benchmark(arm, name), asked, *kept)
        if kept is not None:
            out[name] = kept
    missing = [name for name in settings if name not in out]
    if missing:
        with session.adapter(adapter_folder(folder, arm)):
            for name in missing:
                out[name] = questions.ask(name, arm, session)
                _write(folder.benchmark(arm, name), settings[name], *out[name])
                if untuned:
                    with suppress(TellError):  # an unwritable home costs the next run time but does not fail this one
                        _write(_shared(name, settings[name]), settings[name], *out[name])
    return out


def _shared(name: str, settings: dict) -> Path:
    """The untuned model's answers, shared by every run on this machine."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]
    return tell_home() / "benchmarks" / key / name


def _read(place: Path, settings: dict) -> tuple[list[dict], dict] | None:
    try:
        facts = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))
        if facts["settings"] != settings:
            return None
        return read_jsonl(place.with_suffix(".jsonl")), facts["cost"]
    except (OSError, ValueError, KeyError, TellError):  # missing or truncated
        return None


def _write(place: Path, settings: dict, rows: list[dict], cost: dict) -> None:
    place.with_suffix(".json").unlink(missing_ok=True)
    write_jsonl(place.with_suffix(".jsonl"), rows)
    write_json(place.with_suffix(".json"), {"settings": settings, "cost": cost})  # last: it marks the rest as complete


def kept_answers(folder: RunFolder, arm: str, task: str) -> list[dict]:
    """One row per question, as `tell.run.benchmarks.harness.answer_task` made them; empty where a run kept none."""
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
