"""Manifests for the GDC's transfer tool, from a listing and from the service."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pathgen.gdc import ask_gdc, needed_slides, read_listing, write_manifest

HEADER = "id\tfilename\tmd5\tsize\tstate\n"
IDS = {"TCGA-00-0001-01Z-00-DX1.A", "TCGA-00-0002-01Z-00-DX1.B"}


def test_from_a_listing(tmp_path: Path) -> None:
    rows = [{"wsi_id": i, "position": [n, 0], "caption": "x"} for n, i in enumerate([*IDS, *IDS])]
    rows += [{"wsi_id": "../evil", "position": [1, 2], "caption": "x"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert needed_slides(tmp_path / "a.json") == IDS
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


class Service(BaseHTTPRequestHandler):
    """Answers as https://api.gdc.cancer.gov/files does; slides in `broken` break it."""

    queries: list[Any] = []
    reply: bytes | None = None

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.queries.append(query)
        hits = [
            {"file_id": f"id-{name}", "file_name": name, "md5sum": "m", "file_size": 5,
             "state": "released"}
            for name in query["filters"]["content"]["value"]
        ]  # fmt: skip
        body = self.reply or json.dumps({"data": {"hits": hits}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    Service.queries, Service.reply = [], None
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_from_the_service_in_batches(service: str, tmp_path: Path) -> None:
    ids = {f"TCGA-{n:04d}" for n in range(450)}
    assert write_manifest(tmp_path / "m.txt", ids, ask_gdc(ids, url=service)) == []
    assert [len(q["filters"]["content"]["value"]) for q in Service.queries] == [200, 200, 50]
    lines = (tmp_path / "m.txt").read_text().splitlines()
    assert lines[1] == "id-TCGA-0000.svs\tTCGA-0000.svs\tm\t5\treleased"
    assert len(lines) == 451


def test_no_good_answer(service: str, tmp_path: Path) -> None:
    Service.reply = b"<html>maintenance</html>"
    with pytest.raises(ConnectionError, match="no valid answer"):
        write_manifest(tmp_path / "m.txt", IDS, ask_gdc(IDS, url=service))
    assert not (tmp_path / "m.txt").exists()
    with pytest.raises(ConnectionError):
        list(ask_gdc(IDS, url="http://127.0.0.1:9"))
