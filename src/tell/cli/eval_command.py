"""``tell eval``: score a run's arms again, on other rows or with other decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tell.cli.common import TRUST_CODE, TRUST_SCORER, read_number
from tell.cli.common import arms as read_arms
from tell.errors import TellError

PANEL = "Benchmarks (lm-evaluation-harness)"


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder", show_default=False)],
    arms: Annotated[
        str | None, typer.Option("--arms", metavar="A,B,...", help="arms to score; default: those of the run")
    ] = None,
    test: Annotated[str | None, typer.Option("--test", metavar="FILE", help="score on these rows instead")] = None,
    rows: Annotated[str | None, typer.Option("--rows", metavar="N", help="score at most this many rows")] = None,
    greedy: Annotated[bool | None, typer.Option("--greedy/--no-greedy", help="decode greedily")] = None,
    seed: Annotated[str | None, typer.Option("--seed", metavar="N", help="seed of the decoding")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any key of the run; repeatable")
    ] = None,
    benchmarks: Annotated[
        str | None,
        typer.Option(
            "--benchmarks", metavar="A,B,...", help="gsm8k, openbookqa, agieval[_en|_cn]", rich_help_panel=PANEL
        ),
    ] = None,
    benchmark_data: Annotated[
        str | None,
        typer.Option(
            "--benchmark-data", metavar="DIR", help="their files; else they are fetched", rich_help_panel=PANEL
        ),
    ] = None,
    benchmark_limit: Annotated[
        str | None,
        typer.Option("--benchmark-limit", metavar="N", help="the first N questions of a task", rich_help_panel=PANEL),
    ] = None,
    benchmark_shots: Annotated[
        str | None,
        typer.Option("--benchmark-shots", metavar="K", help="examples before each question", rich_help_panel=PANEL),
    ] = None,
    benchmark_chat: Annotated[
        bool | None,
        typer.Option(
            "--benchmark-chat/--no-benchmark-chat", help="ask through the chat template", rich_help_panel=PANEL
        ),
    ] = None,
    benchmark_anchor: Annotated[
        bool | None,
        typer.Option(
            "--benchmark-anchor/--no-benchmark-anchor", help="put the anchor on questions", rich_help_panel=PANEL
        ),
    ] = None,
    trust_remote_code: Annotated[bool, TRUST_CODE] = False,
    trust_scorer: Annotated[bool, TRUST_SCORER] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")] = False,
) -> None:
    """Score the arms of a run on its test rows, or on benchmarks.

    Scores have intervals. Benchmarks (--benchmarks) are of general ability: GSM8K, OpenBookQA, AGIEval.
    """
    wanted = None if arms is None else read_arms(arms)
    limit, chosen = read_number("--rows", rows), read_number("--seed", seed)
    asked: dict[str, Any] = {
        "benchmarks": benchmarks and [name.strip() for name in benchmarks.split(",") if name.strip()],
        "data": benchmark_data,
        "limit": read_number("--benchmark-limit", benchmark_limit),
        "shots": read_number("--benchmark-shots", benchmark_shots),
        "chat": benchmark_chat,
        "anchor": benchmark_anchor,
    }
    if any(value is not None for value in asked.values()):
        other = {"--test": test, "--rows": rows, "--greedy": greedy, "--seed": seed, "--set": sets or None}
        other["--trust-scorer"] = trust_scorer or None
        if given := [flag for flag, value in other.items() if value is not None]:
            raise TellError("has no effect on benchmarks", where=given[0], remedy="Leave it out.")
        return _benchmark(run, wanted, {**asked, "trust_remote_code": trust_remote_code}, as_json)
    import tell
    from tell.cli.display import make_console, make_display
    from tell.cli.output import only_json
    from tell.cli.tables import show_metrics
    from tell.run.claim import Trust

    overrides = [*(sets or ())]
    overrides += [] if greedy is None else [f"generate.greedy={str(greedy).lower()}"]
    overrides += [] if chosen is None else [f"seed={chosen}"]
    with only_json(as_json) as emit:
        metrics = tell.evaluate(
            run,
            arms=wanted,
            test=test,
            rows=limit,
            overrides=overrides,
            trust=Trust(trust_remote_code, trust_scorer),
            display=make_display(),
        )
        if as_json:
            emit(metrics)
        else:
            show_metrics(make_console(), metrics)


def _benchmark(run: Path, arms: tuple[str, ...] | None, asked: dict[str, Any], as_json: bool) -> None:
    from tell.cli.display import make_console, make_display
    from tell.cli.output import only_json
    from tell.cli.tables import benchmarks_table
    from tell.verbs.benchmark import BenchmarkOptions, benchmark

    names, trust = asked.pop("benchmarks"), asked.pop("trust_remote_code")
    with only_json(as_json) as emit:
        options = BenchmarkOptions(**asked)
        metrics = benchmark(run, names, arms=arms, options=options, trust_remote_code=trust, display=make_display())
        if as_json:
            emit(metrics)
        else:
            make_console().print(benchmarks_table(metrics["benchmarks"]))
