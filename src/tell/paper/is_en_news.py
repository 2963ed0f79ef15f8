"""IS-EN-NEWS, the paper's translation task, made from the WMT21 news documents (arXiv 2404.00914)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from tell.data.formats import check_file, read_records
from tell.data.subset import take_tokens
from tell.errors import TellError
from tell.files import write_jsonl, write_text
from tell.paper.destination import Destination, writable_folder
from tell.paper.parallel_texts import Document, Pairs, plain_suffix, read_pairs, read_wmt

Direction = Literal["en-is", "is-en"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
LANGUAGES = {"en": "English", "is": "Icelandic"}
LONG = 50  # words; a further pair must have more, as in the paper
TIMES = 5.0  # size of the paper's SFT reference, in multiples of the training data
_SHARED = 5  # words; shorter lines ("Weather") may occur in any document
_NAMES = {"training": ("newsdev*{}*.xml*", "dev-{}.jsonl*"), "test": ("newstest*{}*.xml*", "test-{}.jsonl*")}


def anchor_text(direction: Direction) -> str:
    """The instruction at the head of every published prompt: the paper's anchor prompt for this task.

    Word for word from the data published with Zeng et al., arXiv 2404.00914, under Apache-2.0
    (github.com/LinesHogan/Token-Efficient-Leverage-Learning).
    """
    source, target = (LANGUAGES[code] for code in direction.split("-"))
    return (
        f"This text is in {source} and needs to be translated into {target}. Please translate only the text, "
        "strictly maintaining the original content order without making any other changes."
    )


@dataclass(frozen=True)
class Counts:
    """Documents written for one direction.

    Attributes:
        train, test: documents.
        extra: rows of ``extra.jsonl``, the training documents among them; 0 where it was not written.
        times: English words of ``extra.jsonl`` over those of the training documents.
    """

    train: int
    test: int
    extra: int = 0
    times: float = 1.0


@dataclass(frozen=True)
class BuiltNews:
    """The datasets that were written: counts by direction, and sentences for the user."""

    folder: Path
    directions: dict[Direction, Counts]
    notices: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """A summary for the screen."""
        out = []
        for direction, n in self.directions.items():
            text = f"{n.train:,} training and {n.test:,} test documents in {self.folder / direction}"
            if n.extra:
                text += f"; extra.jsonl has {n.extra:,} rows, {n.times:.1f} times the training words"
            out.append(text)
        return out + self.notices


def build_is_en_news(
    source: str | Path,
    out: Destination,
    *,
    train: str | Path | None = None,
    extra: Sequence[Pairs] = (),
    direction: Direction | Literal["both"] = "both",
    times: float = TIMES,
    seed: int = 42,
) -> BuiltNews:
    """Write ``train.jsonl``, ``test.jsonl``, ``anchor.txt`` and ``extra.jsonl`` into a folder per direction.

    A row is a document (``prompt``, ``completion``), its lines joined by line breaks, in the order of document ids;
    the first reference is the completion. Prompts leave the anchor out: anchor, an empty line and the prompt make the
    published prompt. Completions keep the published opening ("Sure, here is the Icelandic translation: ").
    ``extra.jsonl`` holds the training rows and further pairs of more than `LONG` English words, for the arm that is
    trained on more task data. A document that shares a pair of lines with a test document is left out.

    Args:
        source: test documents: ``newstest2021.en-is.all.xml`` of WMT21, the published ``test-en-is.jsonl``, or a
            folder that holds one of them for each direction; plain, ``.gz`` or ``.zst``.
        out: folder to write ``en-is/`` and ``is-en/`` into, or `Replace` with it to replace the datasets they hold.
        train: training documents likewise: ``newsdev2021.en-is.xml`` or the published ``dev-en-is.jsonl``; default:
            the folder `source`.
        extra: further pairs, each as `tell.paper.parallel_texts.read_pairs` takes it, English first.
        direction: ``en-is``, ``is-en`` or ``both``.
        times: English words of ``extra.jsonl``, over those of the training documents; all pairs where they are fewer.
        seed: draws the further pairs.

    Raises:
        TellError: bad input, or a dataset in `out` that must not be replaced. No file is written then.
    """
    wanted = _directions(direction)
    if not times > 1:
        raise TellError(f"times is {times:g}", where="--times", remedy="Use a number above 1, e.g. 5.")
    folder = writable_folder(out, wanted)
    parts = {name: (_documents(train or source, name, "training"), _documents(source, name, "test")) for name in wanted}
    pairs = [doc for spec in extra for doc in read_pairs(spec, ("en", "is")) if doc.words("en") > LONG]
    if extra and not pairs:
        remedy = "Use longer texts, or add the documents that lines belong to (ENGLISH,ICELANDIC,IDS)."
        what = f"have no pair of more than {LONG} English words"
        raise TellError(what, where=", ".join(map(str, extra)), remedy=remedy)
    notices: list[str] = []
    made: dict[Direction, _Rows] = {}
    for name, (training, test) in parts.items():
        tested = {pair for doc in test for pair in _line_pairs(doc)}
        training = _apart(training, tested, f"{name}: training documents", notices)
        if not training:
            what = f"every {name} training document is a test document too"
            raise TellError(what, where=str(train or source), remedy="Pass other documents with --train.")
        more, share = _more(training, _apart(pairs, tested, f"{name}: further pairs", notices), times, seed)
        if extra and share < times * 0.9:
            notices.append(f"{name}: extra.jsonl reaches {share:.1f} times the training words, not {times:g}")
        made[name] = _Rows(training, test, more, share)
    return BuiltNews(folder, {name: rows.write(folder / name, name) for name, rows in made.items()}, notices)


@dataclass(frozen=True)
class _Rows:
    """The documents of one direction, ready to be written."""

    train: list[Document]
    test: list[Document]
    more: list[Document]
    times: float

    def write(self, folder: Path, direction: Direction) -> Counts:
        rows = [_row(doc, direction) for doc in self.train]
        extra = [*rows, *(_row(doc, direction) for doc in self.more)] if self.more else []
        write_text(folder / "anchor.txt", anchor_text(direction))
        write_jsonl(folder / "test.jsonl", [_row(doc, direction) for doc in self.test])
        if extra:
            write_jsonl(folder / "extra.jsonl", extra)
        else:
            (folder / "extra.jsonl").unlink(missing_ok=True)  # of an earlier build
        write_jsonl(folder / "train.jsonl", rows)  # last: it marks the dataset as complete
        return Counts(len(rows), len(self.test), len(extra), self.times)


def _directions(direction: str) -> tuple[Direction, ...]:
    chosen = tuple(name for name in DIRECTIONS if direction in (name, "both"))
    if not chosen:
        raise TellError(f"direction {direction!r} is unknown", where="--direction", remedy="Use en-is, is-en or both.")
    return chosen


def _documents(place: str | Path, direction: Direction, role: str) -> list[Document]:
    """The documents of a file, or of the one file for that direction and role in a folder."""
    path = Path(place)
    if path.is_dir():
        patterns = [pattern.format(direction) for pattern in _NAMES[role]]
        found = sorted(file for pattern in patterns for file in path.glob(pattern))
        if len(found) != 1:
            what = f"has {len(found)} files" if found else "has no file"
            remedy = f"Pass the file itself{' with --train' if role == 'training' else ''}, and --direction."
            what = f"{what} of {direction} {role} documents ({' or '.join(patterns)})"
            raise TellError(what, where=str(path), remedy=remedy)
        path = found[0]
    path = check_file(path)
    held, documents = read_wmt(path) if plain_suffix(path) == ".xml" else _published(path)
    if held != direction:
        remedy = f"Use --direction {held}, or a folder with a file for each direction."
        raise TellError(f"has {held} documents, and {direction} is requested", where=str(path), remedy=remedy)
    return documents


def _published(path: Path) -> tuple[str, list[Document]]:
    """Direction and documents of rows as the paper's authors published them (``query``, ``response``)."""
    documents: list[Document] = []
    heads = {name: (f"{anchor_text(name)}\n\n ", _opening(name)) for name in DIRECTIONS}
    held: Direction | None = None
    for line, record in read_records(path):
        query, response = str(record.get("query", "")), str(record.get("response", ""))
        held = held or next((name for name, (head, _) in heads.items() if query.startswith(head)), None)
        if held is None or not query.startswith(heads[held][0]) or not response.startswith(heads[held][1]):
            remedy = "Use the published dev-*.jsonl or test-*.jsonl of one direction, or WMT21's XML."
            raise TellError("is not a row of IS-EN-NEWS", where=f"{path}:{line}", remedy=remedy)
        texts = (query.removeprefix(heads[held][0]), response.removeprefix(heads[held][1]))
        lines = {code: tuple(text.split("\n")) for code, text in zip(held.split("-"), texts, strict=True)}
        documents.append(Document(str(line), lines, f"{path}:{line}"))
    return str(held), documents


