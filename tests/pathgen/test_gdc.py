"""Manifests for the GDC's transfer tool, from a listing and from the service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pathgen.gdc import ask_gdc, needed_slides, read_listing, write_manifest
from tests.fake_server import FakeServer, running

HEADER = "id\tfilename\tmd5\tsize\tstate\n"
IDS = {"TCGA-00-0001-01Z-00-DX1.A", "TCGA-00-0002-01Z-00-DX1.B"}


def test_from_a_listing(tmp_path: Path) -> None:
    rows = [{"wsi_id": i, "position": [n, 0], "caption": "x"} for n, i in enumerate([*IDS, *IDS])]
    rows += [{"wsi_id": "../evil", "position": [1, 2], "caption": "x"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert needed_slides(tmp_path / "a.json") == (IDS, {"bad id": 1})
    listing = HEADER
    for number, name in enumerate(["TCGA-00-0001-01Z-00-DX1.A.svs", "other.svs"]):
        listing += f"uuid{number}\t{name}\tmd5{number}\t12{number}\treleased\n"
    (tmp_path / "all.txt").write_text(listing)
    missing = write_manifest(tmp_path / "m.txt", IDS, read_listing(tmp_path / "all.txt"))
    assert missing == ["TCGA-00-0002-01Z-00-DX1.B"]
    expected = "uuid0\tTCGA-00-0001-01Z-00-DX1.A.svs\tmd50\t120\treleased\n"
    assert (tmp_path / "m.txt").read_text() == HEADER + expected


def test_listings_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="manifest of the GDC portal"):
        list(read_listing(tmp_path / "a.csv"))
    with pytest.raises(FileNotFoundError):
        list(read_listing(tmp_path / "absent.txt"))


class Service(FakeServer):
    """Answers as https://api.gdc.cancer.gov/files does."""

    page: bytes | None = None

    def reply(self, key: str, number: int) -> tuple[int, Any]:
        hits = [
            {"file_id": f"id-{name}", "file_name": name, "md5sum": "m", "file_size": 5,
             "state": "released"}
            for name in json.loads(key)["filters"]["content"]["value"]
        ]  # fmt: skip
        return 200, self.page or {"data": {"hits": hits}}


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("no_proxy", "*")
    with running(Service()) as server:
        yield server


def test_from_the_service_in_batches(service: Service, tmp_path: Path) -> None:
    ids = {f"TCGA-{n:04d}" for n in range(450)}
    assert write_manifest(tmp_path / "m.txt", ids, ask_gdc(ids, url=service.url)) == []
    assert [len(q["filters"]["content"]["value"]) for q in service.bodies] == [200, 200, 50]
    lines = (tmp_path / "m.txt").read_text().splitlines()
    assert lines[1] == "id-TCGA-0000.svs\tTCGA-0000.svs\tm\t5\treleased"
    assert len(lines) == 451


def test_no_good_answer(service: Service, tmp_path: Path) -> None:
    service.page = b"<html>maintenance</html>"
    with pytest.raises(ConnectionError, match="no valid answer"):
        write_manifest(tmp_path / "m.txt", IDS, ask_gdc(IDS, url=service.url))
    assert not (tmp_path / "m.txt").exists()
    with pytest.raises(ConnectionError):
        list(ask_gdc(IDS, url="http://127.0.0.1:9"))
