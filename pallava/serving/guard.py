"""Checks of every request before anything reads it: host, origin, key, size.

Implemented in plain ASGI: the body is counted as it arrives and rejected at the first excess byte,
regardless of its Content-Length.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

MAX_UPLOAD_BYTES = 64 << 20
MAX_MESSAGE_BYTES = 4 << 20
"""Limit for requests without images, such as the page's messages with a long conversation."""

BODY_GRACE_S = 30.0
"""Time in seconds that any body may take, and that it may pause."""
SLOWEST_BODY_BYTES_PER_S = 8 << 10
"""Minimum rate of a body after the grace period: 64 MiB may take over two hours, while a client
that trickles bytes is disconnected after half a minute."""

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
OPEN_PATHS = ("/health",)
_READING = ("GET", "HEAD")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Any, Receive, Send], Awaitable[None]]

SECURITY_HEADERS = {
    # Gradio's page needs inline scripts and styles and compiles templates. Nothing may be loaded
    # from, or sent to, other hosts.
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        "connect-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; "
        "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True)
class GuardSettings:
    """Access rules and request limits.

    Attributes:
        hosts: Host names by which the server may be addressed, without port; empty for any. On
            loopback this prevents DNS rebinding, where a foreign page resolves its own name to this
            server.
        api_key: Required as `Authorization: Bearer KEY`, or as the password of HTTP Basic, for
            which browsers prompt. None allows everyone.
        max_upload_bytes: Maximum size of a body at `upload_paths`.
        max_message_bytes: Maximum size of a body elsewhere.
        upload_paths: Paths that receive images.
        body_grace_s: Time in seconds that any body may take, and that it may pause.
    """

    hosts: tuple[str, ...] = ()
    api_key: str | None = field(default=None, repr=False)
    max_upload_bytes: int = MAX_UPLOAD_BYTES
    max_message_bytes: int = MAX_MESSAGE_BYTES
    upload_paths: tuple[str, ...] = ("/v1/chat/completions", "/gradio_api/upload")
    body_grace_s: float = BODY_GRACE_S


class Guard:
    """ASGI middleware that rejects requests according to `GuardSettings`."""

    def __init__(self, app: Application, settings: GuardSettings) -> None:
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif refusal := self._refusal(scope):
            await refuse(send, *refusal)
        else:
            await self._pass_on(scope, receive, send)

    def _refusal(self, scope: Any) -> tuple[int, str, dict[str, str]] | None:
        headers = _headers(scope)
        host = headers.get("host", "")
        if self.settings.hosts and _without_port(host) not in self.settings.hosts:
            known = ", ".join(self.settings.hosts)
            return 421, f"Host {host!r:.80} is none of this server's names: {known}", {}
        origin = headers.get("origin")
        if (
            scope["method"] not in _READING
            and origin is not None
            and origin.partition("://")[2] != host
        ):
            return 403, f"requests from pages of {origin!r:.80} are not taken", {}
        if scope["path"] not in OPEN_PATHS and not self._has_key(headers.get("authorization", "")):
            ask = {"www-authenticate": 'Basic realm="xtuner-add", charset="UTF-8"'}
            return 401, "an API key is wanted: Authorization: Bearer KEY", ask
        length = headers.get("content-length", "0")
        limit = self._limit(scope)
        if length.isdecimal() and len(length) < 20 and int(length) <= limit:
            return None
        return 413, _too_large(limit), {}

    def _has_key(self, authorization: str) -> bool:
        if self.settings.api_key is None:
            return True
        scheme, _, text = authorization.partition(" ")
        given = text.strip().encode("latin-1")  # the original bytes; headers are decoded as latin-1
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given, self.settings.api_key.encode())

    def _limit(self, scope: Any) -> int:
        uploads = scope["path"].rstrip("/") in self.settings.upload_paths
        return self.settings.max_upload_bytes if uploads else self.settings.max_message_bytes

    def _patience_s(self, began: float, num_bytes: int) -> float:
        """Returns the timeout for the next chunk of a body, in seconds."""
        grace = self.settings.body_grace_s
        end = began + grace + num_bytes / SLOWEST_BODY_BYTES_PER_S
        return min(grace, max(0.0, end - time.monotonic()))

    async def _pass_on(self, scope: Any, receive: Receive, send: Send) -> None:
        limit, read, is_over, has_begun = self._limit(scope), 0, False, False
        is_whole, began = False, time.monotonic()
        is_unread = bool({"content-length", "transfer-encoding"} & set(_headers(scope)))

        async def counted() -> Message:
            """Receives the next message; ends a body that is too slow or too large."""
            nonlocal read, is_over, is_unread, is_whole
            if is_over:
                return {"type": "http.disconnect"}
            if is_whole:  # only a disconnect can follow, without a timeout
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._patience_s(began, read))
            except asyncio.TimeoutError:
                is_over = True
                if not has_begun:
                    await refuse(send, 408, "the request's body came too slowly; send it again")
                return {"type": "http.disconnect"}
            is_whole = not message.get("more_body")
            read += len(message.get("body", b""))
            if read <= limit:
                is_unread = is_unread and bool(message.get("more_body"))
                return message
            is_over = True
            if not has_begun:
                await refuse(send, 413, _too_large(limit))
            return {"type": "http.disconnect"}

        async def watched(message: Message) -> None:
            """Sends a message with security headers; drops it if an error was sent already."""
            nonlocal has_begun
            if is_over and not has_begun:
                return  # the error response has been sent already
            if message["type"] == "http.response.start":
                has_begun = True
                present = {name.lower() for name, _ in message.get("headers", ())}
                extra = [
                    (name.encode(), value.encode())
                    for name, value in SECURITY_HEADERS.items()
                    if name.encode() not in present
                ]
                if is_unread:  # otherwise the server would read the whole body
                    extra.append((b"connection", b"close"))
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        try:
            await self.app(scope, counted, watched)
        except Exception:
            if not is_over:
                raise  # if it is over, the error is only about the truncated body


def _headers(scope: Any) -> Mapping[str, str]:
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        # Conflicting duplicates of a header invalidate it.
        text = value.decode("latin-1")
        headers[key] = text if headers.get(key, text) == text else f"{headers[key]}, {text}"
    return headers


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()


def _too_large(limit: int) -> str:
    return f"the request is larger than {limit / (1 << 20):g} MiB; send a smaller image or region"


async def refuse(
    send: Send, status: int, message: str, headers: Mapping[str, str] | None = None
) -> None:
    """Sends an error in OpenAI's format."""
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    content = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    body = json.dumps(content).encode()
    fields = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",  # the rest of the request is not read
        **SECURITY_HEADERS,
        **(headers or {}),
    }
    raw = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
