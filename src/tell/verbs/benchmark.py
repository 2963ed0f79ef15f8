"""`tell eval --benchmarks`: score a finished run on benchmarks of general ability, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tell.config import make_config
from tell.errors import TellError
from tell.files import expanded, write_json
from tell.nested import merge
from tell.progress import Display, Silent
from tell.run.answers import adapter_ready
from tell.run.benchmarks.run_benchmarks import asked_alike, check_benchmarks, run_benchmarks
from tell.verbs.open_run import open_run


@dataclass(frozen=True)
class BenchmarkOptions:
    """``eval.benchmark_*`` of the configuration; None keeps the run's own."""

    data: str | None = None
    limit: int | None = None
    shots: int | None = None
    chat: bool | None = None
    anchor: bool | None = None

    def keys(self) -> dict[str, object]:
        """The keys of ``eval`` that are given."""
        data = self.data and str(expanded(self.data).resolve())
        given = asdict(self) | {"data": data}
        return {f"benchmark_{key}": value for key, value in given.items() if value is not None}


def benchmark(
    run: str | Path,
    benchmarks: Sequence[str] | None = None,
    *,
    arms: Sequence[str] | None = None,
    options: BenchmarkOptions = BenchmarkOptions(),
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
        options: how the questions are asked; by default as the run's configuration says.
        trust_remote_code: run code that comes with the model, as the run did; run.yaml alone does not allow it.

    Returns:
        metrics.json as it is now.

    Raises:
        TellError: no run, no adapter for an arm, or as `run_benchmarks`.
    """
    opened = open_run(run, trust_remote_code=trust_remote_code)
    changes = {"eval": ({"benchmarks": list(benchmarks)} if benchmarks else {}) | options.keys()}
    config = make_config(merge(opened.config.model_dump(by_alias=True, mode="json"), changes), where="benchmarks")
    path = opened.folder.require(opened.folder.metrics, "`tell tune`")
    if not check_benchmarks(config):
        raise TellError(
            "no benchmark is requested", where="benchmarks", remedy="Name one, e.g. --benchmarks openbookqa."
        )
    if arms is None:
        arms = [arm for arm in config.eval.arms if adapter_ready(opened.folder, arm)]
    for arm in arms:
        opened.adapter(arm)  # checked before the model is loaded
    session = opened.session(config, display or Silent())
    metrics = opened.folder.read(path)
    earlier = metrics.get("benchmarks") or {}
    if asked_alike(earlier.get("settings") or {}, config):  # keep numbers of other calls
        names = dict.fromkeys([*earlier["settings"]["tasks"], *config.eval.benchmarks])
        config = config.model_copy(update={"eval": config.eval.model_copy(update={"benchmarks": tuple(names)})})
        arms = list(dict.fromkeys([*(arm for arm in earlier["arms"] if adapter_ready(opened.folder, arm)), *arms]))
    metrics["benchmarks"] = run_benchmarks(config, arms, opened.anchor, session, opened.folder)
    write_json(path, metrics)
    if opened.folder.report.exists():  # the report shows the benchmarks
        from tell.report.page import write_page

        write_page(opened.folder)
    return metrics
