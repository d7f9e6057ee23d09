from __future__ import annotations

from pathlib import Path

import pytest

from pathcore.label_tables import read_label_table


def stem(name: str) -> str:
    if "/" in name:
        raise ValueError("not a name")
    return name.removesuffix(".svs")


def test_faulty_and_repeated_rows_are_left_out_with_their_lines(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(
        "name,label,group\n s1 , A ,p1\ns2,,p1\ns3\ns1.svs,A,p1\n,A,p1\na/b,A,p1\ns4,A, \n"
        "s5,A,p1,B\ns6,B,p2\ns7,NaN,p2\ns8,N/A,p2\n"
    )
    rows, skipped = read_label_table(table, "name", stem, optional=("group", "site"))
    assert rows == {
        "s1": {"name": "s1", "label": "A", "group": "p1"},
        "s6": {"name": "s6", "label": "B", "group": "p2"},
    }
    assert [(row["id"], row["reason"].removeprefix(f"table {table}")) for row in skipped] == [
        ("s2", ":3: no label"),
        ("s3", ":4: no label"),
        ("s1.svs", ":5: named twice, first in line 2"),
        ("line 6", ":6: no name"),
        ("a/b", ":7: not a name"),
        ("s4", ":8: no group"),
        ("s5", ":9: more cells than the header has; put quotes around commas"),
        ("s7", ":11: no label"),
        ("s8", ":12: no label"),
    ]
    assert list(read_label_table(table, "name", stem)[0]) == ["s1", "s4", "s6"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("s1.svs,B,p1", r"t\.csv:3: s1\.svs: label 'B', but 'A' in line 2; remove the wrong row"),
        ("s1,A,p2", r"t\.csv:3: s1: group 'p2', but 'p1' in line 2"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(f"name,label,group\ns1,A,p1\n{row}\n")
    with pytest.raises(ValueError, match=message):
        read_label_table(tmp_path / "t.csv", "name", stem, optional=("group",))