def _opening(direction: Direction) -> str:
    return f"Sure, here is the {LANGUAGES[direction.split('-')[1]]} translation: \n\n "


def _row(doc: Document, direction: Direction) -> dict[str, str]:
    source, target = direction.split("-")
    # the published prompt has a space before the text; the anchor and an empty line precede it
    return {"prompt": f" {doc.text(source)}", "completion": f"{_opening(direction)}{doc.text(target)}"}


def _line_pairs(doc: Document) -> Iterable[tuple[str, str]]:
    pairs = zip(doc.texts["en"], doc.texts["is"], strict=False)
    return ((en.strip(), is_.strip()) for en, is_ in pairs if len(en.split()) > _SHARED)


def _apart(docs: list[Document], tested: set[tuple[str, str]], what: str, notices: list[str]) -> list[Document]:
    """The documents that share no pair of lines with a test document."""
    kept = [doc for doc in docs if not any(pair in tested for pair in _line_pairs(doc))]
    if len(kept) < len(docs):
        notices.append(f"{what}: {len(docs) - len(kept):,} share lines with a test document and were left out")
    return kept


def _more(training: list[Document], pairs: list[Document], times: float, seed: int) -> tuple[list[Document], float]:
    """Pairs that bring the English words to `times` those of the training documents, and the ratio they reach."""
    have = sum(doc.words("en") for doc in training)
    words = np.array([doc.words("en") for doc in pairs], dtype=np.int64)
    wanted = (times - 1) * have
    chosen = sorted(take_tokens(words, wanted, seed)) if wanted < words.sum() else range(len(pairs))
    more = [pairs[i] for i in chosen]
    return more, (have + sum(doc.words("en") for doc in more)) / have
