import datetime
import os
import random
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import openpyxl
import pytest

from hostile.mutate import mutate_bytes
from tell.data import workbook, workbook_process
from tell.data.file_read import FileRead
from tell.data.form import Form
from tell.data.formats import format_of, read_records
from tell.data.sources import file_fingerprint, load
from tell.data.workbook import split_sheet
from tell.errors import TellError
from workbooks import encrypted_xlsx, ods, ods_row, xls, xlsx

HEAD = ["Body", "Priority", "When"]
ROWS = [
    HEAD,
    ["Where is my parcel?", 3, datetime.date(2024, 5, 1)],
    ["It is broken.", 2.5, datetime.datetime(2024, 5, 1, 13, 45)],
    ["Thanks", None, None],
]


def refused(path, what, **more):
    with pytest.raises(TellError) as caught:
        list(read_records(path, **more))
    assert what in str(caught.value) and "\n" not in str(caught.value)
    return caught.value


def test_cells_are_plain_values_by_row_number(tmp_path):
    found = FileRead()
    path = xlsx(tmp_path / "a.xlsx", ROWS)
    assert list(read_records(path, found)) == [
        (2, {"Body": "Where is my parcel?", "Priority": 3, "When": "2024-05-01"}),
        (3, {"Body": "It is broken.", "Priority": 2.5, "When": "2024-05-01T13:45:00"}),
        (4, {"Body": "Thanks", "Priority": None, "When": None}),
    ]
    assert (found.sheet, found.sheets, found.encoding, found.notices) == ("Tickets", ("Tickets",), None, [])
    assert type(next(read_records(path))[1]["Priority"]) is int


def test_three_formats_read_alike(tmp_path):
    rows = [["Body", "n"], ["hellö", 3], ["b & c", 2.5]]
    wanted = [(2, {"Body": "hellö", "n": 3}), (3, {"Body": "b & c", "n": 2.5})]
    table = "".join(ods_row(*(str(c).replace("&", "&amp;") if isinstance(c, str) else c for c in row)) for row in rows)
    for path in (xlsx(tmp_path / "a.xlsx", rows), xls(tmp_path / "a.xls", rows), ods(tmp_path / "a.ods", table)):
        assert list(read_records(path)) == wanted


def test_a_table_may_begin_anywhere_and_have_empty_rows(tmp_path):
    rows = [[], [None, "Body", "n"], [], [None, "a", 1], [], [None, None, None], [None, "b", 2], [], []]
    path = xlsx(tmp_path / "a.xlsx", rows)
    assert list(read_records(path)) == [(4, {"Body": "a", "n": 1}), (7, {"Body": "b", "n": 2})]


def test_long_column_names_are_one_line_and_numbers_are_names(tmp_path):
    path = xlsx(tmp_path / "a.xlsx", [["Ticket\n Subject ", 2024.0], ["a", "b"]])
    assert [record for _, record in read_records(path)] == [{"Ticket Subject": "a", "2024": "b"}]


def test_sheets_are_named_and_said(tmp_path):
    path = xlsx(tmp_path / "a.xlsx", ROWS, Train=[["x"], ["1"]], Empty=[])
    found = FileRead()
    assert len(list(read_records(path, found))) == 3
    assert found.notices == ["a.xlsx: sheet 'Tickets' is read; the others are 'Train', 'Empty' (write a.xlsx#SHEET)"]
    assert list(read_records(f"{path}#Train")) == [(2, {"x": "1"})]
    assert "did you mean 'Train'?" in str(refused(f"{path}#Trian", "there is no sheet 'Trian'"))
    assert "'Tickets', 'Train'" in str(refused(f"{path}#Empty", "the sheet 'Empty' is empty"))
    assert refused(f"{path}#", "no sheet ''")


def test_a_file_named_with_a_hash_is_a_file(tmp_path):
    path = xlsx(tmp_path / "a.xlsx#b.xlsx", ROWS)
    assert split_sheet(path) == (str(path), None) and len(list(read_records(path))) == 3
    assert split_sheet("C#/rows.csv") == ("C#/rows.csv", None)
    assert split_sheet("C#/book.xlsx#Über #1") == ("C#/book.xlsx", "Über #1")
    assert format_of("book.XLSX#Train") == (".xlsx", "") and format_of("book.xlsx.gz") is None


