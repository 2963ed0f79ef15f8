import json

import pytest

from tell.data.form import Form
from tell.data.how_read import how_read
from tell.data.kind import detect_kind
from tell.data.sources import load
from tell.data.unlabelled import load_prompts_of
from tell.errors import TellError
from workbooks import xlsx

CATEGORIES = ("billing", "access", "bug")
FORM = Form("Subject: {Subject}\n\n{Body}", ("Category", "Priority", "Paid", "Due"))


def tickets(n=30, **changes):
    rows = [
        {
            "Id": str(i),
            "Subject": f"Ticket {i}",
            "Body": f"My {CATEGORIES[i % 3]} question, number {i}, is still not answered.",
            "Category": CATEGORIES[i % 3],
            "Priority": str(i % 4),
            "Paid": "TRUE" if i % 2 else "false",
            "Due": f"2024-05-{i % 28 + 1:02}",
        }
        for i in range(n)
    ]
    for name, cells in changes.items():
        for i, cell in cells.items():
            rows[i][name] = cell
    return rows


def table(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        lines = [",".join(f'"{cell}"' for cell in row.values()) for row in rows]
        path.write_text("\n".join([",".join(f'"{name}"' for name in rows[0]), *lines]) + "\n")
    else:
        xlsx(path, [list(rows[0]), *(list(row.values()) for row in rows)])
    return str(path)


def test_several_columns_are_one_json_object_in_order(tmp_path):
    typed = [{**r, "Priority": int(r["Priority"]), "Paid": r["Paid"] == "TRUE"} for r in tickets()]
    paths = [
        table(tmp_path / "a.csv", tickets()),
        table(tmp_path / "a.xlsx", typed),
        table(tmp_path / "a.jsonl", typed),
    ]
    for path in paths:
        data = load(path, columns=FORM)
        assert [e.answer for e in data.examples[:2]] == [
            '{"Category": "billing", "Priority": 0, "Paid": false, "Due": "2024-05-01"}',
            '{"Category": "access", "Priority": 1, "Paid": true, "Due": "2024-05-02"}',
        ]
        body = "My access question, number 1, is still not answered."
        assert data.examples[1].question == f"Subject: Ticket 1\n\n{body}"
        parts = detect_kind(data.examples).schema["properties"]
        assert parts["Category"] == {"type": "string", "enum": sorted(CATEGORIES)}
        assert [parts[name]["type"] for name in FORM.answer] == ["string", "integer", "boolean", "string"]
        assert data.form.types == ("text", "number", "boolean", "text")
        assert data.layout == "Subject+Body/Category+Priority+Paid+Due"


def test_one_column_is_the_answer_itself(tmp_path):
    data = load(table(tmp_path / "a.csv", tickets()), columns=Form("{Body}", ("Category",)))
    assert detect_kind(data.examples).labels == ("access", "billing", "bug")
    assert data.notices == ("a.csv: columns not used: Subject, Priority, Paid, Due",)
    numbers = load(table(tmp_path / "a.csv", tickets(Priority={0: "007"})), columns=Form("{Body}", ("Priority",)))
    assert [e.answer for e in numbers.examples[:2]] == ["007", "1"]


def test_a_column_is_of_one_type(tmp_path):
    """Codes with zeros in front, and a number among words, are text throughout; so is what a double would cut."""
    for cell in ("007", "n/a", "+1", "1,5", "12345678901234567890"):
        data = load(table(tmp_path / "a.csv", tickets(Priority={3: cell})), columns=FORM)
        values = [json.loads(e.answer)["Priority"] for e in data.examples]
        assert values[2:5] == ["2", cell, "0"], cell


def test_empty_cells_are_null_and_counted(tmp_path):
    data = load(table(tmp_path / "a.csv", tickets(Priority={1: "", 2: " "})), columns=FORM)
    assert [json.loads(e.answer)["Priority"] for e in data.examples[:4]] == [0, None, None, 3]
    assert "a.csv: 'Priority' is null in 2 of 30 answers: empty cells" in data.notices
    assert detect_kind(data.examples).schema["properties"]["Priority"]["type"] == ["integer", "null"]


def test_rows_without_an_answer_are_left_out_up_to_a_fifth(tmp_path):
    form = Form("{Body}", ("Category",))
    data = load(table(tmp_path / "a.csv", tickets(Category=dict.fromkeys(range(6), ""))), columns=form)
    assert len(data.examples) == 24
    assert data.dropped[0] == ("a.csv:2", "has no answer ('Category' empty)")
    with pytest.raises(TellError, match="'Category' is empty in 7 of 30 rows, more than 20%"):
        load(table(tmp_path / "a.csv", tickets(Category=dict.fromkeys(range(7), ""))), columns=form)
    with pytest.raises(TellError, match="'Body' is empty in 7 of 30 rows"):
        load(table(tmp_path / "a.csv", tickets(Body=dict.fromkeys(range(7), ""))), columns=form)
    none = {name: dict.fromkeys(range(3), "") for name in FORM.answer}
    assert len(load(table(tmp_path / "a.csv", tickets(**none)), columns=FORM).examples) == 27


def test_formula_errors_in_exported_text_are_refused(tmp_path):
    path = table(tmp_path / "a.csv", tickets(Due={4: "#N/A"}))
    assert len(load(path, columns=Form("{Body}", ("Category",))).examples) == 30
    for form in (FORM, Form("{Due}", ("Category",)), Form("{Body}", ("Due",))):
        with pytest.raises(TellError, match=r"a.csv:6: holds the formula error #N/A \(column 'Due'\)"):
            load(path, columns=form)


def test_templates(tmp_path):
    path = table(tmp_path / "a.csv", tickets(Body={0: "braces {Subject} and {{ stay"}))

    def first(prompt):
        return load(path, columns=Form(prompt, ("Category",))).examples[0].question

    assert first("{Body}") == "braces {Subject} and {{ stay"
    assert first("{{{Subject}}} {Subject}") == "{Ticket 0} Ticket 0"
    assert first("Subject") == "Ticket 0"  # a column's name alone


BAD = [
    (Form("{Subjekt}", ("Category",)), "--prompt: there is no column 'Subjekt' in .*; did you mean 'Subject'?"),
    (Form("{Body}", ("Kategory",)), "--answer: there is no column 'Kategory' in .*; did you mean 'Category'?"),
    (Form("{Body}", ("category",)), "did you mean 'Category'?"),
    (Form("Bodi", ("Category",)), r"--prompt: 'Bodi' names no column. Write its columns in braces, e.g. \{Body\}"),
    (Form("{Body", ("Category",)), r"--prompt: has a single '\{' in '\{Body'"),
    (Form("{Body} {}", ("Category",)), "has a single"),
    (Form("", ("Category",)), "names no column"),
    (Form("{Body} {Category}", ("Category",)), "--answer: the column 'Category' is in the prompt as well"),
    (Form("{Subject} {Due}", ("Category", "Due")), "the column 'Due' is in the prompt as well.*Take it out"),
    (Form("Body", ("Body",)), "the column 'Body' is in the prompt as well"),
]


@pytest.mark.parametrize(("form", "what"), BAD, ids=[what for _, what in BAD])
def test_bad_forms(tmp_path, form, what):
    with pytest.raises(TellError, match=what):
        load(table(tmp_path / "a.csv", tickets()), columns=form)


@pytest.mark.parametrize(
    "prompt", ["Body {en}", "{Body {en}}", "{Body {{en}}}", "Body en", "{Body en}", "{Due}{Body {"]
)
def test_columns_with_braces_are_to_be_renamed(tmp_path, prompt):
    rows = [
        {"Body {en}": r["Body"], "Body {": r["Subject"], "Due": r["Due"], "Category": r["Category"]} for r in tickets()
    ]
    path = table(tmp_path / "a.csv", rows)
    with pytest.raises(TellError, match=r"--prompt: the column 'Body \{(en\})?' has braces.*Rename the column"):
        load(path, columns=Form(prompt, ("Category",)))
    with pytest.raises(TellError, match=r"names no column. Write its columns in braces, e.g. \{Due\}"):
        load(path, columns=Form("something", ("Category",)))
    assert load(path, columns=Form("{Category}", ("Body {en}",))).examples[0].answer == rows[0]["Body {en}"]
    assert load(path, columns=Form("{{{Due}}}", ("Category",))).examples[0].question == "{2024-05-01}"


def test_a_further_file_is_read_by_the_types_of_the_first(tmp_path):
    data = load(table(tmp_path / "a.csv", tickets()), columns=FORM)
    other = table(tmp_path / "b.csv", tickets(4, Priority={1: "n/a"}, Due=dict.fromkeys(range(4), "5")))
    values = [json.loads(e.answer) for e in load(other, columns=data.form).examples]
    assert [v["Priority"] for v in values] == [0, "n/a", 2, 3] and values[0]["Due"] == "5"


def test_prompts_alone_need_the_columns_of_the_prompt(tmp_path):
    data = load(table(tmp_path / "a.csv", tickets()), columns=FORM)
    more = [{"Body": "b", "Subject": "s", "Category": "x"}, {"Body": "", "Subject": ""}]
    found = load_prompts_of(table(tmp_path / "b.jsonl", more), data.columns, data.form)
    assert [e.question for e in found.examples] == ["Subject: s\n\nb"]
    assert found.dropped == (("b.jsonl:2", "has no prompt (Subject, Body empty)"),)
    assert found.notices == ("b.jsonl: the answers (column 'Category') are ignored: the file counts as unlabelled",)
    with pytest.raises(TellError, match="there is no column 'Subject'"):
        load_prompts_of(table(tmp_path / "c.jsonl", [{"Body": "b"}]), data.columns, data.form)


def test_how_a_file_was_read(tmp_path):
    path = table(tmp_path / "a.xlsx", tickets())
    found = how_read(load(path, columns=FORM))
    assert found["flags"] == r'--prompt "Subject: {Subject}\n\n{Body}" --answer Category,Priority,Paid,Due'
    assert (found["sheet"], found["sheets"], found["encoding"]) == ("Tickets", ["Tickets"], None)
    assert found["left_out"] == [] and found["guessed"] is False
    plain = tmp_path / "b.csv"
    plain.write_text("text,label\na,b\n")
    found = how_read(load(str(plain)))
    assert (found["flags"], found["encoding"]) == ("", "utf-8")
