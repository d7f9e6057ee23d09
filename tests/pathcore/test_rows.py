from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pathcore import rows
from pathcore.rows import (
    BadRow,
    check_fraction,
    line_offsets,
    read_array,
    read_csv,
    read_rows,
    read_rows_with_id,
    row_files,
    write_csv,
    write_rows,
)


def test_lines_and_elements_are_numbered_from_one(tmp_path: Path) -> None:
    rows = [{"id": "ä"}, {"id": 2}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "a.json"):
        assert list(read_rows(tmp_path / name)) == [(1, rows[0]), (2, rows[1])]


def test_a_byte_order_mark_is_no_part_of_the_row(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", '{"id": 1}\n'), ("a.json", '[{"id": 1}]')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert list(read_rows(tmp_path / name)) == [(1, {"id": 1})]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf16_is_named(tmp_path: Path, encoding: str) -> None:
    mark = "\ufeff" if encoding == "utf-16-be" else ""  # Python writes it for utf-16 alone
    file = tmp_path / "rows.jsonl"
    file.write_text(mark + '{"id": "a"}\n{"id": "b"}\n', encoding=encoding)
    for read in (rows.read_lines, rows.line_offsets, rows.read_array, rows.read_csv):
        with pytest.raises(ValueError, match=r"rows\.jsonl: .*UTF-16.*iconv -f utf-16 -t utf-8"):
            list(read(file))


def test_a_bad_line_is_one_bad_row(tmp_path: Path) -> None:
    lines = [b'{"id": 1}', b'{"id": ', b'{"id": "\xff\xfe"}', b"[" * 100_000, b"7", b'{"id": 6}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    rows = list(read_rows(tmp_path / "a.jsonl"))
    assert [number for number, _ in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0][1] == {"id": 1}
    assert all(row.startswith("no JSON: ") for _, row in rows[1:4])
    assert rows[4:] == [(5, 7), (6, {"id": 6})]


@pytest.mark.parametrize(
    "content", [b"7", b"[{", b"[1,]", b"[] []", b"\xff\xfe\xff", b"[" * 100_000]
)
def test_a_json_file_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"data_path .*a\.json: no JSON"):
        list(read_rows(tmp_path / "a.json", what="data_path"))


def test_a_json_file_must_be_an_array(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="expected an array of rows, found an object"):
        list(read_rows(tmp_path / "a.json"))


def test_other_extensions_and_absent_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"a\.csv: expected \.json or \.jsonl, found '\.csv'"):
        list(read_rows(tmp_path / "a.csv"))
    with pytest.raises(FileNotFoundError, match=r"data_path .*b\.json: no such file"):
        list(read_rows(tmp_path / "b.json", what="data_path"))


@pytest.mark.parametrize(
    ("bad", "total", "stops"),
    [(0, 0, False), (0, 5, False), (3, 9, False), (9, 9, True), (1, 10, False), (2, 10, True)],
)
def test_a_tenth_of_ten_rows_or_more_stops_the_run(bad: int, total: int, stops: bool) -> None:
    faults = {str(index): f"fault {index}" for index in range(bad)}
    if not stops:
        check_fraction(bad, total, "rows.jsonl", faults)
        return
    with pytest.raises(ValueError, match=rf"rows\.jsonl: {bad} of {total} rows") as caught:
        check_fraction(bad, total, "rows.jsonl", faults)
    assert "fault 1" in str(caught.value)
    assert "fault 3" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    values=st.lists(JSON, max_size=6), indent=st.sampled_from([None, 1]), chunk=st.integers(1, 40)
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_an_array_is_read_in_chunks_of_any_size(
    tmp_path: Path, values: list[Any], indent: int | None, chunk: int
) -> None:
    text = json.dumps(values, indent=indent)
    (tmp_path / "a.json").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_CHUNK_CHARS", chunk)
        assert list(read_array(tmp_path / "a.json")) == values
        (tmp_path / "a.json").write_text(text[:-1])
        with pytest.raises(ValueError, match="breaks off near byte"):
            list(read_array(tmp_path / "a.json"))


