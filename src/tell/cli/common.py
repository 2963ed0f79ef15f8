"""Shared by the verbs: dataclasses of options, and flags that set configuration keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import wraps
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer

from tell.arm import KindName
from tell.errors import ConfigError, TellError, did_you_mean
from tell.names import ARMS

if TYPE_CHECKING:
    from rich.console import Console

    from tell.config import Config
    from tell.progress import Display

Parse = Callable[[str], object] | tuple[str, ...]
"""A parser of a flag's text, which raises ValueError, or the choices of its value."""
PORTS = 65_536


def number(text: str) -> float:
    """``1e4``, ``10_000``, ``0.5``."""
    value = float(text)
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{text!r} is not finite")
    return value


def count(text: str) -> int:
    """A whole number, also written ``1e4``."""
    try:
        return int(text)
    except ValueError:
        value = number(text)
    if value != int(value):
        raise ValueError(f"{text!r} is not whole")
    return int(value)


def port_number(text: str) -> int:
    """A port; 0 stands for any free one.

    Raises:
        TellError: there is no such port.
    """
    port = count(text)
    if not 0 <= port < PORTS:
        raise TellError(f"{port} is no port", where="--port", remedy=f"Choose one of 1 to {PORTS - 1:,}, or 0 for any.")
    return port


def words(text: str) -> tuple[str, ...]:
    """Comma-separated words."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def check_arm(name: str, flag: str = "--arm") -> str:
    """The name of an arm.

    Raises:
        TellError: an unknown arm.
    """
    if name not in ARMS:
        remedy = f"The arms are {', '.join(ARMS)}."
        raise TellError(f"unknown arm {name!r}", where=flag, remedy=remedy, nearest=did_you_mean(name, ARMS))
    return name


def template(text: str) -> str:
    r"""A template as shells pass it on, which keep ``\n`` and ``\t`` as two characters; ``\\`` is a backslash."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t"}.get(match[1], match[1]), text)


def read_arms(text: str) -> tuple[str, ...]:
    """Comma-separated arms."""
    return tuple(check_arm(name, "--arms") for name in words(text) or ("",))


def reader(flag: str, parse: Parse) -> Callable[[str], object]:
    """``parse`` as a parser for Typer, with our errors.

    Raises:
        TellError: ``parse`` does not accept the text.
    """

    def read(text: str) -> object:
        if isinstance(parse, tuple):
            if text not in parse:
                remedy, nearest = f"Use {' or '.join(parse)}.", did_you_mean(text, parse)
                raise TellError(f"unknown value {text!r}", where=flag, remedy=remedy, nearest=nearest)
            return text
        try:
            return parse(text)
        except ValueError:
            what = "whole number" if parse is count else "number"
            raise TellError(f"{text!r} is not a {what}", where=flag, remedy="Write e.g. 500, 1e4 or 2e5.") from None

    return read


def option(
    names: str,
    help: str,
    metavar: str | None = None,
    parse: Parse | None = None,
    default: object = None,
    panel: str | None = None,
) -> Any:
    """A field of a dataclass of options that is a flag.

    Args:
        names: as typed, e.g. ``"-o --out"``.
        parse: reads its text; without it Typer does, by the field's type.
        panel: the group of flags in which the help lists it.
    """
    flags = names.split()
    read = reader(flags[-1], parse) if parse else None
    info = typer.Option(*flags, help=help, metavar=metavar, parser=read, rich_help_panel=panel)
    return field(default=default, metadata={"typer": info})


def switch(name: str, help: str, panel: str | None = None) -> Any:
    """A boolean field of a dataclass of options, off unless its flag is given."""
    return option(name, help, default=False, panel=panel)


def argument(metavar: str, help: str, default: object = MISSING) -> Any:
    """A positional field of a dataclass of options."""
    return field(default=default, metadata={"typer": typer.Argument(metavar=metavar, help=help, show_default=False)})


def json_switch() -> Any:
    return switch("--json", "Print JSON alone on stdout.")


def trust_switch() -> Any:
    """For verbs that read a run folder, which may be somebody else's: its trust in code must be confirmed."""
    return switch("--trust-remote-code", "run code that comes with the model, as the run did")


def _show_keys(wanted: bool) -> None:
    if wanted:
        from tell.config_docs import config_docs

        typer.echo(config_docs(), nl=False)
        raise typer.Exit


@dataclass(frozen=True)
class Flag:
    """A flag that sets one key of the configuration; ``parse`` None makes it a switch."""

    name: str
    key: str
    help: str
    metavar: str | None = "TEXT"
    parse: Parse | None = str
    panel: str = "Data"
    verbs: tuple[str, ...] = ("tune", "plan", "anchor")

    @property
    def parameter(self) -> Parameter:
        """As a parameter of a Typer command."""
        name = self.name[2:].replace("-", "_") + "_"  # a verb may have an option of the same name
        kind, default = (bool, False) if self.parse is None else (str, None)
        made = option(self.name, f"{self.help} ({self.key})", self.metavar, self.parse, default, self.panel)
        return _parameter(name, kind, made)

    def is_of(self, verb: str) -> bool:
        """Whether a verb takes the flag: one of ``verbs``, or one that takes whole groups of another's flags."""
        like, panels = _LIKE.get(verb, ("", ()))
        return verb in self.verbs or (like in self.verbs and self.panel in panels)


