"""Splits into train, validation and test by seed; equal prompts never straddle a split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tell.data.example import Example, Message
from tell.data.label_text import are_labels, as_label, list_form
from tell.errors import TellError
from tell.seeds import shuffled

Group = list[int]  # rows of equal prompt
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Splits:
    """The parts, each in the order of the input.

    Attributes:
        exact_duplicates: `split`: rows that repeat an earlier row in full (kept, on the same side);
            `split_given_test`: training rows removed because the test file holds the same row.
    """

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    exact_duplicates: int


def split(examples: Sequence[Example], *, seed: int, test_fraction: float, validation_fraction: float) -> Splits:
    """Train, validation and test rows, split by seed before any row is repeated.

    Rows with the same prompt (all turns before the answer) form a group that stays on one side, so no test prompt is
    trained on. Sizes are the nearest that such groups allow, with at least one row in train and one in test; validation
    may be empty. Where answers are labels, groups are exchanged so that each label is trained, if need be at the cost
    of test rows, and tested too where it has a second row and the test part has room.

    Args:
        test_fraction: of all rows, in (0, 1).
        validation_fraction: of the rows that are not test rows, in [0, 1).

    Raises:
        TellError: fewer than two different prompts.
    """
    n = len(examples)
    if n < 2:
        what = f"has {'one row' if n else 'no rows'} in all; a test row and a training row are needed"
        remedy = "Add examples (15 is a good start), or give test rows with --test."
        raise TellError(what, where=_file(examples), remedy=remedy)
    groups = prompt_groups(examples)
    if len(groups) < 2:
        what = f"all {n} rows have the same prompt, so none can be held out for testing"
        remedy = "Add rows with other prompts, or give test rows with --test."
        raise TellError(what, where=_file(examples), remedy=remedy)
    labels = _labels(examples)
    order = [groups[i] for i in shuffled(len(groups), seed)]
    wanted = min(max(1, round(test_fraction * n)), n - 1)
    test, rest = _fill(order, wanted)
    if not test:  # every group is larger than the test part should be
        smallest = min(range(len(order)), key=lambda i: len(order[i]))
        test, rest = [order[smallest]], order[:smallest] + order[smallest + 1 :]
    _share(rest, test, labels, all_of_it=True, leave=1)
    _share(test, rest, labels, all_of_it=False)
    left = n - _size(test)
    validation, rest = _fill(rest, min(round(validation_fraction * left), left - 1))
    _share(rest, validation, labels, all_of_it=True)
    return Splits(
        _pick(examples, rest),
        _pick(examples, validation),
        _pick(examples, test),
        n - len({example.hash for example in examples}),
    )


def split_given_test(
    train_examples: Sequence[Example], test_examples: Sequence[Example], *, seed: int, validation_fraction: float
) -> Splits:
    """The given test rows, with validation rows split off the training rows.

    Training rows that equal a test row in full are removed and counted; rows that share only the prompt are
    left to `find_overlap`.

    Raises:
        TellError: no test row, or no training row left.
    """
    if not test_examples:
        raise TellError("has no rows", where="--test", remedy="Use a file with at least one test row.")
    held = {example.hash for example in test_examples}
    kept = [example for example in train_examples if example.hash not in held]
    removed = len(train_examples) - len(kept)
    if not kept:
        what = f"every one of its {removed} rows is also in the test file" if removed else "has no rows"
        raise TellError(what, where=_file(train_examples), remedy="Use training rows that are not test rows.")
    groups = prompt_groups(kept)
    order = [groups[i] for i in shuffled(len(groups), seed)]
    validation, rest = _fill(order, min(round(validation_fraction * len(kept)), len(kept) - 1))
    _share(rest, validation, _labels(kept), all_of_it=True)
    return Splits(_pick(kept, rest), _pick(kept, validation), list(test_examples), removed)


def with_validation(parts: Splits, held: Sequence[Example]) -> tuple[Splits, int]:
    """The parts with given validation rows, and how many rows were left out for being in two parts.

    A row that is also a test row is a test row; one that is also a training row is a validation row.

    Raises:
        TellError: no validation or no training row is left.
    """
    tested, held_out = ({example.hash for example in rows} for rows in (parts.test, held))
    validation = [example for example in held if example.hash not in tested]
    train = [example for example in parts.train if example.hash not in held_out]
    if not train or not validation:
        what = "every training row is also in it" if validation else "every row is also a test row"
        raise TellError(what, where="task.validation", remedy="Use validation rows that occur nowhere else.")
    lost = len(held) - len(validation) + len(parts.train) - len(train)
    return replace(parts, train=train, validation=validation), lost


def _file(examples: Sequence[Example]) -> str | None:
    return (examples[0].origin.rpartition(":")[0] or None) if examples else None


def prompt_groups(examples: Sequence[Example]) -> list[Group]:
    """Indices by equal prompt, in order of first appearance."""
    groups: dict[tuple[Message, ...], Group] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.prompt, []).append(i)
    return list(groups.values())


def _labels(examples: Sequence[Example]) -> list[set[str]] | None:
    """The labels of each row; None where the answers are not labels."""
    answers = [as_label(example.answer) for example in examples]
    if (form := list_form(answers)) is not None:
        return [set(form.split(answer) or ()) for answer in answers]
    return [{answer} for answer in answers] if are_labels(answers) else None


def _fill(groups: list[Group], wanted: int) -> tuple[list[Group], list[Group]]:
    """The first groups that fit into ``wanted`` rows, and the groups left over."""
    taken: list[Group] = []
    rest: list[Group] = []
    size = 0
    for group in groups:
        if size + len(group) <= wanted:
            taken.append(group)
            size += len(group)
        else:
            rest.append(group)
    return taken, rest


def _share(
    part: list[Group], other: list[Group], labels: list[set[str]] | None, *, all_of_it: bool, leave: int = 0
) -> None:
    """Give ``part``, in place, a group of each label that only ``other`` has, for one of the same size it can spare.

    Args:
        all_of_it: take the only group of a label too, without an exchange where none can be spared.
        leave: groups that ``other`` keeps at least.
    """
    if labels is None:
        return
    mine, theirs = _holders(part, labels), _holders(other, labels)
    for label in sorted(theirs.keys() - mine.keys()):
        if mine[label] or (theirs[label] < 2 and not all_of_it):
            continue
        holders = [group for group in other if any(label in labels[i] for i in group)]
        for group in holders:
            spared = [g for g in part if len(g) == len(group) and all(mine[name] > 1 for i in g for name in labels[i])]
            kept = all(theirs[name] > 1 for i in group for name in labels[i]) or all_of_it
            if not kept or not (spared or (all_of_it and len(other) > leave)):
                continue
            other.remove(group)
            part.append(group)
            if spared:
                part.remove(spared[0])
                other.append(spared[0])
            mine, theirs = _holders(part, labels), _holders(other, labels)
            break


def _holders(groups: list[Group], labels: list[set[str]]) -> Counter[str]:
    """In how many groups each label occurs."""
    return Counter(label for group in groups for label in {name for i in group for name in labels[i]})


def _size(groups: list[Group]) -> int:
    return sum(map(len, groups))


def _pick(examples: Sequence[Example], groups: list[Group]) -> list[Example]:
    return [examples[i] for i in sorted(i for group in groups for i in group)]
