"""Make the paper's datasets from their public sources."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tell.cli.common import number, read_number
from tell.cli.output import say
from tell.errors import TellError


def group() -> None:
    """Make the paper's datasets from their public sources."""


def halu_cot_json(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="HaluEval's general_data.json, or train_inputs.jsonl")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="folder to write")] = Path("halu_cot_json"),
    teacher: Annotated[
        str, typer.Option("--teacher", metavar="NAME", help="offline, or an endpoint's model name")
    ] = "offline",
    base_url: Annotated[
        str | None, typer.Option("--base-url", metavar="URL", help="OpenAI-compatible endpoint; key: $OPENAI_API_KEY")
    ] = None,
    rows: Annotated[str | None, typer.Option("--rows", metavar="N", help="this many training rows")] = None,
    test: Annotated[Path | None, typer.Option("--test", metavar="FILE", help="test rows")] = None,
    seed: Annotated[str, typer.Option("--seed", metavar="N", help="decides the subset")] = "42",
    concurrency: Annotated[str, typer.Option("--concurrency", metavar="N", help="requests at a time")] = "4",
    price_in: Annotated[
        str | None, typer.Option("--price-in", metavar="P", help="price of a million tokens in")
    ] = None,
    price_out: Annotated[
        str | None, typer.Option("--price-out", metavar="P", help="price of a million tokens out")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a dataset that lies there.")] = False,
) -> None:
    """Halu-CoT-JSON from HaluEval rows: a thought by a teacher, the people's label, strict JSON."""
    numbers = {"rows": read_number("--rows", rows), "seed": read_number("--seed", seed)}
    prices = read_number("--price-in", price_in, number), read_number("--price-out", price_out, number)
    parallel = read_number("--concurrency", concurrency)
    if teacher == "offline" and base_url is not None:
        raise TellError(
            "an endpoint without a model", where="--base-url", remedy="Name the endpoint's model with --teacher."
        )
    import tell
    from tell.cli.display import make_display
    from tell.paper import Limits, OfflineTeacher, OpenAITeacher, Prices, Replace

    writer = OfflineTeacher()
    if teacher != "offline":
        writer = OpenAITeacher(base_url, teacher, limits=Limits(concurrency=parallel), prices=Prices(*prices))
    with make_display().bar(f"thoughts by {teacher}", None) as advance:
        done = 0

        def progress(now: int, total: int) -> None:
            nonlocal done
            advance(now - done, f"of {total:,}")
            done = now

        built = tell.build_halu_cot_json(
            source, Replace(out) if overwrite else out, teacher=writer, test=test, progress=progress, **numbers
        )
    for line in built.lines():
        say(line)


def is_en_news(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="WMT21 test documents: newstest2021.*.xml, or a folder of them")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="folder to write")] = Path("is_en_news"),
    train: Annotated[
        Path | None,
        typer.Option("--train", metavar="PATH", help="training documents: newsdev2021.*.xml, dev-*.jsonl, or a folder"),
    ] = None,
    extra: Annotated[
        list[str] | None,
        typer.Option(
            "--extra", metavar="FILES", help="further pairs: FILE.json, FILE.tmx, or EN,IS[,IDS]; may be repeated"
        ),
    ] = None,
    direction: Annotated[str, typer.Option("--direction", metavar="D", help="en-is, is-en or both")] = "both",
    times: Annotated[str, typer.Option("--times", metavar="N", help="size of extra.jsonl over train.jsonl")] = "5",
    seed: Annotated[str, typer.Option("--seed", metavar="N", help="draws the further pairs")] = "42",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a dataset that lies there.")] = False,
) -> None:
    """IS-EN-NEWS from WMT21's documents: whole news texts between English and Icelandic."""
    numbers = {"times": read_number("--times", times, number), "seed": read_number("--seed", seed)}
    import tell
    from tell.paper import Replace

    place = Replace(out) if overwrite else out
    built = tell.build_is_en_news(source, place, train=train, extra=extra or (), direction=direction, **numbers)
    for line in built.lines():
        say(line)
