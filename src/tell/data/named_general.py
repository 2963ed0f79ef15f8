"""General data sets by name (``general_sets.yaml``): streamed as far as a budget needs, and kept under ``$TELL_HOME``.

A set is kept as one file per amount, so that a run on the same budget needs no network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from tell.data.sources import hub_reachable
from tell.errors import TellError, first_line
from tell.files import parse_yaml, write_jsonl
from tell.home import make_folder, tell_home

CHARACTERS = 4.0  # a token, in English
MARGIN = 1.5  # rows may be too long for the model, or without an answer
SMALLEST = 2**15  # tokens that are streamed at least: three set aside a few rows for measuring
SHUFFLED = 10_000  # rows of the buffer they are drawn from: many sets are sorted by where they come from
Record = dict[str, object]


class GeneralSet(BaseModel):
    """A data set of the hub that has a name here.

    Attributes:
        rows: about how many there are.
        revision: the commit that is read; ``main`` where none could be verified.
        reader: makes rows of prompt and completion where the columns do not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    hub: str
    revision: str
    columns: str
    rows: int
    languages: str
    licence: str
    about: str
    config: str | None = None
    split: str = "train"
    reader: str | None = None

    @property
    def notice(self) -> str:
        """Origin and licence, for the run's record."""
        pinned = f"at {self.revision[:8]}" if self.revision != "main" else "at main, which may change"
        return f"general data: {self.name} is {self.hub} {pinned}; licence: {self.licence}"

    @property
    def facts(self) -> dict[str, str]:
        """For findings.json."""
        return {"name": self.name, "hub": self.hub, "revision": self.revision, "licence": self.licence}


@cache
def general_sets() -> dict[str, GeneralSet]:
    """Every named set, in the order of the file."""
    file = files("tell.data").joinpath("general_sets.yaml")
    sets = parse_yaml(file.read_text(encoding="utf-8"), where=str(file))
    assert isinstance(sets, dict)  # shipped with TELL
    return {name: GeneralSet(name=name, **entry) for name, entry in sets.items()}


@dataclass(frozen=True)
class Kept:
    """A part of a set on this machine; ``notice`` says where it is not what was asked for."""

    path: Path | None
    notice: str | None = None


def streamed_tokens(tokens: float) -> int:
    """Tokens that are streamed for a budget: a power of two, so that nearly equal budgets share a file."""
    return max(SMALLEST, 2 ** math.ceil(math.log2(max(1.0, MARGIN * tokens))))


def keep_set(known: GeneralSet, tokens: float) -> Kept:
    """The file with enough rows of a set for a budget, streamed from the hub where it is not there yet.

    Where the hub cannot be reached, the largest part on this machine will do; without any, the path is None.

    Raises:
        TellError: the hub has no such data set, or its rows are not as described.
    """
    wanted = streamed_tokens(tokens)
    path = _part(known, wanted)
    if path.exists():
        return Kept(path)
    reachable, why = hub_reachable()
    if reachable:
        try:
            rows = list(_enough(_rows(known), wanted * CHARACTERS))
        except TellError:
            raise
        except Exception as error:  # of the HTTP client or of a reader of datasets: the connection breaks, say
            why = first_line(error)
        else:
            write_jsonl(make_folder(path.parent) / path.name, rows)
            return Kept(path)
    sizes = kept_sizes(known)
    if not sizes:
        return Kept(None, f"{known.name} cannot be had, since the hub cannot be read ({why})")
    best = max(sizes)
    what = f"the hub cannot be read ({why}), so the {best:,} tokens of an earlier run are used"
    return Kept(_part(known, best), f"general data: {known.name}: {what}")


def kept_sizes(known: GeneralSet) -> list[int]:
    """Tokens of each part of a set that is on this machine."""
    stem = _part(known, 0).stem.removesuffix("0")
    found = (p.stem.removeprefix(stem) for p in _part(known, 0).parent.glob(f"{stem}*.jsonl"))
    return [int(size) for size in found if size.isdecimal()]


def _part(known: GeneralSet, tokens: int) -> Path:
    return tell_home() / "general" / f"{known.name}-{known.revision[:8]}-{tokens}.jsonl"


def _rows(known: GeneralSet) -> Iterator[Record]:
    """Rows in a fixed random order, with the columns that are read."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        stream = datasets.load_dataset(
            known.hub, known.config, split=known.split, revision=known.revision, streaming=True
        )
    except DatasetNotFoundError as error:
        remedy = "Choose another set: `tell general` lists them."
        raise TellError(
            f"the hub says: {first_line(error)}", where=f"general.source={known.name}", remedy=remedy
        ) from error
    if known.reader is not None:  # replies follow their prompts, which shuffling would part
        return READERS[known.reader](stream)
    used = [part.partition("=")[2] for part in known.columns.split(",")]
    if stream.column_names and (lost := [name for name in used if name not in stream.column_names]):
        what = f"{known.hub} has no column {lost[0]!r}, but {', '.join(stream.column_names)}"
        raise TellError(what, where=f"general.source={known.name}", remedy="Name its columns with --general-columns.")
    shuffled = stream.shuffle(seed=0, buffer_size=SHUFFLED)
    return ({name: row[name] for name in used} for row in shuffled)


def _enough(rows: Iterable[Record], characters: float) -> Iterator[Record]:
    """The first rows that have so many characters."""
    seen = 0
    for row in rows:
        yield row
        seen += len(json.dumps(row, ensure_ascii=False, default=str))
        if seen >= characters:
            return


def best_replies(messages: Iterable[Record]) -> Iterator[Record]:
    """Message trees (OpenAssistant): each first prompt with its best ranked reply; a reply follows its prompt."""
    prompts: dict[object, object] = {}
    for message in messages:
        if message["parent_id"] is None and message["role"] == "prompter":
            prompts[message["message_id"]] = message["text"]
        elif message["role"] == "assistant" and message["parent_id"] in prompts and message.get("rank") == 0:
            yield {"prompt": prompts.pop(message["parent_id"]), "completion": message["text"]}


READERS: dict[str, Callable[[Iterable[Record]], Iterator[Record]]] = {"best_replies": best_replies}