def test_the_first_sheet_that_is_not_hidden_is_read(tmp_path):
    path = xlsx(tmp_path / "a.xlsx", [["secret"], ["1"]], Shown=[["x"], ["2"]])
    book = openpyxl.load_workbook(path)
    book["Tickets"].sheet_state = "hidden"
    book.active = 1
    book.save(path)
    found = FileRead()
    assert list(read_records(path, found)) == [(2, {"x": "2"})]
    assert "hidden: 'Tickets'" in found.notices[0]


def test_the_fingerprint_has_the_sheet(tmp_path):
    path = xlsx(tmp_path / "a.xlsx", ROWS, B=ROWS)
    assert (
        len({file_fingerprint(path), file_fingerprint(f"{path}#B"), file_fingerprint(path, Form("{x}", ("y",)))}) == 3
    )


def test_a_formula_error_names_its_cell_only_where_it_is_needed(tmp_path):
    rows = [["Body", "Category", "Sum"], *([f"text {i}", "ab"[i % 2], i] for i in range(8))]
    path = xlsx(tmp_path / "a.xlsx", rows)
    book = openpyxl.load_workbook(path)
    book.active["C5"].value, book.active["C5"].data_type = "#REF!", "e"
    book.save(path)
    assert len(load(str(path), columns=Form("{Body}", ("Category",))).examples) == 8
    for form in (Form("{Body} {Sum}", ("Category",)), Form("{Body}", ("Sum",)), Form("{Body}", ("Category", "Sum"))):
        with pytest.raises(TellError, match=r"a.xlsx:5: has a cell that holds the formula error #REF! \(C5\)"):
            load(str(path), columns=form)


def test_formula_errors_that_cannot_be_named_are_said(tmp_path):
    found = FileRead()
    list(read_records(xls(tmp_path / "a.xls", [["a", "b"], ["x", ValueError()]]), found))
    assert found.notices == [
        "a.xls: formula errors, if there are any, are read as empty cells (.xls does not show them)"
    ]
    about = 'calcext:value-type="error" office:value-type="string" office:string-value=""'  # as LibreOffice writes it
    cell = f"<table:table-cell {about}><text:p>#REF!</text:p></table:table-cell>"
    table = f"{ods_row('a', 'b')}<table:table-row>{ods_row('x')[17:-18]}{cell}</table:table-row>"
    found = FileRead()
    assert list(read_records(ods(tmp_path / "a.ods", table), found)) == [(2, {"a": "x", "b": None})]
    assert "formula errors are read as empty cells; save it as .xlsx" in found.notices[0]


def test_merged_cells_count_in_each_row_and_hidden_rows_are_read(tmp_path):
    rows = [["Body", "Category"], ["one", "billing"], ["two", None], ["three", None], ["four", "access"]]
    path = xlsx(tmp_path / "a.xlsx", rows)
    book = openpyxl.load_workbook(path)
    book.active.merge_cells("B2:B4")
    book.active.row_dimensions[3].hidden = True
    book.save(path)
    found = FileRead()
    values = [record["Category"] for _, record in read_records(path, found)]
    assert values == ["billing", "billing", "billing", "access"]
    assert found.notices == [
        "a.xlsx: hidden rows are read as well: 1",
        "a.xlsx: cells merged over rows count in each of them: B2",
    ]


HEADERS = [
    ([["a", "b", "a"], [1, 2, 3]], "names the column 'a' in A1 and C1"),
    (
        [["Tickets of May"], [], ["Body", "Category"], ["x", "y"]],
        "row 1 has one name ('Tickets of May'), but row 3 has 2",
    ),
    ([["a", "b"]], "has no rows"),
    ([], "is empty"),
]


@pytest.mark.parametrize(("rows", "what"), HEADERS, ids=[what for _, what in HEADERS])
def test_bad_headers(tmp_path, rows, what):
    refused(xlsx(tmp_path / "a.xlsx", rows), what)


def test_columns_without_a_name_are_said(tmp_path):
    found = FileRead()
    rows = [["a", None, "b"], [1, None, 2], [3, "lost", 4, 5]]
    records = [record for _, record in read_records(xlsx(tmp_path / "a.xlsx", rows), found)]
    assert records == [{"a": 1, "b": 2}, {"a": 3, "b": 4}]
    assert found.notices == ["a.xlsx: columns without a name are not used, the first cell of each is B3, D3"]


def test_passwords_are_said(tmp_path):
    refused(encrypted_xlsx(tmp_path / "a.xlsx"), "is protected by a password")
    refused(ods(tmp_path / "a.ods", ods_row("a"), encrypted=True), "is protected by a password")


