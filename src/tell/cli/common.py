"""What the verbs share: flags that set configuration keys, number formats, and the nearest name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tell.errors import TellError

if TYPE_CHECKING:
    from tell.config import Config


# For verbs that read a run folder, which may be somebody else's: what it trusts, its user must trust too.
TRUST_CODE = typer.Option("--trust-remote-code", help="run code that comes with the model, as the run did")
TRUST_SCORER = typer.Option("--trust-scorer", help="score by the run's own function (task.scorer)")


def nearest(word: str, names: Iterable[str]) -> str:
    """``"; did you mean NAME?"`` for the name most like ``word``, or nothing."""
    close = difflib.get_close_matches(word, list(names), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def number(text: str) -> float:
    """``1e4``, ``10_000``, ``0.5``."""
    value = float(text)
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{text!r} is no finite number")
    return value


def count(text: str) -> int:
    """A whole number, also written ``1e4``."""
    try:
        return int(text)
    except ValueError:
        value = number(text)
    if value != int(value):
        raise ValueError(f"{text!r} is no whole number")
    return int(value)


def arms(text: str) -> tuple[str, ...]:
    """Comma-separated arms, each a known one.

    Raises:
        TellError: an unknown arm (with the nearest name), or none.
    """
    from tell.names import ARMS

    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names or ("",):
        if name not in ARMS:
            raise TellError(
                f"unknown arm {name!r}{nearest(name, ARMS)}", where="--arms", remedy=f"The arms are {', '.join(ARMS)}."
            )
    return names


def one_of(flag: str, *names: str) -> Callable[[str], str]:
    """A parser that takes one of ``names``, and else tells the nearest."""

    def parse(text: str) -> str:
        if text not in names:
            hint = nearest(text, names)
            raise TellError(f"unknown value {text!r}{hint}", where=flag, remedy=f"Use {' or '.join(names)}.")
        return text

    return parse


@dataclass(frozen=True)
class Flag:
    """A flag that sets one key of the configuration; ``parse`` None makes it a switch."""

    name: str
    key: str
    help: str
    metavar: str = "TEXT"
    parse: Callable[[str], Any] | None = str
    panel: str = "Data"
    verbs: frozenset[str] = frozenset({"tune", "plan", "anchor"})

    @property
    def parameter(self) -> inspect.Parameter:
        """As a parameter of a typer command."""
        shared = {"help": f"{self.help} ({self.key})", "rich_help_panel": self.panel, "show_default": False}
        if self.parse is None:
            kind: Any = Annotated[bool, typer.Option(self.name, **shared)]
        else:
            # the text is parsed by us, after typer: every fault then reads the same
            kind = Annotated[str | None, typer.Option(self.name, metavar=self.metavar, **shared)]
        default = False if self.parse is None else None
        return inspect.Parameter(self.attribute, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)

    @property
    def attribute(self) -> str:
        return "flag_" + self.name.removeprefix("--").replace("-", "_")

    def read(self, given: Any) -> Any:
        if self.parse is None:
            return given or None  # a switch that is not there says nothing
        if not isinstance(given, str):
            return given
        try:
            return self.parse(given)
        except ValueError:
            what = "whole number" if self.parse is count else "number"
            raise TellError(f"{given!r} is no {what}", where=self.name, remedy="Write e.g. 500, 1e4 or 2e5.") from None


_RUN = frozenset({"tune", "plan"})
_ALL = frozenset({"tune", "plan", "anchor", "separate"})
_ANCHORED = _RUN | {"separate"}
_TUNE = frozenset({"tune"})
FLAGS: tuple[Flag, ...] = (
    Flag("--test", "task.test", "test file; without it a test part is split off", "FILE"),
    Flag("--columns", "task.columns", "names of the columns, e.g. prompt=q,answer=a", "NAMES", verbs=_ALL),
    Flag("--kind", "task.kind", "auto, json, label or text", "KIND", one_of("--kind", "auto", "json", "label", "text")),
    Flag("--schema", "task.schema", "JSON Schema of the answers; else it is inferred", "FILE"),
    Flag("--scorer", "task.scorer", "your own scorer, package.module:function", "NAME", verbs=_RUN),
    Flag("--task-tokens", "task.tokens", "train on about this many task tokens", "N", number),
    Flag("--task-rows", "task.rows", "train on this many task rows", "N", count),
    Flag("--test-rows", "task.test_rows", "score at most this many test rows", "N", count, verbs=_RUN),
    Flag("--drop-overlap", "task.drop_overlap", "remove rows that nearly equal a test row", parse=None, verbs=_RUN),
    Flag("--model", "model.name", "folder, hub name or smollm2-135m", "NAME", panel="Model and anchor", verbs=_ALL),
    Flag(
        "--trust-remote-code",
        "model.trust_remote_code",
        "run code that comes with the model",
        parse=None,
        panel="Model and anchor",
        verbs=_ALL,
    ),
    Flag(
        "--anchor", "anchor.text", "auto, none, the text, or @FILE", "TEXT", panel="Model and anchor", verbs=_ANCHORED
    ),
    Flag(
        "--anchor-place",
        "anchor.place",
        "where it stands: user or system",
        "PLACE",
        one_of("--anchor-place", "user", "system"),
        panel="Model and anchor",
        verbs=_ALL,
    ),
    Flag(
        "--candidates",
        "anchor.candidates",
        "instructions the model writes",
        "N",
        count,
        "Model and anchor",
        frozenset({"anchor"}),
    ),
    Flag("--general", "general.source", "file, hub name, self or none", "SOURCE", str, "General data", _ALL),
    Flag("--general-columns", "general.columns", "names of its columns", "NAMES", str, "General data", _ALL),
    Flag("--general-ratio", "general.ratio", "general tokens per task token", "R", number, "General data", _RUN),
    Flag("--general-tokens", "general.tokens", "general tokens", "N", number, "General data", _RUN),
    Flag("--general-rows", "general.rows", "general rows", "N", count, "General data", _RUN),
    Flag("--order", "mix.order", "shuffle or spread", "NAME", str, "Mixture and training", _RUN),
    Flag("--repeat", "mix.repeat", "times each task row occurs", "K", count, "Mixture and training", _RUN),
    Flag(
        "--preset",
        "preset",
        "modern or paper",
        "NAME",
        one_of("--preset", "modern", "paper"),
        "Mixture and training",
        _RUN,
    ),
    Flag("--lr", "train.learning_rate", "learning rate", "RATE", number, "Mixture and training", _RUN),
    Flag(
        "--fast",
        "train.fast",
        "auto, or off: train through plain transformers and peft",
        "NAME",
        one_of("--fast", "auto", "off"),
        "Mixture and training",
        _RUN,
    ),
    Flag("--max-minutes", "max_minutes", "do less until it is predicted to fit", "N", number, "Run", _RUN),
    Flag("--arms", "eval.arms", "arms to score, comma-separated", "A,B,...", arms, "Run", _RUN),
    Flag("--greedy", "generate.greedy", "decode greedily", parse=None, panel="Run", verbs=_TUNE),
    Flag("--seed", "seed", "seed of every draw", "N", count, "Run", _ALL),
    Flag("--out", "out", "run folder", "DIR", str, "Run", _TUNE),
)


@dataclass
class Given:
    """What was given on the command line, before it is a Config."""

    data: str | None = None
    file: Path | None = None
    sets: tuple[str, ...] = ()
    flags: dict[str, Any] = field(default_factory=dict)  # flag -> value

    def nested(self) -> dict[str, Any]:
        """Flags as the nested mapping `tell.config.load_config` takes."""
        out: dict[str, Any] = {"task": {"data": self.data}} if self.data is not None else {}
        keys = {flag.name: flag.key for flag in FLAGS}
        for name, value in self.flags.items():
            *sections, last = keys[name].split(".")
            place = out
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value
        return out

    def load(self, verb: str) -> Config:
        """YAML, then flags, then ``--set``.

        Raises:
            TellError: no task data, or anything wrong in the three; a flag is called by its name.
        """
        from tell.config import load_config

        if self.data is None and self.file is None and not any(s.startswith("task.data=") for s in self.sets):
            raise _no_data(verb)
        try:
            config = load_config(self.file, self.nested(), self.sets)
        except TellError as error:
            raise self._by_flag(error) from error
        if config.task.data is None:
            raise _no_data(verb)
        return config

    def _by_flag(self, error: TellError) -> TellError:
        """The same error, in terms of what was typed."""
        for text in self.sets:
            if error.what.startswith(f"unknown key {text.partition('=')[0].partition('.')[0]}"):
                return TellError(error.what, where=f"--set {text}", remedy=error.remedy)
        names = {flag.key: flag.name for flag in FLAGS if flag.name in self.flags}
        key, colon, rest = error.what.partition(": ")
        if not colon or any(text.startswith(f"{key}=") for text in self.sets):
            return error
        rest = rest[:1].lower() + rest[1:]
        if key in names:
            return TellError(rest, where=names[key], remedy=f"Change {names[key]}.")
        typed = [name for k, name in names.items() if k.rpartition(".")[0] == key and k.rpartition(".")[2] in rest]
        if len(typed) > 1:  # two amounts at once
            return TellError(rest, where=" and ".join(typed), remedy="Give one of them.")
        return error


def configured_by_run(given: Given, folder: Path, *, scores: bool) -> None:
    """Let a folder's run.yaml stand for what would have been typed, but for code: that is trusted by flags alone.

    Args:
        scores: the run's scorer will be called.

    Raises:
        TellError: the run was made with code, and the flag that trusts it was not given.
    """
    from tell.folder import RunFolder
    from tell.run.claim import check_trust, read_run_config

    run = RunFolder(folder)
    config, flags = read_run_config(run), given.flags
    scorer = not scores or flags.get("--scorer") == config.task.scorer
    flag = f"--scorer {config.task.scorer}"
    check_trust(run, config, code="--trust-remote-code" in flags, scorer=scorer, scorer_flag=flag)
    given.file = run.config


def _no_data(verb: str) -> TellError:
    return TellError(
        "no task data given",
        remedy=f"Give a file, e.g. `tell {verb} tickets.jsonl`, or run `tell demo`, which brings its own.",
    )


def configured(verb: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb ``DATA``, ``-c``, ``--set`` and every flag of `FLAGS` that is meant for it.

    The verb takes a `Given` as its first argument, and its own options after it.
    """
    mine = [flag for flag in FLAGS if verb in flag.verbs]
    data = Annotated[
        str | None,
        typer.Argument(metavar="DATA", help="file or hub name of the task data (task.data)", show_default=False),
    ]
    file = Annotated[
        Path | None,
        typer.Option("-c", "--config", metavar="FILE", help="YAML file; flags go over it", show_default=False),
    ]
    sets = Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="any key, over all else; repeatable", show_default=False),
    ]
    keys = Annotated[
        bool,
        typer.Option("--keys", callback=_show_keys, is_eager=True, help="List every key with default and meaning."),
    ]
    kind = inspect.Parameter.KEYWORD_ONLY
    first = [
        inspect.Parameter("data", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=data),
        inspect.Parameter("config_file", kind, default=None, annotation=file),
        inspect.Parameter("sets", kind, default=None, annotation=sets),
        inspect.Parameter("keys", kind, default=False, annotation=keys),
    ]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [p.replace(kind=kind) for p in list(inspect.signature(function, eval_str=True).parameters.values())[1:]]

        @wraps(function)
        def wrapped(**values: Any) -> None:
            typed = {flag.name: flag.read(values.pop(flag.attribute, None)) for flag in mine}
            given = Given(
                data=values.pop("data"),
                file=values.pop("config_file"),
                sets=tuple(values.pop("sets") or ()),
                flags={name: value for name, value in typed.items() if value is not None},
            )
            values.pop("keys")
            function(given, **values)

        parameters = [*first, *(flag.parameter for flag in mine), *own]
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapped

    return decorate


def _show_keys(wanted: bool) -> None:
    if wanted:
        from tell.config_docs import config_docs

        typer.echo(config_docs(), nl=False)
        raise typer.Exit


def read_number(flag: str, text: str | None, parse: Callable[[str], Any] = count) -> Any:
    """A number flag of a verb without configuration; None stays None."""
    return None if text is None else Flag(flag, "", "", parse=parse).read(text)