def test_an_array_may_hold_what_json_dump_writes(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"score": float("inf")}, "\ud800"]))
    assert [row for _, row in read_rows(tmp_path / "a.json")] == [{"score": float("inf")}, "\ud800"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": "b", "x": NaN}', "NaN is not JSON"),
        ('{"id": "b", "x": "\\ud800"}', "no JSON: .*surrogates not allowed"),
        ("[1]", "expected an object, found list"),
        ('{"id": ""}', "id: expected text"),
        ('{"id": 7}', "id: expected text, found 7"),
    ],
)
def test_rows_with_an_id_are_strict(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"id": "a"}}\n\n{line}\n', encoding="utf-8-sig")
    good, (number, bad) = read_rows_with_id(path)
    assert good == (1, {"id": "a"})
    assert number == 3
    assert isinstance(bad, BadRow)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(bad)


def test_an_array_in_place_of_lines_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n [{"id": "a"}]')
    with pytest.raises(ValueError, match=r"expected JSON lines.*found an array: jq -c '\.\[\]'"):
        list(read_rows_with_id(tmp_path / "a.jsonl"))


def test_offsets_lead_to_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n\xc3\xa4\n  \n7")
    found = list(line_offsets(path))
    assert [line for _, line in found] == [b"\xc3\xa4\n", b"7"]
    assert all(path.read_bytes()[offset:].startswith(line) for offset, line in found)


def test_a_table_is_read_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write_csv(path, ["id", "text"], [["a", 'two\nlines, "quoted"'], ["b", "ä"]])
    with path.open(newline="") as file:
        assert list(csv.reader(file))[1:] == [["a", 'two\nlines, "quoted"'], ["b", "ä"]]
    expected = [(3, {"id": "a", "text": 'two\nlines, "quoted"'}), (4, {"id": "b", "text": "ä"})]
    assert list(read_csv(path, columns=["id"])) == expected
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert list(read_csv(path, columns=["id"])) == expected


def test_tables_as_other_programs_write_them_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    pd.DataFrame({"id": ["a", "b"], "text": ['6" x 4"', "two\r\nlines"]}).to_csv(path)
    texts = [row["text"] for _, row in read_csv(path, columns=["id"])]
    assert texts == ['6" x 4"', "two\r\nlines"]
    # A spreadsheet with empty columns; quotation marks inside of a field need no others around it.
    path.write_bytes(b'id,size,,\r\na,6" slide,,\r\n\r\nb, "quoted",,\r\n')
    assert [row["size"] for _, row in read_csv(path)] == ['6" slide', ' "quoted"']


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"id,text\na,\xe4\n", r"a\.csv:2: not UTF-8 \(byte 0xe4\).*iconv -f latin1"),
        (b"id,text\na,b\n" + b"x" * (11 << 20), r"a\.csv:3: no CSV: field larger"),
        (b'id,text\na,b\n"b,c\nd,e\n', r"a\.csv:3: no CSV: unexpected end of data.*quotation mark"),
        (b'id,text\na,b\n"b,c\n"d,e\n', r"a\.csv:3: no CSV: ',' expected after '\"'.*not doubled"),
        (b'id,"text\na,b\n', r"a\.csv:1: no CSV: unexpected end of data"),
        (b"id,mpp,mpp\na,1,2\n", r"a\.csv:1: several columns are named mpp; rename or remove"),
        (b"text\n", r"a\.csv:1: no column id and no column name; found text"),
        (b"", r"a\.csv:1: no column id and no column name; found nothing"),
    ],
)
def test_a_bad_table_is_named_with_its_line(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    columns = ["name", "id"] if b"id" not in content else []
    with pytest.raises(ValueError, match=reason):
        list(read_csv(tmp_path / "a.csv", columns=columns))
    with pytest.raises(FileNotFoundError, match=r"b\.csv: no such file"):
        list(read_csv(tmp_path / "b.csv"))


def test_half_a_surrogate_pair_is_written_escaped(tmp_path: Path) -> None:
    written = [{"id": "ä"}, {"id": "\ud800"}]
    write_rows(tmp_path / "a.jsonl", written)
    assert [row for _, row in read_rows(tmp_path / "a.jsonl")] == written
    assert "ä" in (tmp_path / "a.jsonl").read_text()


def test_files_of_rows_appear_together_or_not_at_all(tmp_path: Path) -> None:
    paths = (tmp_path / "new" / "a.jsonl", tmp_path / "new" / "b.jsonl")
    with pytest.raises(RuntimeError), row_files(*paths) as (first, second):
        second.write(b"{}\n")
        raise RuntimeError
    assert {path.name for path in paths[0].parent.iterdir()} == {".a.jsonl.lock"}
    with row_files(*paths) as (first, second):
        first.write(b"1\n")
        second.write(b"2\n")
    assert [path.read_text() for path in paths] == ["1\n", "2\n"]
