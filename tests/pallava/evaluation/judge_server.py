"""A local HTTP server that speaks the chat-completions protocol, well and badly."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STALL_S = 1.5


class JudgeServer(ThreadingHTTPServer):
    """Behaves as the candidate text of each request says.

    `fail500`, `fail429`, `stall`: the first two requests fail so, the third succeeds; `always500`;
    `bad400`, `filter400`, `filtered`: refused; `slow`: the reply takes a moment; `words`,
    `range`, `twice`: replies without a usable number; `brokenjson`, `nochoices`, `html`:
    bodies that are no completion; `lie once`: no number at first, then one. Otherwise `score N`
    is replied as N.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: Counter[str] = Counter()
        self.keys: set[str] = set()
        self.lock = threading.Lock()
        self.running = self.most_running = 0
        self.refuse: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        candidate = json.loads(text[text.index("{") : text.index("}") + 1])["candidate"]
        server = self.server
        with server.lock:
            server.requests[candidate] += 1
            number = server.requests[candidate]
            server.keys.add(self.headers["Authorization"])
            server.running += 1
            server.most_running = max(server.most_running, server.running)
        try:
            self._reply(candidate, number)
        except (BrokenPipeError, ConnectionResetError):  # the client gave up waiting
            self.close_connection = True
        finally:
            with server.lock:
                server.running -= 1

    def _reply(self, candidate: str, number: int) -> None:
        if self.server.refuse is not None:
            self._send(self.server.refuse, {"error": {"message": "refused"}})
            return
        if candidate.startswith("fail") and number <= 2:
            self._send(int(candidate[4:7]), {"error": {"message": "not now"}})
        elif candidate.startswith("bad400"):
            self._send(400, {"error": {"message": "what is that"}})
        elif candidate == "filter400":
            self._send(400, {"error": {"message": "no", "code": "content_filter"}})
        elif candidate == "always500":
            self._send(500, {"error": {"message": "never"}})
        elif candidate == "brokenjson":
            self._send_bytes(200, b'{"choices": [', "application/json")
        elif candidate == "html":
            self._send_bytes(200, b"<html>welcome</html>", "text/html")
        elif candidate == "nochoices":
            self._send(200, {"object": "chat.completion", "choices": []})
        else:
            if candidate == "stall" and number <= 2:
                time.sleep(STALL_S)
            if candidate.startswith("slow"):
                time.sleep(0.4)
            completion = _completion(_content(candidate, number))
            if candidate == "filtered":
                completion["choices"][0]["finish_reason"] = "content_filter"
            self._send(200, completion)

    def _send(self, status: int, value: Any) -> None:
        self._send_bytes(status, json.dumps(value).encode(), "application/json")

    def _send_bytes(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("retry-after-ms", "10")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


def _content(candidate: str, number: int) -> str:
    if candidate == "words" or (candidate == "lie once" and number == 1):
        return "They are rather similar."
    if candidate == "range":
        return '{"score": 11}'
    if candidate == "twice":
        return '{"score": 2} or {"score": 9}'
    value = candidate.split()[-1] if candidate.startswith("score") else "5"
    return f"{{'score': {value}}} since both name it."


def _completion(content: str) -> dict[str, Any]:
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "judge",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": content},
            }
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }


@contextmanager
def running_server() -> Iterator[JudgeServer]:
    server = JudgeServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
