"""The one reader of rows: the kinds of files, and their mistakes with file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from adept_ds.errors import UserError
from adept_ds.formats import Row, read_each, read_rows

ROWS = [{"a": "x", "b": "1"}, {"a": 'quoted "y", é\nsecond', "b": ""}]

CSV = 'a,b\nx,1\n"quoted ""y"", é\nsecond",\n'
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TEXTS = {
    "lines.jsonl": LINES,
    "lines.ndjson": LINES,
    "lines.json": LINES,
    "list.json": json.dumps(ROWS, indent=1),
    "data.json": json.dumps({"version": 1, "data": ROWS}),
    "table.csv": CSV,
    "semicolons.csv": CSV.replace(",", ";").replace('""y"";', '""y"",'),
    "table.tsv": CSV.replace(",", "\t").replace('""y""\t', '""y"",'),
    "no-suffix": LINES,
}


def put(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("zipped", [False, True])
def test_every_kind_of_text_file_gives_the_same_rows(tmp_path: Path, name: str, mark: bytes, zipped: bool) -> None:
    content = mark + TEXTS[name].encode()
    path = put(tmp_path, f"{name}.gz", gzip.compress(content)) if zipped else put(tmp_path, name, content)
    assert [row.values for row in read_rows(path)] == ROWS


@pytest.mark.parametrize("name", ["lines.jsonl", "list.json", "table.csv"])
def test_windows_line_ends_and_empty_lines(tmp_path: Path, name: str) -> None:
    text = "\n" + TEXTS[name].replace("\\n", "").replace("\nsecond", "")
    path = put(tmp_path, name, (text.replace("\n", "\r\n") + "\r\n\r\n").encode())
    assert [row.values["a"] for row in read_rows(path)] == ["x", 'quoted "y", é' + "second" * (name != "table.csv")]


def test_parquet(tmp_path: Path) -> None:
    rows = [{"a": "x", "n": 1, "list": [{"k": "v"}]}, {"a": "y", "n": None, "list": []}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    read = read_rows(tmp_path / "t.parquet")
    assert [row.values for row in read] == rows
    assert read[1].where.endswith("t.parquet row 2")


def test_rows_know_their_lines(tmp_path: Path) -> None:
    for name, lines in (("lines.jsonl", [1, 2]), ("list.json", [2, 6]), ("table.csv", [2, 3])):
        assert [row.where for row in read_rows(put(tmp_path, name, TEXTS[name].encode()))] == [
            f"{tmp_path / name}:{line}" for line in lines
        ]


BAD_LINES = b"""{"a": "1"}
{"a": 1,}
\xff\xfe
[1]

{"a": "2", "a": "3"}
{"b": "4"}
"""


def test_all_mistakes_of_a_file_are_told_with_their_lines(tmp_path: Path) -> None:
    path = put(tmp_path, "bad.jsonl", BAD_LINES)
    with pytest.raises(UserError) as raised:
        read_each(path, lambda row: row.get_text("a"))
    lines = str(raised.value).splitlines()
    assert lines[0] == f"{path}: 5 mistakes"
    assert [line.strip().removeprefix(f"{path}:")[:24] for line in lines[1:]] == [
        "2: not valid JSON, Expec",
        "3: not UTF-8 (byte 0xff ",
        "4: expected a JSON objec",
        "6: 'a' is given twice",
        "7: no field 'a'; the rec",
    ]


def test_of_very_many_mistakes_the_first_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        read_rows(put(tmp_path, "bad.jsonl", b"{\n" * 25))
    lines = str(raised.value).splitlines()
    assert (len(lines), lines[0].endswith("25 mistakes"), lines[-1]) == (12, True, "  and 15 more")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.jsonl", b"\n \n", r"e\.jsonl: holds no records"),
        ("e.csv", b"a,b\n", r"e\.csv: holds no records"),
        ("e.json", b"[]", r"e\.json: holds no records"),
        ("w.csv", "a,b\n1,2\n".encode("utf-16"), r"w\.csv: is UTF-16 text; expected UTF-8"),
        ("l.csv", "a,b\n\u00e9,2\n".encode("latin-1"), r"l\.csv:2: not UTF-8 \(byte 0xe9 at 1\)"),
        ("c.csv", b"a,b\n1,2\n1,2,3\n", r"c\.csv:3: 3 cells, and the header has 2 \(a, b\)"),
        ("q.csv", b'a,b\n1,2\n"1,2\n3,4\n', r"q\.csv:3: not valid CSV .*is a quotation mark left open\?"),
        ("t.csv", b"a,b,a\n1,2,3\n", r"t\.csv:1: two columns are called 'a'"),
        ("j.json", b'[{"a": 1},\n {"a": }]', r"j\.json:2: not valid JSON, Expecting value \(column 8\)"),
        ("k.json", b'[{"a": 1}\n {"a": 2}]', r"k\.json:2: not valid JSON, Expecting ','"),
        ("o.json", b'[{"a": 1},\n [2]]', r"o\.json:2: expected a JSON object, found list"),
        ("d.json", b'{"data": [{"a": 1}, 2]}', r"d\.json data\[1\]: expected a JSON object, found int"),
        ("x.json", b'[{"a": 1}] x', r"x\.json:1: not valid JSON, Extra data"),
        ("z.jsonl.gz", b"no gzip", r"z\.jsonl\.gz: cannot be read"),
        ("p.parquet", b"PAR", r"p\.parquet: cannot be read"),
    ],
)
def test_a_mistake_is_told_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_rows(put(tmp_path, name, content))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_an_absent_file_is_told_with_the_nearest(tmp_path: Path, name: str) -> None:
    put(tmp_path, name, b"")
    with pytest.raises(UserError, match=rf"no such file; did you mean '.*{name}'"):
        read_rows(tmp_path / name.replace("rows", "row"))


def test_long_cells_are_read(tmp_path: Path) -> None:
    assert len(read_rows(put(tmp_path, "l.csv", b"a\n" + b"x" * 300_000))[0].values["a"]) == 300_000


def test_texts_have_unix_line_ends() -> None:
    assert Row("f:1", {"a": "x\r\ny\r"}).get_text("a") == "x\ny"


DIGITS = "1" * 5000
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (f'{{"a": "x", "n": {DIGITS}}}', "not valid JSON, an integer with too many digits"),
        (f'{{"a": "x", "n": {DEEP}}}', "not valid JSON, nested too deeply"),
        ('{"a": "x \\ud83d y"}', "a holds half of a character"),
        ('{"a": "x", "b": [{"c": "\\udc00"}]}', "b holds half of a character"),
        ('{"a": "x", "\\ud800": 1}', "holds half of a character"),
    ],
    ids=["digits", "depth", "a half", "a half within", "half a name"],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_what_python_or_utf8_cannot_hold_is_told_with_its_line(
    tmp_path: Path, record: str, message: str, name: str
) -> None:
    lines = ['{"a": "whole: \\ud83d\\ude00"}', record]
    text = "\n".join(lines) if name == "rows.jsonl" else f"[{lines[0]},\n{record}]"
    path = put(tmp_path, name, text.encode())
    with pytest.raises(UserError, match=f"{path}:2: .*{message}"):
        read_rows(path)


def test_what_a_model_has_written_is_read_with_halves_of_characters_replaced(tmp_path: Path) -> None:
    path = put(tmp_path, "samples.jsonl", b'{"a": "x \\ud83d y", "b": [{"c": "\\udc00"}]}\n')
    assert read_each(path, lambda row: row.values, repair=True) == [{"a": "x \ufffd y", "b": [{"c": "\ufffd"}]}]
