"""A served model: the recorded one, over real HTTP on loopback."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from pallava import load_model
from pallava.inference.assistant import Assistant
from pallava.serving.app import create_app
from pallava.serving.guard import GuardSettings
from pallava.serving.service import ModelService
from tests.pallava import goldens
from tests.pallava.tiny_folders import make_folders

NAME = "tiny"


@contextmanager
def serving(app: Any, **settings: Any) -> Iterator[int]:
    """Runs an application on a free port of loopback; gives the port."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, **settings)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
            assert thread.is_alive()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(timeout=20)


def send_raw(port: int, head: str, body: Iterable[bytes]) -> tuple[bytes, int]:
    """Sends a request as it is; gives the answer and how many bytes of the body got out.

    A server that refuses a request closes the connection, which the client sees while it sends, or
    as a reset that overtakes the answer.
    """
    sent, answer = 0, b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode())
        with suppress(BrokenPipeError, ConnectionResetError):
            for piece in body:
                connection.sendall(piece)
                sent += len(piece)
        with suppress(ConnectionResetError):
            while received := connection.recv(65536):
                answer += received
    return answer, sent


@pytest.fixture(scope="session")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    root = make_folders(tmp_path_factory.mktemp("served"), goldens.CROSSATTN_STATE)
    return load_model(root / "llama", root / "llava", root / "plip", device="cpu")


@pytest.fixture(scope="module")
def port(assistant: Assistant) -> Iterator[int]:
    service = ModelService(assistant, NAME)
    settings = GuardSettings(hosts=("127.0.0.1",), max_upload_bytes=1 << 20)
    with serving(create_app(service, settings, max_pixels=1_000_000)) as number:
        yield number


def picture(name: str) -> Path:
    return goldens.GOLDEN / "anyres" / name
