from __future__ import annotations

import json
from pathlib import Path

import pytest

from pallava.rows import check_share, read_rows


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


def test_a_bad_line_is_one_bad_row(tmp_path: Path) -> None:
    lines = [b'{"id": 1}', b'{"id": ', b'{"id": "\xff\xfe"}', b"[" * 100_000, b"7", b'{"id": 6}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    rows = list(read_rows(tmp_path / "a.jsonl"))
    assert [number for number, _ in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0][1] == {"id": 1}
    assert all(row.startswith("no JSON: ") for _, row in rows[1:4])
    assert rows[4:] == [(5, 7), (6, {"id": 6})]


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\xff", b"[" * 100_000])
def test_a_json_file_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"data_path .*a\.json: no JSON"):
        list(read_rows(tmp_path / "a.json"))


def test_a_json_file_must_be_an_array(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="expected an array of rows, found dict"):
        list(read_rows(tmp_path / "a.json"))


def test_other_extensions_and_absent_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"a\.csv: expected \.json or \.jsonl, found '\.csv'"):
        list(read_rows(tmp_path / "a.csv"))
    with pytest.raises(FileNotFoundError, match=r"data_path .*b\.json: no such file"):
        list(read_rows(tmp_path / "b.json"))


@pytest.mark.parametrize(
    ("bad", "total", "stops"),
    [(0, 0, False), (0, 5, False), (3, 9, False), (9, 9, True), (1, 10, False), (2, 10, True)],
)
def test_a_tenth_of_ten_rows_or_more_stops_the_run(bad: int, total: int, stops: bool) -> None:
    faults = {str(index): f"fault {index}" for index in range(bad)}
    if not stops:
        check_share(bad, total, "rows.jsonl", faults)
        return
    with pytest.raises(ValueError, match=rf"rows\.jsonl: {bad} of {total} rows") as caught:
        check_share(bad, total, "rows.jsonl", faults)
    assert "fault 1" in str(caught.value)
    assert "fault 3" not in str(caught.value)
