"""A local HTTP server that speaks the chat-completions protocol, well and badly."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STALL_S = 1.5
PROMPT_TOKENS, REPLY_TOKENS = 100, 10
WORDS = (
    "Sheets of atypical epithelial cells with vesicular nuclei and prominent nucleoli lie in a "
    "fibrous stroma with scattered lymphocytes, a few mitoses and small foci of necrosis."
)


class DescriberServer(ThreadingHTTPServer):
    """Behaves as a word in brackets, `[stall]` for instance, in the last user message says.

    `fail500`, `fail429`, `stall`: the first two requests fail so, the third succeeds; `always500`;
    `bad400`; `filtered`, `filter400`, `declined`: verdicts about the content;
    `html`, `brokenjson`, `nochoices`, `nousage`; `short`, `refusal`, `leak`, `cut`,
    `control`: replies that cannot be used; `once`: the first reply is a refusal. Otherwise
    `write(user text)` is the reply.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.write: Callable[[str], str] = lambda text: f"{WORDS} {_number(text)}"
        self.requests: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.paths: set[str] = set()
        self.api_keys: set[str | None] = set()
        self.lock = threading.Lock()
        self.running = self.most_running = 0
        self.refuse: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


def user_text(body: dict[str, Any]) -> str:
    """The first user message's text."""
    content = next(m["content"] for m in body["messages"] if m["role"] == "user")
    if isinstance(content, str):
        return content
    return next(part["text"] for part in content if part["type"] == "text")


def _number(text: str) -> str:
    found = re.findall(r"case (\d+)", text)
    return f"Field {found[-1]}." if found else "No number."


class _Handler(BaseHTTPRequestHandler):
    server: DescriberServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, text = self.server, user_text(body)
        with server.lock:
            server.requests[text] += 1
            number = server.requests[text]
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            server.paths.add(self.path)
            server.api_keys.add(self.headers["api-key"])
            server.running += 1
            server.most_running = max(server.most_running, server.running)
        try:
            self._reply(text, number)
        except (BrokenPipeError, ConnectionResetError):  # the client gave up waiting
            self.close_connection = True
        finally:
            with server.lock:
                server.running -= 1

    def _reply(self, text: str, number: int) -> None:
        if self.server.refuse is not None:
            self._send(self.server.refuse, {"error": {"message": "refused"}})
            return
        found = re.search(r"\[(\w+)\]", text)
        mood = found[1] if found else ""
        if mood.startswith("fail") and number <= 2:
            self._send(int(mood[4:7]), {"error": {"message": "not now"}})
        elif mood == "always500":
            self._send(500, {"error": {"message": "never"}})
        elif mood == "bad400":
            self._send(400, {"error": {"message": "what is that"}})
        elif mood == "filter400":
            error = {"message": "The response was filtered", "code": "content_filter"}
            self._send(400, {"error": error})
        elif mood == "drip":  # one blank at a time, for six seconds
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(60):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
            self.close_connection = True
        elif mood == "brokenjson":
            self._send_bytes(200, b'{"choices": [', "application/json")
        elif mood == "html":
            self._send_bytes(200, b"<html>welcome</html>", "text/html")
        elif mood == "nochoices":
            self._send(200, {"object": "chat.completion", "choices": []})
        else:
            if mood == "stall" and number <= 2:
                time.sleep(STALL_S)
            self._send(200, _completion(self._content(mood, number, text), mood))

    def _content(self, mood: str, number: int, text: str) -> str:
        if mood == "refusal" or (mood == "once" and number == 1):
            return f"I'm sorry, but I cannot describe this. {WORDS}"
        return {
            "short": "Tissue.",
            "leak": f"Based on the additional description, {WORDS}",
            "control": f"{WORDS}\x00",
            "surrogate": f"{WORDS}\ud800",
            "empty": " ",
        }.get(mood) or self.server.write(text)

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


def _completion(content: str, mood: str) -> dict[str, Any]:
    usage = {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": REPLY_TOKENS,
        "total_tokens": PROMPT_TOKENS + REPLY_TOKENS,
    }
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "describer",
        "choices": [
            {
                "index": 0,
                "finish_reason": {"cut": "length", "filtered": "content_filter"}.get(mood, "stop"),
                "message": {
                    "role": "assistant",
                    "content": None if mood in ("filtered", "declined") else content,
                    **({"refusal": "I will not."} if mood == "declined" else {}),
                },
            }
        ],
        **({} if mood == "nousage" else {"usage": usage}),
    }


@contextmanager
def running_server() -> Iterator[DescriberServer]:
    server = DescriberServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
