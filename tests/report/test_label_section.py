"""The page's section about labels, from metrics.json alone, whatever that has in it."""

from __future__ import annotations

import pytest

from report.sample import make_sample
from tell.files import write_json
from tell.report.label_section import HEAT, NONE, OTHERS, label_tables
from tell.report.page import render


def line(label, support, answers, **more):
    right = answers.get(label, 0) / support if support else None
    return {"label": label, "precision": None, "recall": right, "f1": right, "support": support, "given": 1} | {
        "answers": answers,
        "others": 0,
        "none": 0,
        **more,
    }


def metrics_of(rows, occurring=None):
    return {"labels": {"shown": len(rows), "occurring": occurring or len(rows), "arms": {"base": [], "tell": rows}}}


def test_the_matrix_is_shaded_by_shares_of_a_row():
    rows = [line("a", 8, {"a": 6, "b": 1}, none=1), line("b", 4, {"b": 4}), line("c", 0, {})]
    found = label_tables(metrics_of(rows, 60))
    assert (found.arm, found.hidden, found.columns, found.numbered) == ("tell", 57, ["a", "b", "c", NONE], False)
    (_, first), (_, second), (_, empty) = found.matrix
    assert [cell.shade for cell in first] == ["right h6", "wrong h1", "", "wrong h1"]
    assert [cell.shade for cell in second] == ["", f"right h{HEAT}", "", ""]
    assert not any(cell.shade or cell.count for cell in empty)
    assert label_tables(metrics_of([line("a", 2, {"a": 1}, others=1)])).columns == ["a", OTHERS]


def test_many_labels_have_numbers_with_their_names_for_screen_readers(tmp_path):
    rows = [line(f"<i>label {i}</i>", 1, {f"<i>label {i}</i>": 1}) for i in range(70)]
    folder = make_sample(tmp_path / "run", rows=10)
    write_json(folder.metrics, folder.read(folder.metrics) | metrics_of(rows, 70))
    page = render(folder)
    assert "<i>label" not in page and page.count('class="heard"') == 50
    assert '<span aria-hidden="true">50</span>' in page and "labels with the most test rows; 20 more occur" in page
    assert " style=" not in page.split('id="labels"')[1].split("</section>")[0]  # the page's policy forbids it


@pytest.mark.parametrize(
    "labels",
    [None, [], 3, {"arms": None}, {"arms": {"tell": None}}, {"arms": {"tell": [3, {"x": 1}]}}, {"arms": []}],
)
def test_without_labels_there_is_no_section(labels):
    assert label_tables({"labels": labels}) is None


def test_odd_values_are_shown_as_unknown_or_nothing():
    rows = [{"label": 3, "f1": "high", "support": None, "answers": {"3": "many"}, "none": float("nan")}, {"label": "x"}]
    found = label_tables({"labels": {"occurring": "all", "arms": {"base": rows}}})
    assert (found.arm, found.hidden, found.matrix, found.lines[0].f1.known) == ("base", 0, [], False)
    found = label_tables({"labels": {"arms": {"base": rows[:1]}}})
    assert [cell.count for cell in found.matrix[0][1]] == [0, 0]
