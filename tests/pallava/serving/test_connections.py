"""Connections that send nothing, or too slowly, do not block others."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from pallava.serving.connections import timed_protocol
from pallava.serving.guard import Guard, GuardSettings, Message, Receive, Send
from tests.pallava.serving.conftest import serving

MAX_CONNECTIONS = 40


async def echo(scope: object, receive: Receive, send: Send) -> None:
    """Reads the whole body and says how long it was."""
    length = 0
    while True:
        message: Message = await receive()
        if message["type"] != "http.request":
            return
        length += len(message["body"])
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(length).encode()})


async def application(scope: dict, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        for answer in ("lifespan.startup.complete", "lifespan.shutdown.complete"):
            await receive()
            await send({"type": answer})
        return
    await echo(scope, receive, send)


@pytest.fixture
def port() -> Iterator[int]:
    guarded = Guard(application, GuardSettings(body_grace_s=0.5))
    protocol = timed_protocol(header_s=1.0, max_waiting=20)
    with serving(guarded, http=protocol, limit_concurrency=MAX_CONNECTIONS) as number:
        yield number


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(65536) == b""
    except ConnectionResetError:
        return True


def test_idle_connections_leave_room_for_others(port: int) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(port)) for _ in range(MAX_CONNECTIONS + 20)]
        time.sleep(0.3)
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        assert all(is_closed(connection) for connection in idle)  # in the end, all of them


def test_headers_that_trickle_are_given_up(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        for _ in range(100):
            try:
                connection.sendall(b"X-Line: 1\r\n")
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(0.1)
        else:
            pytest.fail("a header of 100 lines in ten seconds was waited for")


@pytest.mark.parametrize("pause_s", [0.1, 1.0])
def test_bodies_that_trickle_are_given_up(port: int, pause_s: float) -> None:
    with connect(port) as connection:
        head = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head)
        for _ in range(100):
            try:
                connection.sendall(b"x")
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(pause_s)
            if select.select([connection], [], [], 0)[0]:
                assert b"408" in connection.recv(1000).split(b"\r\n")[0]
                break
        else:
            pytest.fail("a body of 100 bytes was waited for")


def test_a_second_request_on_a_kept_connection_is_answered(port: int) -> None:
    with httpx.Client() as client:
        for _ in range(3):
            answer = client.post(f"http://127.0.0.1:{port}/", content=b"x" * 100_000)
            assert (answer.status_code, answer.text) == (200, "100000")
            time.sleep(0.2)
