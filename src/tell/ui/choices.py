"""What is chosen on the page, as a command line of `tell`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlencode

from starlette.datastructures import QueryParams

from tell.config import Config
from tell.data.form import Form, place_of
from tell.data.formats import column_names
from tell.errors import TellError
from tell.files import expanded
from tell.names import ARMS
from tell.ui.ui_root import UiRoot

_RUN = ("tune", "plan")
_DATA = (*_RUN, "look")
FLAGS: dict[str, tuple[str, tuple[str, ...]]] = {  # name of the field -> flag, verbs that take it
    **{name: (f"--{name}", _DATA) for name in ("test", "columns", "prompt", "answer", "kind", "schema", "model")},
    **{name: (f"--{name}", _RUN) for name in ("general", "arms")},
    "minutes": ("--max-minutes", _RUN),
    "rows": ("--task-rows", _DATA),
    "test_rows": ("--test-rows", _RUN),
    "out": ("--out", ("tune",)),
}
MOST = 4000  # characters of a field
STANDARD = Config().eval.arms


@dataclass(frozen=True)
class Choice:
    """Fields of the form by name; a field that is left empty leaves the default."""

    values: Mapping[str, str]

    @classmethod
    def of(cls, given: QueryParams) -> Choice:
        """From a query, whose fields may be anybody's; unknown ones are left out.

        Raises:
            TellError: a column has braces in its name.
        """
        values = {name: text[:MOST] for name in ("data", *FLAGS) if (text := given.get(name, "").strip())}
        ask, reply, arms = ([text for text in given.getlist(name) if text] for name in ("ask", "reply", "arm"))
        flags = shlex.split(Form("\n\n".join(map(place_of, ask)), tuple(reply)).flags)
        values |= {"prompt": flags[1]} if ask else {}
        values |= {"answer": flags[3]} if reply else {}
        values |= {"arms": ",".join(arms) or "none"} if "arm" in given else {}
        if values.get("arms") == ",".join(STANDARD):
            del values["arms"]
        return cls(values)

    def __getitem__(self, name: str) -> str:
        return self.values.get(name, "")

    @property
    def query(self) -> str:
        return urlencode(self.values)

    @property
    def arms(self) -> list[tuple[str, str, str, bool, bool]]:
        """Name, label, what it is, whether it is chosen and whether it is by default, of every arm."""
        chosen = self["arms"].split(",") if self["arms"] else STANDARD
        return [(arm.name, arm.label, arm.about, arm.name in chosen, arm.name in STANDARD) for arm in ARMS.values()]

    def command(self, verb: str, *more: str, **changed: str) -> list[str]:
        """The arguments of a verb. Values are joined to their flags, so that none can be read as another flag."""
        values = {**self.values, **changed}
        flags = [f"{flag}={values[name]}" for name, (flag, verbs) in FLAGS.items() if verb in verbs and name in values]
        return [verb, positional(values.get("data", "")), *flags, *more]

    def columns(self, root: UiRoot) -> list[str]:
        """The names of the file's columns; none where it cannot be read, or is on the hub."""
        with suppress(TellError, OSError, ValueError):
            return column_names(root.path / expanded(self["data"]))
        return []

    def picked(self, names: Sequence[str], read: Mapping[str, str]) -> dict[str, list[str]]:
        """The columns of prompt and answer.

        Args:
            names: of the file.
            read: part to column, or a template of columns, as the file was read; empty where it could not be.
        """
        prompt, answer = (read.get(part) or self[part] for part in ("prompt", "answer"))
        ask = [name for name in names if f"{{{name}}}" in prompt or name in (prompt, read.get("input"))]
        reply = [name for name in names if name in (answer, *answer.split(", "), *answer.split(","))]
        return {"ask": sorted(ask, key=lambda name: prompt.find(f"{{{name}}}")), "reply": reply}


def positional(path: str) -> str:
    """A path as an argument that is not read as a flag."""
    return f"./{path}" if path.startswith("-") else path
