from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallava.converters.parts import Joined, Part, Shard, run_in_parts
from pathcore.files import OutputExistsError, folder_lock


class Killed(BaseException):
    pass


def job(
    rows: Sequence[int],
    out: Path,
    part_rows: int = 3,
    shard: Shard | None = None,
    stop_at: int | None = None,
    done: list[int] | None = None,
    inputs: Any = 1,
) -> dict[str, Any] | None:
    def handle(batch: Sequence[int]) -> Part:
        if stop_at is not None and stop_at in batch:
            raise Killed
        if done is not None:
            done.extend(batch)
        even = [{"n": row, "text": "tab\t line \u2028"} for row in batch if row % 2 == 0]
        odd = [{"n": row} for row in batch if row % 2]
        return Part({"even.jsonl": even, "odd.jsonl": odd}, Counter(rows=len(batch)), batch[0])

    def report(joined: Joined, folder: Path) -> dict[str, Any]:
        return {"rows": joined.counts["rows"], "firsts": joined.notes}

    return run_in_parts(
        rows,
        handle,
        out,
        inputs={"what": inputs},
        report_name="report.json",
        names=("even.jsonl", "odd.jsonl"),
        report=report,
        part_rows=part_rows,
        shard=shard,
    )


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 12), shards=st.integers(1, 4), data=st.data())
def test_kills_and_shards_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, count: int, shards: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    rows = list(range(count))
    job(rows, folder / "plain")
    stop = data.draw(st.integers(0, count - 1))
    done: list[int] = []
    with pytest.raises(Killed):
        job(rows, folder / "killed", stop_at=stop, done=done)
    job(rows, folder / "killed", done=done)
    assert sorted(done) == rows, "nothing is done twice"
    for index in data.draw(st.permutations(range(shards))):
        assert job(rows, folder / "sharded", shard=Shard(index, shards)) is None
    none: list[int] = []
    job(rows, folder / "sharded", done=none)
    assert none == [], "the last call only joins"
    assert contents(folder / "plain") == contents(folder / "killed") == contents(folder / "sharded")
    assert [json.loads(line)["n"] for line in (folder / "plain" / "odd.jsonl").open()] == rows[1::2]


def test_finished_folders_are_kept(tmp_path: Path) -> None:
    first = job([1, 2], tmp_path)
    (tmp_path / ".parts").mkdir()
    assert job([1, 2], tmp_path, stop_at=1) == first
    assert not (tmp_path / ".parts").exists()
    with pytest.raises(OutputExistsError, match="other data or options"):
        job([1, 2], tmp_path, inputs=2)


def test_parts_of_other_inputs_are_not_used(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        job([1, 3, 4, 5], tmp_path, stop_at=5)
    with pytest.raises(OutputExistsError, match="another shard"):
        job([7], tmp_path, inputs=2, shard=Shard(0, 2))
    assert job([7], tmp_path, inputs=2) is not None
    assert (tmp_path / "odd.jsonl").read_text() == '{"n": 7}\n'


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        job([1, 2], tmp_path, stop_at=1)
    # Held as the shard of another machine holds it.
    with folder_lock(tmp_path / ".parts" / ".lock", shared=True):
        with pytest.raises(OutputExistsError, match="another process"):
            job([1, 2], tmp_path)
        assert job([1, 2], tmp_path, shard=Shard(0, 2)) is None
    assert job([1, 2], tmp_path) is not None


def test_shards_by_text() -> None:
    assert Shard.parse("3/8") == Shard(3, 8)
    for text in ("8/8", "1", "-1/3", "a/b"):
        with pytest.raises(ValueError, match="shard"):
            Shard.parse(text)
