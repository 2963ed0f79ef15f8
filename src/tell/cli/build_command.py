"""Make the paper's datasets from their public sources."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tell.cli.common import argument, count, number, option, switch, takes_options
from tell.cli.output import say
from tell.errors import TellError


def group() -> None:
    """Make the paper's datasets from their public sources."""


@dataclass(frozen=True)
class HaluCotJsonOptions:
    source: Path = argument("SOURCE", "HaluEval's general_data.json, or train_inputs.jsonl")
    out: Path = option("-o --out", "folder to write", "DIR", default=Path("halu_cot_json"))
    teacher: str = option("--teacher", "offline, or an endpoint's model name", "NAME", default="offline")
    base_url: str | None = option("--base-url", "OpenAI-compatible endpoint; key: $OPENAI_API_KEY", "URL")
    rows: int | None = option("--rows", "number of training rows", "N", count)
    test: Path | None = option("--test", "test rows", "FILE")
    seed: int = option("--seed", "seed of the subset", "N", count, default=42)
    concurrency: int = option("--concurrency", "concurrent requests", "N", count, default=4)
    price_in: float | None = option("--price-in", "price of a million prompt tokens", "P", number)
    price_out: float | None = option("--price-out", "price of a million completion tokens", "P", number)
    overwrite: bool = switch("--overwrite", "Replace an existing dataset.")


@takes_options
def halu_cot_json(options: HaluCotJsonOptions) -> None:
    """Make Halu-CoT-JSON from HaluEval rows: a teacher's thought, the human label, strict JSON."""
    name, offline = options.teacher, options.teacher == "offline"
    if offline and options.base_url is not None:
        remedy = "Name the endpoint's model with --teacher."
        raise TellError("an endpoint is set without a model", where="--base-url", remedy=remedy)
    import tell
    from tell.cli.display import make_display
    from tell.paper import Limits, OfflineTeacher, OpenAITeacher, Prices, Replace, Teacher

    writer: Teacher = OfflineTeacher()
    if not offline:
        prices = Prices(options.price_in, options.price_out)
        writer = OpenAITeacher(options.base_url, name, limits=Limits(concurrency=options.concurrency), prices=prices)
    with make_display().bar(f"thoughts by {name}", None) as advance:
        done = 0

        def progress(now: int, total: int) -> None:
            nonlocal done
            advance(now - done, f"of {total:,}")
            done = now

        built = tell.build_halu_cot_json(
            options.source,
            Replace(options.out) if options.overwrite else options.out,
            teacher=writer,
            rows=options.rows,
            seed=options.seed,
            test=options.test,
            progress=progress,
        )
    for line in built.lines():
        say(line)


@dataclass(frozen=True)
class IsEnNewsOptions:
    source: Path = argument("SOURCE", "WMT21 test documents: newstest2021.*.xml, or a folder of them")
    out: Path = option("-o --out", "folder to write", "DIR", default=Path("is_en_news"))
    train: Path | None = option("--train", "training documents: newsdev2021.*.xml, dev-*.jsonl, or a folder", "PATH")
    extra: tuple[str, ...] = option(
        "--extra", "further pairs: FILE.json, FILE.tmx, or EN,IS[,IDS]; repeatable", "FILES", default=()
    )
    direction: str = option("--direction", "en-is, is-en or both", "D", default="both")
    times: float = option("--times", "words of extra.jsonl relative to train.jsonl", "N", number, default=5)
    seed: int = option("--seed", "seed of the further pairs", "N", count, default=42)
    overwrite: bool = switch("--overwrite", "Replace an existing dataset.")


@takes_options
def is_en_news(options: IsEnNewsOptions) -> None:
    """Make IS-EN-NEWS from WMT21's documents: whole news texts between English and Icelandic."""
    import tell
    from tell.paper import Replace

    given = {name: value for name, value in vars(options).items() if name != "overwrite"}
    if options.overwrite:
        given["out"] = Replace(options.out)
    for line in tell.build_is_en_news(**given).lines():
        say(line)
