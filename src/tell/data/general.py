"""Sources of general rows, by the name that ``general.source`` gives them; anything else is a file or hub name.

To add a source, add an entry here. Rows that the model writes come from the caller (`tell.run.self_written`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from tell.config import Config
from tell.config_sections import GeneralConfig
from tell.data.builtin import load_builtin
from tell.data.named_general import GeneralSet, general_sets, keep_set, kept_sizes
from tell.data.sources import Loaded, file_fingerprint, load
from tell.errors import TellError
from tell.files import expanded
from tell.names import ARMS

Target = Literal["text", "untuned"]


@dataclass(frozen=True)
class GeneralSource:
    """A source of general rows.

    Attributes:
        name: what ``general.source`` says, or the path or hub name.
        instead: the source to use instead; empty: itself.
        read: the rows; None where the model writes them, or there are none.
        written: the model writes the rows.
        fingerprint: SHA-256 (hexadecimal) of the rows without parsing them; None where that needs reading.
        fixed: a file or hub name, whose rows depend on neither the model nor the configuration.
        named: a data set of ``general_sets.yaml``, with its revision and licence.
        notices: on where the rows are from, for the user.
    """

    name: str
    instead: str = ""
    read: Callable[[], Loaded] | None = None
    written: bool = False
    fingerprint: Callable[[], str | None] = lambda: None
    fixed: bool = False
    named: GeneralSet | None = None
    notices: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether it has no rows."""
        return self.read is None and not self.written and not self.instead and self.named is None


_SOURCES = (
    GeneralSource("auto", instead="builtin"),
    GeneralSource("builtin", read=load_builtin),
    GeneralSource("self", written=True),
    GeneralSource("none"),
    *(GeneralSource(name, named=known) for name, known in general_sets().items()),
)
SOURCES = {source.name: source for source in _SOURCES}


def general_source(name: str, columns: str | None = None) -> GeneralSource:
    """The source that ``general.source`` names; a name that is no entry of `SOURCES` is a file or hub name."""
    if name in SOURCES:
        return SOURCES[name]

    def fingerprint() -> str | None:
        path = expanded(name)
        return file_fingerprint(path, columns, "general") if path.is_file() else None

    return GeneralSource(
        name, read=lambda: load(name, name="general", columns=columns), fingerprint=fingerprint, fixed=True
    )


def is_given(config: GeneralConfig) -> bool:
    """Whether the source is the user's own choice of rows: a file, a hub name or a named set."""
    return config.source not in SOURCES or SOURCES[config.source].named is not None


def given_rows(config: GeneralConfig, tokens: float) -> Loaded:
    """The rows of a source that `is_given`; of a named set at least about so many tokens.

    Raises:
        TellError: the source cannot be read; also a named set that cannot be had.
    """
    source = general_source(config.source, config.columns)
    if source.named is not None:
        source = _kept(source.named, config, tokens)
        if source.named is None:
            raise TellError(
                f"{config.source} cannot be had", where="general.source", remedy="Use a file, or go online."
            )
    assert source.read is not None  # a file, also of a named set, or a hub name
    return source.read()


def refuse_absent(config: GeneralConfig) -> None:
    """For a study, whose cells must not take other rows than their names say.

    Raises:
        TellError: a named set is not on this machine and cannot be had.
    """
    source = SOURCES.get(config.source)
    if source is not None and source.named is not None and not kept_sizes(source.named):
        given_rows(config, 0.0)


def is_empty(config: GeneralConfig) -> bool:
    """Whether no general row is requested."""
    return config.is_zero or (config.source in SOURCES and SOURCES[config.source].empty)


def is_builtin(config: GeneralConfig) -> bool:
    """Whether the source is the built-in rows, given or by default."""
    known = SOURCES.get(config.source)
    return known is not None and (known.instead or known.name) == "builtin"


def resolve_source(config: Config, *, tokens: float = 0.0) -> GeneralSource:
    """The source of a run's general rows; nothing is written unless a requested arm is trained on it.

    Args:
        tokens: general tokens that the run needs, to stream as many of a named set.

    Raises:
        TellError: a named set is not on the hub, or is given columns.
    """
    source = general_source(config.general.source, config.general.columns)
    if source.fixed or source.empty:
        return source
    if source.named is not None:
        return _kept(source.named, config.general, tokens)
    if is_empty(config.general) or not any(_mixed(arm) for arm in config.eval.arms):
        return SOURCES["none"]
    return SOURCES[source.instead] if source.instead else source


def general_target(config: Config, *, wrote_builtin: bool) -> Target:
    """What general rows are trained on: their text, or the untuned model's distributions over them.

    Another model's answers, trained on as text, make a model forget its own (docs/explanation/lab.md), so that over
    the built-in rows every other model than theirs keeps its own distributions.

    Args:
        wrote_builtin: the run's model wrote the built-in rows.
    """
    if config.train.general_target != "auto":
        return config.train.general_target
    known = SOURCES.get(config.general.source)
    absent = known is not None and known.named is not None and not kept_sizes(known.named)  # `_kept` takes the default
    return "untuned" if (absent or is_builtin(config.general)) and not wrote_builtin else "text"


def _kept(known: GeneralSet, config: GeneralConfig, tokens: float) -> GeneralSource:
    """A named set as a file on this machine; the default source where the set cannot be had."""
    if config.columns is not None:
        what = f"general.columns has no effect on {known.name}, whose columns are known"
        raise TellError(what, where="--general-columns", remedy=f"Leave it out, or name the hub's {known.hub}.")
    kept = keep_set(known, tokens)
    if kept.path is None:
        found = SOURCES[SOURCES["auto"].instead]
        return replace(found, notices=(f"general data: {kept.notice}; the default, {found.name}, is used instead",))
    file = general_source(str(kept.path), known.columns)
    return replace(file, named=known, notices=(known.notice, *([kept.notice] if kept.notice else [])))


def _mixed(arm: str) -> bool:
    """Whether an arm's adapter depends on the mixture: SFT of as many steps counts those of TELL."""
    adapter = ARMS[arm].adapter
    return adapter is not None and ARMS[adapter].mixture != "task"
