import shlex

import openpyxl
import pytest

from data.test_form import table, tickets
from tell.cli.common import template
from tell.config import make_config
from tell.data.form import Form, form_of
from tell.data.sources import load
from tell.errors import TellError


def rows(*names, n=30):
    return [{name: row[name] for name in names} for row in tickets(n)]


def test_the_one_plausible_form_is_used_and_said(tmp_path):
    data = load(table(tmp_path / "a.csv", rows("Id", "Body", "Category", "Due")))
    assert data.guessed and data.form == Form("{Body}", ("Category",), ("text",))
    assert 'a.csv: guessed from the shape of the columns: --prompt "{Body}" --answer Category' in data.notices
    assert "a.csv: columns not used: Due" in data.notices


def test_known_layouts_keep_first_claim(tmp_path):
    known = [
        {"text": r["Subject"], "label": r["Priority"], "Body": r["Body"], "Category": r["Category"]} for r in tickets()
    ]
    data = load(table(tmp_path / "a.csv", known))
    assert data.layout == "text/label" and data.form is None and not data.guessed


def commands(path):
    with pytest.raises(TellError) as caught:
        load(path)
    return str(caught.value)


def test_two_plausible_forms_are_both_printed_as_commands(tmp_path):
    path = table(tmp_path / "my a.csv", rows("Body", "Category", "Priority"))
    said = commands(path)
    for answer in ("Category,Priority", "Category", "Priority"):
        assert f'`tell tune "{path}" --prompt "{{Body}}" --answer {answer}`' in said
    two = [{"Question text": r["Body"], "Long note": f"{r['Body']} Indeed.", "Team": r["Category"]} for r in tickets()]
    said = commands(table(tmp_path / "b.csv", two))
    assert r'--prompt "{Question text}\n\n{Long note}" --answer Team`, or' in said
    assert '--prompt "{Question text}" --answer Team`' in said
    pair = [{"A": r["Body"], "B": f"{r['Body']} Indeed."} for r in tickets()]
    said = commands(table(tmp_path / "c.csv", pair))
    assert '--prompt "{A}" --answer B`, or' in said and '--prompt "{B}" --answer A`' in said


def with_error(path, cell):
    """The same workbook with a formula error in a cell."""
    book = openpyxl.load_workbook(path)
    book.active[cell].value, book.active[cell].data_type = "#N/A", "e"
    book.save(path)
    return path


def test_a_bad_or_empty_cell_makes_no_guess_certain(tmp_path):
    for name in ("Body", "Category", "Priority"):
        made = table(tmp_path / "a.xlsx", rows("Body", "Category", "Priority"))
        path = with_error(made, f"{'ABC'[('Body', 'Category', 'Priority').index(name)]}5")
        assert "can be read in several ways" in commands(path)
        with pytest.raises(TellError, match=r"a.xlsx:5: has a cell that holds the formula error #N/A"):
            load(path, columns=Form("{Body}", ("Category", "Priority")))
    for empty in (8, 24):
        some = [{**row, "Category": row["Category"] * (i >= empty)} for i, row in enumerate(rows("Body", "Category"))]
        path = table(tmp_path / "b.csv", [{**row, "Priority": str(i % 4)} for i, row in enumerate(some)])
        assert "--answer Category`, or" in commands(path)
        assert f"'Category' is empty in {empty} of 30 rows" in commands(table(tmp_path / "c.csv", some))


def test_a_guess_with_a_formula_error_names_its_row(tmp_path):
    for cell in ("A5", "B5"):
        path = with_error(table(tmp_path / "a.xlsx", rows("Body", "Category")), cell)
        for given in (None, Form("{Body}"), Form(None, ("Category",))):
            with pytest.raises(TellError, match=rf"a.xlsx:5: has a cell that holds the formula error #N/A \({cell}\)"):
                load(path, columns=given)


def test_texts_that_most_rows_lack_are_no_prompt(tmp_path):
    some = [
        {**row, "Comment": f"A remark, number {i}, on it" * (i < 5)} for i, row in enumerate(rows("Body", "Category"))
    ]
    assert load(table(tmp_path / "a.csv", some)).form == Form("{Body}", ("Category",), ("text",))


def test_a_command_in_an_error_reads_the_file(tmp_path):
    path = table(tmp_path / "a b.csv", rows("Body", "Category", "Priority"))
    command = commands(path).partition("`")[2].partition("`")[0]
    words = shlex.split(command)
    assert words[:3] == ["tell", "tune", path] and words[3::2] == ["--prompt", "--answer"]
    task = make_config({"task": {"data": path, "prompt": template(words[4]), "answer": words[6]}}).task
    assert len(load(path, columns=form_of(task)).examples) == 30


