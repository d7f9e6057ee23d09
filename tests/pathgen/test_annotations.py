"""Reading PathGen's annotations: strict, in order, in constant memory."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathgen.annotations import AnnotationError, parse_annotation, read_annotations
from tests.wsi.real_data import real_file
from wsi.requests import PatchRequest, RejectedRow, RequestTable

ROW = {"wsi_id": "TCGA-00.A", "position": ["41024", "35104"], "caption": "Glands."}


def parse(**changes: Any) -> tuple[str, int, int, str]:
    return parse_annotation({**ROW, **changes})


def test_both_names_of_the_id_and_both_kinds_of_position() -> None:
    expected = ("TCGA-00.A", 41024, 35104, "Glands.")
    assert parse_annotation(ROW) == expected
    script = {"WSI_id": "TCGA-00.A", "position": [41024, 35104.0], "caption": "Glands."}
    assert parse_annotation(script) == expected
    assert parse(position=(Decimal("41024.0"), "35104")) == expected
    assert parse(position=["-7", 0])[1:3] == (-7, 0)


@pytest.mark.parametrize(
    "value",
    [" 10", "10 ", "1_000", "\uff11\uff10", "10.9", "1e3", "", "abc", "+5", "--5", True, None,
     10.9, float("nan"), float("inf"), [1], {}, "9" * 11, 2**31, -(2**31), 2**70, "\u0663"],
)  # fmt: skip
def test_positions_that_are_no_whole_numbers(value: Any) -> None:
    with pytest.raises(AnnotationError) as error:
        parse(position=[value, "5"])
    assert error.value.reason == "bad position"


@pytest.mark.parametrize("position", [None, "41024", [], ["1"], ["1", "2", "3"], {"x": 1}])
def test_positions_that_are_no_pairs(position: Any) -> None:
    with pytest.raises(AnnotationError, match="expected two numbers"):
        parse(position=position)


@given(st.integers(-(2**31) + 1, 2**31 - 1), st.integers(-(2**31) + 1, 2**31 - 1))
def test_whole_numbers_come_back_however_they_are_written(x: int, y: int) -> None:
    for write in (int, str, float, Decimal):
        assert parse(position=[write(x), write(y)])[1:3] == (x, y)


@pytest.mark.parametrize(
    "slide_id", ["../../etc/passwd", "/etc/passwd", "..", "", "a\0b", "a\nb", 7, None, "x" * 250,
                 "\ud800", "a/b", "a\\b"],
)  # fmt: skip
def test_ids_that_would_leave_the_folder(slide_id: Any) -> None:
    with pytest.raises(AnnotationError) as error:
        parse(wsi_id=slide_id)
    assert error.value.reason == "bad id"


@pytest.mark.parametrize("caption", [None, "", " \n", 7, "a\0b", "half \ud83d emoji"])
def test_captions_that_are_no_text(caption: Any) -> None:
    with pytest.raises(AnnotationError) as error:
        parse(caption=caption)
    assert error.value.reason == "bad caption"


def test_captions_come_as_they_are() -> None:
    caption = " first\r\nsecond\n\t\u2028 🔬 \x1b[31m "
    assert parse(caption=caption)[3] == caption


@pytest.mark.parametrize("layout", ["array", "lines", "array_bom", "lines_bom"])
def test_bad_rows_among_good_ones_keep_their_numbers(tmp_path: Path, layout: str) -> None:
    rows = [ROW, {**ROW, "position": ["x", 1]}, "no object", {**ROW, "position": [1, 2]}, None]
    lines = [json.dumps(row) for row in rows]
    text = "[\n" + ",\n".join(lines) + "]\n" if "array" in layout else "\n".join(lines) + "\n\n"
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8-sig" if "bom" in layout else "utf-8")
    found = list(read_annotations(path, patch_px=100))
    assert [row.number for row in found] == [1, 2, 3, 4, 5]
    assert found[0] == PatchRequest(1, "TCGA-00.A", 41024, 35104, 100, 100, "Glands.")
    assert isinstance(found[3], PatchRequest) and found[3].size_level0 == 100
    reasons = [row.reason for row in found if isinstance(row, RejectedRow)]
    assert reasons == ["bad position", "bad row", "bad row"]


def test_a_bad_line_is_a_bad_row(tmp_path: Path) -> None:
    good = json.dumps(ROW).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([good, b'{"wsi_id": ', b'{"caption": "\xff"}', good]))
    found = list(read_annotations(path))
    assert [isinstance(row, RejectedRow) for row in found] == [False, True, True, False]


def test_files_that_are_not_whole_or_something_else(tmp_path: Path) -> None:
    whole = json.dumps([ROW] * 5)
    (tmp_path / "cut.json").write_text(whole[:-30])
    (tmp_path / "text.json").write_text("wsi_id,position\n")
    (tmp_path / "empty.json").touch()
    (tmp_path / "wrong.json").write_text('[{"wsi_id" 3}]')
    with pytest.raises(ValueError, match="breaks off"):
        list(read_annotations(tmp_path / "cut.json"))
    with pytest.raises(ValueError, match="near byte"):
        list(read_annotations(tmp_path / "wrong.json"))
    for name in ("text.json", "empty.json"):
        with pytest.raises(ValueError, match="a JSON array of objects"):
            list(read_annotations(tmp_path / name))
    with pytest.raises(FileNotFoundError):
        list(read_annotations(tmp_path / "absent.json"))


MEMORY = """
import sys
from pathlib import Path
from pathgen.annotations import read_annotations
from wsi.requests import RequestTable
def peak_kib():
    lines = open("/proc/self/status").read().splitlines()  # ru_maxrss is the parent's, too
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
before = peak_kib()
RequestTable.build(Path(sys.argv[2]), read_annotations(sys.argv[1]))
print((peak_kib() - before) / 1024)
"""


@pytest.mark.parametrize("layout", ["array", "lines"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, layout: str) -> None:
    def peak_mib(number: int) -> float:
        path = tmp_path / f"{number}.json"
        rows = [
            json.dumps({**ROW, "position": [n, n], "caption": f"{n} " + "x" * 2000})
            for n in range(number)
        ]
        path.write_text(f"[{','.join(rows)}]" if layout == "array" else "\n".join(rows))
        command = [sys.executable, "-c", MEMORY, str(path), str(tmp_path / f"{number}.sqlite")]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(result.stdout)

    few, many = peak_mib(15_000), peak_mib(60_000)
    size_mib = 60_000 * 2100 / 2**20
    assert many < few + 0.15 * size_mib


def test_requests_are_sorted_and_numbered(tmp_path: Path) -> None:
    rows = [
        PatchRequest(1, "b", 5, 0, 9, 9, "1"),
        PatchRequest(2, "a", 7, 9, 9, 9, "2"),
        RejectedRow(3, "bad row", "x"),
        PatchRequest(4, "a", 9, 1, 9, 9, "4"),
        PatchRequest(5, "b", 5, 0, 9, 9, "5"),
        PatchRequest(6, "a", 2, 1, 9, 9, None),
        PatchRequest(7, "b", 5, 0, 9, 9, "7"),
    ]
    RequestTable.build(tmp_path / "t.sqlite", rows)
    with RequestTable(tmp_path / "t.sqlite") as table:
        assert len(table) == 4
        parts = [table.part(number, 3) for number in range(3)]
        assert [[row.number for row in part] for part in parts] == [[6, 4, 2], [1], []]
        assert parts[0][0] == rows[5]
        rejected = list(table.rejected())
    assert [(row.number, row.reason) for row in rejected] == [
        (3, "bad row"), (5, "duplicate"), (7, "duplicate")
    ]  # fmt: skip
    assert "row 1 asked for this" in rejected[2].detail


def test_parts_are_those_with_requests_also_in_tables_of_0_1_0(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [
        PatchRequest(n, f"s{draw.randrange(12)}", draw.randrange(9), draw.randrange(9), 9, 9, "")
        for n in range(1, 400)
    ]
    path, size = tmp_path / "t.sqlite", 7
    missing = {"s3", "s4", "s8", "s11"}
    RequestTable.build(path, rows, lambda name: ("missing", name) if name in missing else None)

    def found() -> tuple[int, list[int], list[int]]:
        with RequestTable(path) as table:
            return len(table), table.parts_with_requests(size), table.parts_of(["s2", "s8"], size)

    with RequestTable(path) as table:
        parts = {n: table.part(n, size) for n in range(table.num_positions // size + 1)}
        count, with_requests, of_two = found()
        assert count == sum(map(len, parts.values()))
        assert with_requests == [number for number, part in parts.items() if part]
        assert len(with_requests) < len(parts)
    assert {n for n, part in parts.items() if any(row.slide_id == "s2" for row in part)} <= {
        *of_two
    }
    connection = sqlite3.connect(path)
    connection.execute("ALTER TABLE slides DROP COLUMN first_position")
    connection.execute("ALTER TABLE slides DROP COLUMN last_position")
    connection.close()
    assert found() == (count, with_requests, of_two)


def test_the_published_rows() -> None:
    rows = list(read_annotations(real_file("pathgen/PathGen-1.6M_sample.json")))
    assert len(rows) == 5000
    requests = [row for row in rows if isinstance(row, PatchRequest)]
    assert len(requests) == 5000
    assert len({row.slide_id for row in requests}) == 3582
    assert {row.size_level0 for row in requests} == {672}
