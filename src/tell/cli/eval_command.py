"""``tell eval``: score a run's arms again, on other rows or with other decoding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tell.cli.common import (
    argument,
    count,
    json_switch,
    option,
    read_arms,
    show,
    switch,
    takes_options,
    trust_switch,
    words,
)
from tell.errors import TellError

if TYPE_CHECKING:
    from rich.console import Console

    from tell.progress import Display
    from tell.verbs.evaluate_endpoint import Server

MOST_AT_ONCE = 256
_of_benchmarks = partial(option, panel="Benchmarks (lm-evaluation-harness)")
_of_endpoint = partial(option, panel="A model behind an OpenAI-compatible server")


@dataclass(frozen=True)
class EvalOptions:
    run: Path = argument("RUN", "run folder")
    arms: tuple[str, ...] | None = option("--arms", "arms to score; default: those of the run", "A,B,...", read_arms)
    test: str | None = option("--test", "score on these rows instead", "FILE")
    rows: int | None = option("--rows", "score at most this many rows", "N", count)
    greedy: bool | None = option("--greedy/--no-greedy", "decode greedily")
    seed: int | None = option("--seed", "seed of the decoding", "N", count)
    sets: tuple[str, ...] = option("--set", "any key of the run; repeatable", "KEY=VALUE", default=())
    benchmarks: tuple[str, ...] | None = _of_benchmarks(
        "--benchmarks", "gsm8k, openbookqa, agieval[_en|_cn]", "A,B,...", words
    )
    benchmark_data: str | None = _of_benchmarks("--benchmark-data", "folder of their files; default: download", "DIR")
    benchmark_limit: int | None = _of_benchmarks("--benchmark-limit", "first N questions of each task", "N", count)
    benchmark_shots: int | None = _of_benchmarks("--benchmark-shots", "examples before each question", "K", count)
    benchmark_chat: bool | None = _of_benchmarks("--benchmark-chat/--no-benchmark-chat", "use the chat template")
    benchmark_anchor: bool | None = _of_benchmarks(
        "--benchmark-anchor/--no-benchmark-anchor", "put the anchor on the questions"
    )
    endpoint: str | None = _of_endpoint("--endpoint", "score this server, e.g. http://localhost:8000/v1", "URL")
    model: str | None = _of_endpoint("--model", "its name of the model; default: the only one", "NAME")
    anchor: bool | None = _of_endpoint(
        "--anchor/--no-anchor", "put the anchor on the prompts; default: unless the server is tell's own"
    )
    key_name: str = _of_endpoint("--key-name", "environment variable of the API key", "NAME", default="OPENAI_API_KEY")
    concurrency: int = _of_endpoint("--concurrency", "requests at once", "N", count, default=16)
    fresh: bool = _of_endpoint("--fresh", "ask again for what was answered before", default=False)
    trust_remote_code: bool = trust_switch()
    trust_scorer: bool = switch("--trust-scorer", "score by the run's own function (task.scorer)")
    as_json: bool = json_switch()


@takes_options
def evaluate(options: EvalOptions) -> None:
    """Score the arms of a run on its test rows, or on benchmarks.

    Scores have intervals. With --endpoint, a model behind an OpenAI-compatible server is scored on the same rows, next
    to the run's own answers. Benchmarks (--benchmarks) measure general ability: GSM8K, OpenBookQA, AGIEval.
    """
    if any(value is not None for name, value in vars(options).items() if name.startswith("benchmark")):
        _benchmark(options)
        return
    import tell
    from tell.cli.tables import show_metrics
    from tell.run.claim import Trust

    overrides = list(options.sets)
    server = _server(options)
    overrides += [] if options.greedy is None else [f"generate.greedy={str(options.greedy).lower()}"]
    overrides += [] if options.seed is None else [f"seed={options.seed}"]

    trust = Trust(options.trust_remote_code, options.trust_scorer)

    def work(display: Display) -> dict:
        if server is None:
            return tell.evaluate(
                options.run,
                arms=options.arms,
                test=options.test,
                rows=options.rows,
                overrides=overrides,
                trust=trust,
                display=display,
            )
        from tell.verbs.evaluate_endpoint import evaluate_endpoint

        return evaluate_endpoint(
            options.run,
            server,
            test=options.test,
            rows=options.rows,
            overrides=overrides,
            trust=trust,
            display=display,
        )

    show(options.as_json, work, show_metrics if server is None else _show_endpoint)


def _show_endpoint(console: Console, metrics: dict) -> None:
    """The table of arms, the verdict, and how the endpoint compares."""
    from rich.text import Text

    from tell.cli.tables import show_metrics
    from tell.score.verdict import against
    from tell.verbs.evaluate_endpoint import ENDPOINT

    show_metrics(console, metrics)
    if sentence := against(metrics, ENDPOINT):
        console.print(Text(sentence, style="bold"))


def _server(options: EvalOptions) -> Server | None:
    """The server of ``--endpoint``; None where the arms of the run are to be scored."""
    given = {"--model": options.model, "--anchor": options.anchor, "--fresh": options.fresh or None}
    if options.endpoint is None:
        if named := [flag for flag, value in given.items() if value is not None]:
            raise TellError("has no effect without --endpoint", where=named[0], remedy="Add it, or leave this out.")
        return None
    if not 1 <= options.concurrency <= MOST_AT_ONCE:
        what = f"{options.concurrency} requests at once"
        raise TellError(what, where="--concurrency", remedy=f"Choose 1 to {MOST_AT_ONCE}.")
    from tell.verbs.evaluate_endpoint import Server

    return Server(
        options.endpoint,
        options.model,
        options.anchor,
        options.key_name,
        options.concurrency,
        fresh=options.fresh,
        arms=options.arms,
    )


def _benchmark(options: EvalOptions) -> None:
    flags: dict[str, object] = {
        "--test": options.test,
        "--rows": options.rows,
        "--greedy": options.greedy,
        "--seed": options.seed,
        "--endpoint": options.endpoint,
    }
    flags |= {"--set": options.sets or None, "--trust-scorer": options.trust_scorer or None}
    if given := [flag for flag, value in flags.items() if value is not None]:
        raise TellError("has no effect on benchmarks", where=given[0], remedy="Leave it out.")
    from tell.cli.tables import benchmarks_table
    from tell.verbs.benchmark import BenchmarkOptions, benchmark

    def work(display: Display) -> dict:
        return benchmark(
            options.run,
            options.benchmarks,
            arms=options.arms,
            options=BenchmarkOptions(
                options.benchmark_data,
                options.benchmark_limit,
                options.benchmark_shots,
                options.benchmark_chat,
                options.benchmark_anchor,
            ),
            trust_remote_code=options.trust_remote_code,
            display=display,
        )

    show(options.as_json, work, lambda console, metrics: console.print(benchmarks_table(metrics["benchmarks"])))