@pytest.mark.parametrize("form", [Form('a "b" $c\n\t\\n {Body}', ("x, y", 'z"')), Form("{A} `!'{B}", ("C D", "E"))])
def test_printed_flags_are_what_is_to_be_typed(form):
    words = shlex.split(form.flags)
    task = make_config({"task": {"data": "a", "prompt": template(words[1]), "answer": words[3]}}).task
    assert form_of(task) == form


def test_half_a_form_is_completed(tmp_path):
    path = table(tmp_path / "a.csv", rows("Subject", "Body", "Category", "Priority"))
    assert load(path, columns=Form(None, ("Category", "Priority"))).form.prompt == "{Body}"
    with pytest.raises(TellError, match="can be read in several ways"):
        load(path, columns=Form("{Body}"))
    path = table(tmp_path / "b.csv", rows("Subject", "Body", "Category"))
    assert load(path, columns=Form("{Subject}: {Body}")).form.answer == ("Category",)
    short = [{"prompt": r["Subject"], "Category": r["Category"]} for r in tickets()]
    assert load(table(tmp_path / "d.csv", short), columns=Form(None, ("Category",))).form.prompt == "{prompt}"
    with pytest.raises(TellError, match=r"--answer is given, and no column is certain.*Add --prompt"):
        load(table(tmp_path / "c.csv", rows("Subject", "Category")), columns=Form(None, ("Category",)))


HALVES = [
    (Form("{Bdy}"), "--prompt: there is no column 'Bdy' in .*; did you mean 'Body'?"),
    (Form("Bdy"), r"--prompt: 'Bdy' names no column. Write its columns in braces, e.g. \{Body\}"),
    (Form("{Body"), "has a single"),
    (Form(None, ("Kategory",)), "--answer: there is no column 'Kategory' in .*; did you mean 'Category'?"),
]


@pytest.mark.parametrize(("form", "what"), HALVES, ids=[what for _, what in HALVES])
def test_half_a_form_that_no_column_fits_is_not_completed(tmp_path, form, what):
    path = table(tmp_path / "a.csv", rows("Subject", "Body", "Category", "Priority"))
    with pytest.raises(TellError, match=what):
        load(path, columns=form)
    with pytest.raises(TellError, match=r"--prompt \"\{Body\}\" --answer Category,Priority`, or"):
        load(path, columns=Form("Body"))  # a column's name alone, printed as its template


def test_a_guess_with_braces_in_a_column_name_is_refused(tmp_path):
    some = [{"Body {en}": row["Body"], "Category": row["Category"]} for row in rows("Body", "Category")]
    for path in (
        table(tmp_path / "a.csv", some),
        table(tmp_path / "b.csv", [{"Body": r["Body {en}"], **r} for r in some]),
    ):
        assert "the column 'Body {en}' has braces in its name" in commands(path)
    with pytest.raises(TellError, match="has braces in its name"):
        load(path, columns=Form(None, ("Category",)))
    assert load(path, columns=Form("{Body}", ("Category",))).form.prompt == "{Body}"
    swapped = [{"Body": row["Body {en}"], "Team {x}": row["Category"]} for row in some]
    assert load(table(tmp_path / "c.csv", swapped)).form.answer == ("Team {x}",)


def test_a_file_without_column_names_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    lines = [f'"Hello, this is question number {i} about it",{"ab"[i % 2]}' for i in range(20)]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(TellError, match="begins with a row that looks like data, not like column names"):
        load(str(path))


NOTHING = [
    rows("Subject", "Category"),  # no long text
    rows("Id", "Body"),  # no answer
    [{"Body": r["Body"], "Due": r["Due"]} for r in tickets()],  # dates are no labels
    [{"Body": r["Body"], "Phone": f"+49 30 {i}"} for i, r in enumerate(tickets())],
    [{"When": f"2024-05-01 12:{i:02}:00 UTC+00:00", "Category": r["Category"]} for i, r in enumerate(tickets())],
    rows("Body", "Category", n=2),
]


@pytest.mark.parametrize("records", NOTHING)
def test_nothing_is_guessed_where_nothing_is_plausible(tmp_path, records):
    with pytest.raises(TellError, match="no known layout fits them"):
        load(table(tmp_path / "a.csv", records))


def test_general_data_are_not_guessed_at(tmp_path):
    with pytest.raises(TellError, match="no known layout fits them"):
        load(table(tmp_path / "a.csv", rows("Body", "Category")), name="general")
