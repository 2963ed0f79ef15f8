"""What is chosen on the page, as a command line of `tell`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from starlette.datastructures import QueryParams

from tell.config import Config
from tell.data.form import Form, place_of
from tell.names import ARMS

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
    """Fields of the form by name; a field that is left empty leaves the default.

    Attributes:
        replaced: the template that other columns of the prompt have replaced.
    """

    values: Mapping[str, str]
    replaced: str = ""

    @classmethod
    def of(cls, given: QueryParams) -> Choice:
        """From a query, whose fields may be anybody's; unknown ones are left out.

        Raises:
            TellError: a column has braces in its name.
        """
        values = {name: text[:MOST] for name in ("data", *FLAGS) if (text := given.get(name, "").strip())}
        ask, reply, arms = ([text for text in given.getlist(name) if text] for name in ("ask", "reply", "arm"))
        old, made = values.get("prompt", ""), Form("\n\n".join(map(place_of, ask)), tuple(reply)).typed
        known = Form(old).asked
        values |= {"prompt": old if known == tuple(ask) else made["prompt"]} if ask else {}
        values |= {"answer": made["answer"]} if reply else {}
        ticked = "arm" in given and tuple(arms) != tuple(STANDARD)
        values |= {"arms": ",".join(arms) or "none"} if ticked else {}
        words = re.sub(r"\{[^{}]*\}|\\n", "", old).strip()  # else it is only columns, one below the other
        return cls(values, old if known and words and values["prompt"] != old else "")

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


def picked(data: Mapping[str, Any]) -> dict[str, Any]:
    """Sheets and columns of a file, and those that prompt and answer are made from, as `tell look --json` says."""
    names, form, parts = data.get("names", []), data.get("form"), data.get("columns", {})
    ask = (Form(form["prompt"]).asked or (form["prompt"],)) if form else (parts.get("prompt"), parts.get("input"))
    reply = form["answer"] if form else (parts.get("answer"),)
    sheets = {"sheets": data.get("sheets", []), "sheet": data.get("sheet")}
    return {**sheets, "names": names, "ask": [x for x in ask if x in names], "reply": [x for x in reply if x in names]}


def positional(path: str) -> str:
    """A path as an argument that is not read as a flag."""
    return f"./{path}" if path.startswith("-") else path