def test_what_is_no_workbook(tmp_path):
    contents = {
        "page.xls": (b"  <html><table><tr><td>a</td></tr></table></html>", "is HTML or XML"),
        "rows.xlsx": (b"a,b\n1,2\n", "is not a workbook"),
        "empty.xlsx": (b"", "is empty"),
        "cut.xlsx": (xlsx(tmp_path / "whole.xlsx", ROWS).read_bytes()[:-200], "is a damaged workbook"),
        "old.xls": (b"\xd0\xcf\x11\xe0" + bytes(3000), "is not a readable workbook"),
    }
    for name, (data, what) in contents.items():
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, what)
    with zipfile.ZipFile(tmp_path / "zip.xlsx", "w") as archive:
        archive.writestr("a.txt", "hello")
    refused(tmp_path / "zip.xlsx", "is not a readable workbook")


@pytest.mark.parametrize("seed", range(12))
def test_damaged_workbooks_end_in_one_line_or_are_read(tmp_path, seed):
    rng, rows = random.Random(seed), [["Body", "n"], *([f"text {i}", i] for i in range(9))]
    path = [tmp_path / f"a{suffix}" for suffix in workbook.WORKBOOKS][seed % 3]
    if path.suffix == ".xlsx":
        inner = {"xl/worksheets/sheet1.xml", "xl/workbook.xml", "xl/_rels/workbook.xml.rels"}
        with zipfile.ZipFile(xlsx(path, rows)) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in parts.items():
                archive.writestr(name, mutate_bytes(rng, data) if name in inner else data)
    else:
        made = xls(path, rows) if path.suffix == ".xls" else ods(path, "".join(ods_row(*row) for row in rows))
        made.write_bytes(mutate_bytes(rng, made.read_bytes()))
    try:
        list(read_records(path))
    except TellError as error:
        assert "\n" not in str(error)


def test_bombs_end_in_one_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "zip.xlsx", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x", "w") as file:
        for _ in range(130):
            file.write(bytes(2**20))
    refused(tmp_path / "zip.xlsx", "decompresses to more than")
    repeated = ods_row("x").replace("table-row>", 'table-row table:number-rows-repeated="1048570">', 1)
    wide = repeated.replace("table-cell ", 'table-cell table:number-columns-repeated="16384" ', 1)
    refused(ods(tmp_path / "a.ods", wide), "is not a readable workbook")


@pytest.mark.skipif(sys.platform == "win32", reason="memory of a process is not limited there")
def test_a_cell_in_the_last_corner_does_not_end_the_run(tmp_path):
    book = openpyxl.Workbook()
    book.active["A1"], book.active["A2"], book.active["XFD1048576"] = "a", "b", "c"
    book.save(tmp_path / "far.xlsx")
    refused(tmp_path / "far.xlsx", "cannot be read in 4 GiB of memory")


def test_a_long_output_is_stopped(tmp_path, monkeypatch):
    rows = [["a"], *(["x" * 1000] for _ in range(200))]
    path = xlsx(tmp_path / "a.xlsx", rows)
    monkeypatch.setattr("tell.data.bounds.FLOOR", 100_000)
    monkeypatch.setattr("tell.data.bounds.GROWTH", 1)
    with pytest.raises(TellError, match="decompresses to more than"):
        list(read_records(path))


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(workbook, "find_spec", lambda name: None)
    refused(xlsx(tmp_path / "a.xlsx", ROWS), "pip install python-calamine")


def test_the_library_is_found_where_only_pythonpath_has_it(tmp_path):
    path = xlsx(tmp_path / "a.xlsx", ROWS)
    venv.create(tmp_path / "venv", symlinks=os.name != "nt")
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    code = f"from tell.data.formats import read_records; print(len(list(read_records({str(path)!r}))))"

    def read(*folders):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
        return subprocess.run([python, "-c", code], env=env, capture_output=True, text=True, check=False, timeout=60)

    places = Path(workbook.__file__).parents[2], sysconfig.get_path("purelib")
    assert read(*places).stdout == "3\n"
    (tmp_path / "python_calamine").mkdir()
    (tmp_path / "python_calamine" / "__init__.py").write_text("raise ImportError('built for another system')")
    assert "python-calamine, which reads workbooks, cannot be imported. pip install" in read(tmp_path, *places).stderr


def test_names_of_cells():
    names = [workbook_process.cell_name(13, column) for column in (0, 2, 25, 26, 701, 702)]
    assert names == ["A14", "C14", "Z14", "AA14", "ZZ14", "AAA14"]