_RUN = ("tune", "plan")
_ANCHORED = ("tune", "plan", "separate")
_ALL = ("tune", "plan", "anchor", "separate")
_MODEL, _GENERAL, _TRAINING = "Model and anchor", "General data", "Mixture and training"
_LIKE = {"look": ("plan", ("Data", _MODEL))}
FLAGS: tuple[Flag, ...] = (
    Flag("--test", "task.test", "test file; default: rows split off DATA", "FILE"),
    Flag("--unlabelled", "task.unlabelled", "prompts without answers, for the arm tell-pseudo", "FILE", verbs=_RUN),
    Flag("--columns", "task.columns", "names of the columns, e.g. prompt=q,answer=a", "NAMES", verbs=_ALL),
    Flag(
        *("--prompt", "task.prompt", "template of the prompt, e.g. 'Subject: {Subject}\\n\\n{Body}'", "TEMPLATE"),
        *(template, "Data", _ALL),
    ),
    Flag("--answer", "task.answer", "answer columns; several make one JSON object", "A,B,...", verbs=_ALL),
    Flag("--kind", "task.kind", "auto, json, label, labels or text", "KIND", ("auto", *get_args(KindName))),
    Flag("--schema", "task.schema", "JSON Schema of the answers; default: inferred", "FILE"),
    Flag("--scorer", "task.scorer", "your own scorer, package.module:function", "NAME", verbs=_RUN),
    Flag("--task-tokens", "task.tokens", "train on about this many task tokens", "N", number),
    Flag("--task-rows", "task.rows", "train on this many task rows", "N", count),
    Flag("--test-rows", "task.test_rows", "score at most this many test rows", "N", count, verbs=_RUN),
    Flag("--drop-overlap", "task.drop_overlap", "remove near-duplicates of test rows", None, None, verbs=_RUN),
    Flag("--model", "model.name", "folder, hub name or smollm2-135m", "NAME", str, _MODEL, _ALL),
    Flag(
        "--trust-remote-code", "model.trust_remote_code", "run code that comes with the model", None, None, _MODEL, _ALL
    ),
    Flag("--anchor", "anchor.text", "auto, none, the text, or @FILE", "TEXT", str, _MODEL, _ANCHORED),
    Flag(
        "--anchor-place",
        "anchor.place",
        "put the anchor in the user or system turn",
        "PLACE",
        ("user", "system"),
        _MODEL,
        _ALL,
    ),
    Flag("--candidates", "anchor.candidates", "instructions the model writes", "N", count, _MODEL, ("anchor",)),
    Flag(
        "--general",
        "general.source",
        "file, hub name, set by name, self or none",
        "SOURCE",
        str,
        _GENERAL,
        _ALL,
    ),
    Flag("--general-columns", "general.columns", "names of its columns", "NAMES", str, _GENERAL, _ALL),
    Flag("--general-ratio", "general.ratio", "general tokens per task token", "R", number, _GENERAL, _RUN),
    Flag("--general-tokens", "general.tokens", "general tokens", "N", number, _GENERAL, _RUN),
    Flag("--general-rows", "general.rows", "general rows", "N", count, _GENERAL, _RUN),
    Flag("--order", "mix.order", "shuffle or spread", "NAME", str, _TRAINING, _RUN),
    Flag("--repeat", "mix.repeat", "repetitions of each task row", "K", count, _TRAINING, _RUN),
    Flag("--preset", "preset", "modern or paper", "NAME", ("modern", "paper"), _TRAINING, _RUN),
    Flag("--lr", "train.learning_rate", "learning rate", "RATE", number, _TRAINING, _RUN),
    Flag(
        *("--fast", "train.fast", "auto, or off: train through plain transformers and peft", "NAME"),
        *(("auto", "off"), _TRAINING, _RUN),
    ),
    Flag("--search", "search.minutes", "minutes to search settings on folds of the rows", "N", number, "Run", _RUN),
    Flag("--max-minutes", "max_minutes", "shrink the run until it is predicted to fit", "N", number, "Run", _RUN),
    Flag("--arms", "eval.arms", "arms to score, comma-separated", "A,B,...", read_arms, "Run", _RUN),
    Flag("--greedy", "generate.greedy", "decode greedily", None, None, "Run", ("tune",)),
    Flag("--seed", "seed", "seed of every draw", "N", count, "Run", (*_ALL, "look")),
    Flag("--out", "out", "run folder", "DIR", str, "Run", ("tune",)),
)


