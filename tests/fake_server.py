"""Local HTTP servers for tests: JSON in, JSON out, well and badly."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

STALL_S = 1.5
PROMPT_TOKENS, REPLY_TOKENS = 100, 10


class FakeServer(ThreadingHTTPServer):
    """Records POST requests and replies as `reply` says.

    Attributes:
        requests: Number of requests by their key.
        bodies: Bodies of all requests.
        refuse: Status with which every request is refused; None to reply.
        refusal: Message with which it is refused.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.paths: set[str] = set()
        self.api_keys: set[str | None] = set()
        self.lock = threading.Lock()
        self.running = self.most_running = 0
        self.refuse: int | None = None
        self.refusal = "refused"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def key_of(self, body: dict[str, Any]) -> str:
        """Returns the text by which requests are counted."""
        return json.dumps(body)

    def reply(self, key: str, number: int) -> tuple[int, Any]:
        """Returns status and content; bytes are sent as they are.

        Args:
            key: Key of the request.
            number: How often it came, this time included.
        """
        raise NotImplementedError


Server = TypeVar("Server", bound=FakeServer)


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, key = self.server, self.server.key_of(body)
        with server.lock:
            server.requests[key] += 1
            number = server.requests[key]
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            server.paths.add(self.path)
            server.api_keys.add(self.headers["api-key"])
            server.running += 1
            server.most_running = max(server.most_running, server.running)
        try:
            if server.refuse is not None:
                self._send(server.refuse, {"error": {"message": server.refusal}})
            else:
                self._send(*server.reply(key, number))
        except (BrokenPipeError, ConnectionResetError):  # the client gave up waiting
            self.close_connection = True
        finally:
            with server.lock:
                server.running -= 1

    def _send(self, status: int, value: Any) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        drips = content == DRIP
        self.send_response(status)
        is_page = content.startswith(b"<html>")
        self.send_header("Content-Type", "text/html" if is_page else "application/json")
        self.send_header("Content-Length", "1000" if drips else str(len(content)))
        self.send_header("retry-after-ms", "10")
        self.end_headers()
        if not drips:
            self.wfile.write(content)
            return
        for _ in range(60):  # one blank at a time, for six seconds
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.1)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


DRIP = b" "
"""Content that arrives blank by blank and never ends."""


def chat_reply(mood: str, number: int, content: Callable[[], str]) -> tuple[int, Any]:
    """Replies in the chat-completions protocol, well and badly.

    Args:
        mood: `fail500`, `fail429`, `stall`: the first two requests fail so, the third succeeds;
            `always500`; `bad400`, `filter400`: refused; `brokenjson`, `nochoices`, `html`, `drip`:
            bodies that are no completion; `slow`: the reply takes a moment; `filtered`,
            `declined`, `cut`, `nousage`: completions that say so; `safety`, `broken`: finish
            reasons of other providers; `hidden`: all tokens went into hidden reasoning.
        number: How often the request came.
        content: Returns the text of the reply.
    """
    if mood.startswith("fail") and number <= 2:
        return int(mood[4:7]), {"error": {"message": "not now"}}
    failures: dict[str, tuple[int, Any]] = {
        "always500": (500, {"error": {"message": "never"}}),
        "bad400": (400, {"error": {"message": "what is that"}}),
        "filter400": (400, {"error": {"message": "filtered", "code": "content_filter"}}),
        "brokenjson": (200, b'{"choices": ['),
        "html": (200, b"<html>welcome</html>"),
        "nochoices": (200, {"object": "chat.completion", "choices": []}),
        "drip": (200, DRIP),
    }
    if mood in failures:
        return failures[mood]
    if mood == "stall" and number <= 2:
        time.sleep(STALL_S)
    if mood == "slow":
        time.sleep(0.4)
    message = {"role": "assistant", "content": content()}
    if mood in ("filtered", "declined", "hidden"):
        message["content"] = None  # type: ignore[assignment]
    if mood == "declined":
        message["refusal"] = "I will not."
    finish = {
        "cut": "length",
        "hidden": "length",
        "filtered": "content_filter",
        "safety": "SAFETY",
        "broken": "insufficient_system_resource",
    }.get(mood, "stop")
    completion: dict[str, Any] = {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "fake",
        "choices": [{"index": 0, "finish_reason": finish, "message": message}],
    }
    if mood != "nousage":
        total = PROMPT_TOKENS + REPLY_TOKENS
        completion["usage"] = {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": REPLY_TOKENS,
            "total_tokens": total,
        }
    return 200, completion


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Serves in a thread for the length of the body."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
