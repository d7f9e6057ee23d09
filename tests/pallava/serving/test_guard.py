"""Requests that the guard rejects, over raw sockets where a client library would not send them."""

from __future__ import annotations

import base64
import http.client
import json
import logging
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pallava.inference.assistant import Assistant
from pallava.serving.app import create_app
from pallava.serving.guard import SECURITY_HEADERS, GuardSettings
from pallava.serving.service import ModelService
from tests.pallava.serving.conftest import NAME, send_raw, serving

CHAT = "/v1/chat/completions"
KEY = "a key with ümlauts"


@pytest.fixture(scope="module")
def locked(assistant: Assistant) -> Iterator[int]:
    settings = GuardSettings(hosts=("127.0.0.1",), api_key=KEY)
    with serving(create_app(ModelService(assistant, NAME), settings)) as number:
        yield number


def status(port: int, method: str = "GET", path: str = "/v1/models", **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, headers=fields)
    found = connection.getresponse().status
    connection.close()
    return found


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:7860", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("127.0.0.1:80@evil.example", 421),
        ("localhost", 421),
        ("", 421),
    ],
)
def test_only_the_servers_own_names_are_answered(port: int, host: str, expected: int) -> None:
    assert status(port, Host=host) == expected


@pytest.mark.parametrize(
    ("origin", "expected"),
    [("http://127.0.0.1:{port}", 400), ("https://evil.example", 403), ("null", 403)],
)
def test_pages_from_elsewhere_cannot_write(port: int, origin: str, expected: int) -> None:
    assert status(port, "POST", CHAT, Origin=origin.format(port=port)) == expected


def basic(password: str, user: str = "anyone") -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize(
    ("authorization", "expected"),
    [
        (f"Bearer {KEY}", 200),
        (basic(KEY), 200),
        (f"Bearer {KEY}x", 401),
        (basic("wrong"), 401),
        ("Basic ####", 401),
        ("Bearer", 401),
        ("Digest abc", 401),
        ("", 401),
    ],
)
def test_a_key_is_wanted_where_one_is_set(locked: int, authorization: str, expected: int) -> None:
    headers = [(b"Authorization", authorization.encode())]
    found = httpx.get(f"http://127.0.0.1:{locked}/v1/models", headers=headers)
    assert found.status_code == expected
    if expected == 401:
        assert found.json()["error"]["type"] == "authentication_error"
        assert found.headers["www-authenticate"].startswith("Basic")
    assert httpx.get(f"http://127.0.0.1:{locked}/health").status_code == 200


def test_the_key_is_in_no_text(locked: int, caplog: pytest.LogCaptureFixture) -> None:
    assert KEY not in repr(GuardSettings(api_key=KEY))
    with caplog.at_level(logging.DEBUG):
        found = httpx.get(f"http://127.0.0.1:{locked}/", headers=[(b"Authorization", b"Bearer x")])
    assert KEY not in found.text + str(found.headers) + caplog.text


def test_every_answer_forbids_foreign_content(port: int) -> None:
    own = f"127.0.0.1:{port}"
    for path, host in (("health", own), ("none", own), ("v1/models", own), ("health", "evil")):
        found = httpx.get(f"http://{own}/{path}", headers={"Host": host})
        assert SECURITY_HEADERS.items() <= dict(found.headers).items()


def zeros(total: int, *, chunked: bool) -> Iterator[bytes]:
    piece = bytes(1 << 18)
    for _ in range(total // len(piece)):
        yield f"{len(piece):x}\r\n".encode() + piece + b"\r\n" if chunked else piece


HUGE = 2 << 30


@pytest.mark.parametrize("path", [CHAT, "/none"])
@pytest.mark.parametrize("framing", [f"Content-Length: {HUGE}", "Transfer-Encoding: chunked"])
def test_two_gigabytes_are_refused_early(port: int, path: str, framing: str) -> None:
    head = f"POST {path} HTTP/1.1\nHost: 127.0.0.1\nContent-Type: application/json\n{framing}\n\n"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer, sent = send_raw(port, head, zeros(HUGE, chunked="chunked" in framing))
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert sent < 64 << 20, "what fits into socket buffers, and no more"
    if answer:  # a reset may overtake the answer
        early = {b"413"} if path == CHAT else {b"413", b"404"}
        assert answer.split(b" ")[1] in early
    if "Length" in framing:
        assert answer
    assert grown_kib < 64 << 10
    assert status(port) == 200


def test_the_length_that_is_counted_is_the_real_one(port: int) -> None:
    """A chunked body one byte above the limit, however it is cut; and one at the limit."""
    limit = 1 << 20
    for size, expected in ((limit + 1, b" 413 "), (limit, b" 400 ")):
        head = f"POST {CHAT} HTTP/1.1\nHost: 127.0.0.1\nTransfer-Encoding: chunked\n"
        head += "Connection: close\n\n"
        body = [
            f"{size - 5:x}\r\n".encode() + bytes(size - 5) + b"\r\n",
            b"5\r\n12345\r\n0\r\n\r\n",
        ]
        answer, _ = send_raw(port, head, iter(body))
        assert expected in answer.split(b"\r\n")[0]


@pytest.mark.parametrize(
    "framing",
    [
        "Content-Length: -1",
        "Content-Length: 5\nContent-Length: 6",
        f"Content-Length: {'9' * 40}",
        "Content-Length: 5\nTransfer-Encoding: chunked",
    ],
)
def test_lying_lengths_do_no_harm(port: int, framing: str) -> None:
    head = f"POST {CHAT} HTTP/1.1\nHost: 127.0.0.1\nConnection: close\n{framing}\n\n"
    answer, _ = send_raw(port, head, iter([b"5\r\n12345\r\n0\r\n\r\n"]))
    assert answer.split(b" ")[1] in {b"400", b"413"}
    assert status(port) == 200


def test_websockets_are_closed(port: int) -> None:
    head = (
        "GET /ws HTTP/1.1\nHost: 127.0.0.1\nConnection: Upgrade\nUpgrade: websocket\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\nSec-WebSocket-Version: 13\n\n"
    )
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    with connection:
        connection.sendall(head.replace("\n", "\r\n").encode())
        assert int(connection.recv(4096).split(b" ")[1]) >= 400


def test_the_package_needs_neither_xtuner_nor_a_network_when_imported() -> None:
    code = (
        "import sys, json, pallava.serving.app; heavy = {'xtuner', 'mmengine', 'gradio'}; "
        "print(json.dumps(sorted(heavy & set(sys.modules))))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True,
                           cwd=Path(__file__).parents[3])  # fmt: skip
    assert json.loads(found.stdout) == []