_KEYS = typer.Option("--keys", callback=_show_keys, is_eager=True, help="List every key with default and meaning.")


@dataclass(frozen=True)
class Given:
    """The command line, before it becomes a Config."""

    data: str | None = argument("DATA", "file or hub name of the task data (task.data)", None)
    file: Path | None = option("-c --config", "YAML file; flags override it", "FILE")
    sets: tuple[str, ...] = option("--set", "any key; overrides everything else; repeatable", "KEY=VALUE", default=())
    keys: bool = field(default=False, metadata={"typer": _KEYS})
    flags: Mapping[str, object] = field(default_factory=dict)
    """Values of `FLAGS`, by name."""

    def load(self, verb: str) -> Config:
        """YAML, then flags, then ``--set``.

        Raises:
            TellError: no task data, or something is invalid; the error names the flag.
        """
        from tell.config import load_config
        from tell.nested import merge, nest

        typed: dict[str, object] = {} if self.data is None else {"task": {"data": self.data}}
        for flag in FLAGS:
            if flag.name in self.flags:
                typed = merge(typed, nest(flag.key, self.flags[flag.name]))
        try:
            config = load_config(self.file, typed, self.sets)
        except ConfigError as error:
            raise self._in_flags(error) from error
        if config.task.data is None:
            remedy = f"Pass a file, e.g. `tell {verb} tickets.jsonl`, or run `tell demo`, which has its own data."
            raise TellError("no task data given", remedy=remedy)
        return config

    def _in_flags(self, error: ConfigError) -> TellError:
        """The same error in terms of the flags that were typed."""
        for text in self.sets:
            key = text.partition("=")[0].strip()
            if error.problem is None and f"{key}.".startswith(f"{error.key}."):
                return TellError(error.what, where=f"--set {text}", remedy=error.remedy)
            if key == error.key:
                return error
        problem = error.problem or ""
        problem = problem[:1].lower() + problem[1:]
        names = [flag.name for flag in FLAGS if flag.name in self.flags and flag.key in (error.key, *error.conflict)]
        if len(names) > 1:
            return TellError(problem, where=" and ".join(names), remedy="Give one of them.")
        if names and not error.conflict:
            return TellError(problem, where=names[0], remedy=f"Change {names[0]}.")
        return error


def configured_by_run(given: Given, folder: Path, *, scores: bool) -> Given:
    """The configuration from a folder's run.yaml, except for trust in code, which only flags give.

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
    return replace(given, data=None, file=run.config)


def _parameter(name: str, kind: Any, made: Field[object]) -> Parameter:
    """An argument or flag for Typer, which needs text where we parse, and lists where we keep tuples."""
    info, default = made.metadata["typer"], made.default
    if info.parser:
        kind = str
    elif get_origin(kind) is tuple:
        kind, default = list[get_args(kind)[0]], None  # type: ignore[misc]  # made at run time
    if default is None:
        kind = kind | None
    default = Parameter.empty if default is MISSING else default
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _parameters(options: type) -> list[Parameter]:
    hints = get_type_hints(options)
    return [_parameter(f.name, hints[f.name], f) for f in fields(options) if "typer" in f.metadata]


def takes_options(function: Callable[..., None]) -> Callable[..., None]:
    """A Typer command from a function of ``options``, a dataclass whose annotated fields become arguments and flags.

    A function that also takes ``given`` gets DATA, ``-c``, ``--set`` and the flags of `FLAGS` for its verb.
    """
    hints = get_type_hints(function)
    flags = [flag for flag in FLAGS if "given" in hints and flag.is_of(function.__name__)]
    parameters = [*(_parameters(Given) if flags else ()), *(f.parameter for f in flags), *_parameters(hints["options"])]

    @wraps(function)
    def command(**values: object) -> None:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if v is not None}

        def make(kind: type, **more: object) -> object:
            return kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values}, **more)

        arguments = {"options": make(hints["options"])}
        if flags:
            typed = {flag.name: values.get(flag.parameter.name) for flag in flags}
            said = {name: value for name, value in typed.items() if value is not None and value is not False}
            arguments["given"] = make(Given, flags=said)
        function(**arguments)

    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # read by Typer
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def show(
    as_json: bool,
    work: Callable[[Display], dict],
    draw: Callable[[Console, dict], object],
    failed: Callable[[TellError], dict] | None = None,
) -> dict:
    """Do the work, then print its result, as JSON or as text; in JSON also what there is to say of an error."""
    from tell.cli.display import make_console, make_display
    from tell.cli.output import only_json

    with only_json(as_json) as emit:
        try:
            found = work(make_display())
        except TellError as error:
            if as_json and failed is not None:
                emit(failed(error))
            raise
        if as_json:
            emit(found)
        else:
            draw(make_console(), found)
    return found
