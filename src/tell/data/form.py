"""The form of a task whose rows are spread over columns: a template of the prompt, and the columns of the answer."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from tell.data.cell_text import RowFault, as_json, as_text, is_blank
from tell.data.json_text import read_json
from tell.data.parquet import BadCell
from tell.data.workbook_process import ERRORS
from tell.errors import TellError, did_you_mean
from tell.shown import listed

if TYPE_CHECKING:
    from tell.config_sections import TaskConfig

Record = Mapping[str, object]
CellType = Literal["text", "number", "boolean", "any"]
PROMPT = "\0prompt"  # columns that no file has
ANSWER = "\0answer"
MOST_EMPTY = 0.2
"""Share of rows that may lack their answer, or prompt; these are left out."""
_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")
# As JSON writes it, up to the 15 digits that a double keeps; 007 and +1 are codes.
_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,14})(?:\.\d{1,15})?(?:[eE][+-]?\d{1,2})?")
_BRACES = re.compile("[{}]")
_BARE = re.compile(r"[\w.,/:@%+=-]+")
_UNSAFE = re.compile(r'["$`!]')  # within double quotes, to a shell


@dataclass(frozen=True)
class Form:
    r"""Prompt and answer as columns make them.

    Attributes:
        prompt: a template, ``"Subject: {Subject}\n\n{Body}"``, ``{{`` and ``}}`` being braces; None: to be guessed.
        answer: columns; one is the answer itself, several are the keys of a JSON object in this order; none: to be
            guessed.
        types: of the cells of each answer column, as the task's own rows have them; none: not known yet.
    """

    prompt: str | None = None
    answer: tuple[str, ...] = ()
    types: tuple[CellType, ...] = ()

    @property
    def columns(self) -> dict[str, str]:
        """``columns`` of findings.json."""
        return {"prompt": self.prompt or "", "answer": ", ".join(self.answer)}

    @property
    def name(self) -> str:
        """For display: ``Subject+Body/Category+Priority``."""
        return f"{'+'.join(self.asked)}/{'+'.join(self.answer)}"

    @property
    def asked(self) -> tuple[str, ...]:
        """The columns of the prompt, each once."""
        return tuple(dict.fromkeys(match[1] for match in _PLACE.finditer(self.prompt or "") if match[1]))

    @property
    def typed(self) -> dict[str, str]:
        """Template and columns of the answer as they are typed."""
        template = (self.prompt or "").replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
        return {"prompt": template, "answer": _comma_separated(self.answer)}

    @property
    def flags(self) -> str:
        """The form as the flags to type."""
        return f"--prompt {quoted(self.typed['prompt'], always=True)} --answer {quoted(self.typed['answer'])}"

    def to_dict(self) -> dict[str, Any]:
        """``form`` of findings.json."""
        return {"prompt": self.prompt, "answer": list(self.answer), "types": list(self.types)}

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Form:
        """From `to_dict`, without the types."""
        return cls(found["prompt"], tuple(found["answer"]))

    def settled(self, records: Sequence[Record], where: str) -> Form:
        """The form with the types of its answer columns, its columns being checked.

        Raises:
            TellError: as `known`.
        """
        form = self.known(records, where)
        return form if form.types else replace(form, types=tuple(_type_of(records, name) for name in form.answer))

    def known(self, records: Sequence[Record], where: str) -> Form:
        """The form, the columns of its prompt and of its answer being checked where it has them.

        Raises:
            TellError: a template without columns or with a single brace, a column that is not in the file, or one that
                both have.
        """
        form = self if self.prompt is None else self.asking(records, where)
        _check_columns(form.answer, _names(records), "--answer", where)
        if (leaked := next((name for name in form.answer if name in form.asked), None)) is not None:
            what = f"the column {leaked!r} is in the prompt as well, so that the model would read its answer there"
            raise TellError(what, where="--answer", remedy="Take it out of --prompt or of --answer.")
        return form

    def asking(self, records: Sequence[Record], where: str) -> Form:
        """The form for a file that need not have the answers: only the columns of its prompt are checked."""
        names, template = _names(records), self.prompt or ""
        if template in names and not _BRACES.search(template):
            template = f"{{{template}}}"
        form = replace(self, prompt=template)
        single = next((match[0] for match in _PLACE.finditer(template) if match[0] in "{}"), None)
        if single or not form.asked or not set(form.asked) <= set(names):
            _refuse_braces(template, names)
        if single:
            what = f"has a single {single!r} in {template!r}"
            raise TellError(what, where="--prompt", remedy="Write {{ and }} for braces, {Column} for a column.")
        if not form.asked:
            plain = [name for name in names if not _BRACES.search(name)] or names
            example = place_of(did_you_mean(template, plain) or plain[0])
            what, remedy = f"{template!r} names no column", f"Write its columns in braces, e.g. {example}."
            raise TellError(what, where="--prompt", remedy=remedy)
        _check_columns(form.asked, names, "--prompt", where)
        return form

    def render(self, record: Record) -> str:
        """The prompt of a record; empty where all of its columns are.

        Raises:
            RowFault: a cell cannot be read.
        """
        texts = {name: as_text(_sound(record.get(name), name)) for name in self.asked}
        if all(map(is_blank, texts.values())):
            return ""
        # One pass over the template: braces in a cell are text.
        return _PLACE.sub(lambda m: texts[m[1]] if m[1] else m[0][0], self.prompt or "")

    def reply(self, record: Record) -> object:
        """The answer of a record: its cell, or a JSON object as text; None where every cell is empty.

        Raises:
            RowFault: a cell cannot be read.
        """
        cells = [_sound(record.get(name), name) for name in self.answer]
        if all(map(_is_empty, cells)):
            return None
        if len(cells) == 1:
            return cells[0]
        parts = zip(self.answer, cells, self.types, strict=True)
        values = {name: _typed(cell, kind) for name, cell, kind in parts}
        return json.dumps(values, ensure_ascii=False, default=as_json, allow_nan=False)

    @property
    def answer_column(self) -> str:
        """The column that the answer has in the records of `formed`."""
        return self.answer[0] if len(self.answer) == 1 else ANSWER


def form_of(task: TaskConfig) -> Form | None:
    """The form that ``task.prompt`` and ``task.answer`` describe; None where neither is given."""
    return Form(task.prompt, task.answer) if task.prompt is not None or task.answer else None


def formed(
    records: Sequence[tuple[int, Record]], form: Form, where: str
) -> tuple[list[tuple[int, dict[str, object]]], list[tuple[int, str]]]:
    """Records of prompt and answer alone, and (number, reason) of the rows that are left out.

    Raises:
        TellError: a cell that cannot be read (with its row), or more than 20 % of the rows without prompt or answer.
    """
    rows: list[tuple[int, dict[str, object]]] = []
    left: list[tuple[int, str]] = []
    lacking = {"--prompt": 0, "--answer": 0}
    for number, record in records:
        try:
            prompt, answer = form.render(record), form.reply(record)
        except (RowFault, ValueError) as error:
            remedy = error.remedy if isinstance(error, RowFault) else "Fix that cell."
            raise TellError(str(error), where=f"{where}:{number}", remedy=remedy) from error
        if answer is None:
            lacking["--answer"] += 1
            left.append((number, f"has no answer ({listed(form.answer)} empty)"))
        elif not prompt:
            lacking["--prompt"] += 1
            left.append((number, f"has no prompt ({listed(form.asked)} empty)"))
        else:
            rows.append((number, {PROMPT: prompt, form.answer_column: answer}))
    for flag, count in lacking.items():
        if count > MOST_EMPTY * len(records):
            names = form.answer if flag == "--answer" else form.asked
            empty = f"{listed(names)} {'is' if len(names) == 1 else 'are'} empty"
            what = f"{empty} in {count:,} of {len(records):,} rows, more than {MOST_EMPTY:.0%}"
            more = ", or give those rows as --unlabelled from a file of their own" if flag == "--answer" else ""
            raise TellError(what, where=where, remedy=f"Fill them in, delete these rows{more}.")
    return rows, left


def empty_cells(records: Sequence[tuple[int, Record]], form: Form) -> list[str]:
    """Notices of cells that become null, because other answer columns of their rows are filled."""
    if len(form.answer) < 2:
        return []
    answered = [r for _, r in records if not all(_is_empty(r.get(name)) for name in form.answer)]
    counts = {name: sum(_is_empty(r.get(name)) for r in answered) for name in form.answer}
    return [f"{name!r} is null in {n:,} of {len(answered):,} answers: empty cells" for name, n in counts.items() if n]


def place_of(name: str) -> str:
    """The place of a column in a template.

    Raises:
        TellError: its name has braces.
    """
    if _BRACES.search(name):
        what = f"the column {name!r} has braces in its name, which stand for columns in a template"
        raise TellError(what, where="--prompt", remedy="Rename the column, or choose others with --prompt.")
    return f"{{{name}}}"


def quoted(text: str, *, always: bool = False) -> str:
    """A word of a command line."""
    if not always and _BARE.fullmatch(text):
        return text
    return shlex.quote(text) if _UNSAFE.search(text) else f'"{text}"'


def _comma_separated(names: Iterable[str]) -> str:
    return ",".join('"' + name.replace('"', '""') + '"' if re.search(r'[,"]', name) else name for name in names)


def _names(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record))


def _refuse_braces(template: str, names: Sequence[str]) -> None:
    """Refuse a template that seems to mean a column with braces in its name."""
    meant = _BRACES.sub("", template)
    for name in names:
        if (bare := _BRACES.sub("", name)) and bare != name and bare in meant:
            place_of(name)


def _check_columns(wanted: Iterable[str], names: Sequence[str], flag: str, where: str) -> None:
    for name in wanted:
        if name not in names:
            near = did_you_mean(name, names)
            near = near or next((n for n in names if n.lower().strip() == name.lower().strip()), None)
            what, remedy = f"there is no column {name!r} in {where}", f"The columns are {listed(names)}."
            raise TellError(what, where=flag, remedy=remedy, nearest=near and repr(near))


def _is_empty(cell: object) -> bool:
    return cell is None or cell != cell or (isinstance(cell, str) and not cell.strip())


def _sound(cell: object, name: str) -> object:
    """A cell that can be read and is no formula error, which spreadsheets export as its name."""
    if isinstance(cell, BadCell):
        raise RowFault(f"has a cell that {cell.why}")
    if isinstance(cell, str) and cell in ERRORS:
        raise RowFault(f"holds the formula error {cell} (column {name!r})", "Fix the formula, or empty the cell.")
    return cell


def _type_of(records: Sequence[Record], name: str) -> CellType:
    """The type of a column: numbers and booleans only if all of its cells are, so that codes such as 007 stay text."""
    cells = [cell for record in records if not _is_empty(cell := record.get(name)) and not isinstance(cell, BadCell)]
    if any(isinstance(cell, list | dict) for cell in cells):
        return "any"
    if cells and all(_boolean(cell) is not None for cell in cells):
        return "boolean"
    if cells and all(_number(cell) is not None for cell in cells):
        return "number"
    return "text"


def _boolean(cell: object) -> bool | None:
    if isinstance(cell, str):
        return {"true": True, "false": False}.get(cell.strip().lower())
    return cell if isinstance(cell, bool) else None


def _number(cell: object) -> object:
    if isinstance(cell, str):
        return read_json(cell.strip()) if _NUMBER.fullmatch(cell.strip()) else None
    return None if isinstance(cell, bool) or not hasattr(cell, "__int__") else cell


def _typed(cell: object, kind: CellType) -> object:
    """A cell as a JSON value of its column's type; as it is where it is not of this type."""
    if _is_empty(cell):
        return None
    if kind == "text":
        return as_text(cell)
    found = _boolean(cell) if kind == "boolean" else _number(cell) if kind == "number" else None
    return cell if found is None else found
