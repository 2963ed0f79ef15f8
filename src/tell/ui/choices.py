"""What is chosen on the page, as a command line of `tell`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlencode

from tell.config import Config
from tell.names import ARMS

_DATA = ("tune", "plan", "look")
_RUN = ("tune", "plan")
FLAGS: dict[str, tuple[str, tuple[str, ...]]] = {  # name of the field -> flag, verbs that take it
    "test": ("--test", _DATA),
    "columns": ("--columns", _DATA),
    "prompt": ("--prompt", _DATA),
    "answer": ("--answer", _DATA),
    "kind": ("--kind", _DATA),
    "schema": ("--schema", _DATA),
    "model": ("--model", _DATA),
    "general": ("--general", _RUN),
    "arms": ("--arms", _RUN),
    "minutes": ("--max-minutes", _RUN),
    "rows": ("--task-rows", _DATA),
    "test_rows": ("--test-rows", _RUN),
    "out": ("--out", ("tune",)),
}
FIELDS = ("data", *FLAGS)
MOST = 4000  # characters of a field
STANDARD = ",".join(Config().eval.arms)
CHOICES = [(arm.name, arm.label, arm.about, arm.name in Config().eval.arms) for arm in ARMS.values()]


@dataclass(frozen=True)
class Choice:
    """Fields of the form by name; a field that is left empty leaves the default."""

    values: Mapping[str, str]

    @classmethod
    def of(cls, given: Mapping[str, str], arms: list[str] | None = None) -> Choice:
        """From a query or a form, whose fields may be anybody's; unknown ones are left out."""
        values = {name: given[name].strip()[:MOST] for name in FIELDS if given.get(name, "").strip()}
        if arms:
            values["arms"] = ",".join(arms)
        if values.get("arms") == STANDARD:
            del values["arms"]
        return cls(values)

    def __getitem__(self, name: str) -> str:
        return self.values.get(name, "")

    @property
    def query(self) -> str:
        return urlencode(self.values)

    def command(self, verb: str, *more: str, **changed: str) -> list[str]:
        """The arguments of a verb. Values are joined to their flags, so that none can be read as another flag."""
        values = {**self.values, **changed}
        flags = [f"{flag}={values[name]}" for name, (flag, verbs) in FLAGS.items() if verb in verbs and name in values]
        return [verb, positional(values.get("data", "")), *flags, *more]


def positional(path: str) -> str:
    """A path as an argument that is not read as a flag."""
    return f"./{path}" if path.startswith("-") else path
