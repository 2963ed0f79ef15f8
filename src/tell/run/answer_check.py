"""Whether an answer, whole or still being written, has the form that a run's answers have. No torch."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from tell.data.schema import Schema, SlowPattern
from tell.data.unfinished import schema_faults
from tell.errors import TellError
from tell.files import read_json
from tell.folder import RunFolder


@dataclass(frozen=True)
class Check:
    """The form of a run's answers: by its schema, or one of its labels; without both nothing is known."""

    schema: Schema | None = None
    labels: frozenset[str] = frozenset()

    @classmethod
    def of(cls, folder: RunFolder) -> Check:
        """From the files of the run; damaged ones check nothing."""
        schema, labels = None, frozenset[str]()
        with suppress(OSError, TellError, LookupError, TypeError):
            labels = frozenset(map(str, read_json(folder.findings, remedy="")["kind"]["labels"]))
        with suppress(OSError, TellError):
            schema = Schema(read_json(folder.schema, remedy=""))
        return cls(schema, labels)

    def __call__(self, text: str, *, whole: bool = True) -> tuple[bool | None, str]:
        """Whether an answer has that form and, unless it is whole, whether it still can; None: not known. In words."""
        begun = text.strip()
        if self.schema is not None:
            with suppress(SlowPattern):
                fault = next(schema_faults(self.schema, text, whole=whole), "")
                return not fault, fault or ("follows the schema" if whole else "follows the schema so far")
        elif self.labels:
            known = any(begun == label or (not whole and label.startswith(begun)) for label in self.labels)
            return known, "a label of the task" if known else "no label of the task"
        return None, "" if whole else "…"
