"""Keeps requests to the page away from the disk and the network.

Gradio serves many routes that the page does not need, and accepts file paths and URLs in its
messages. This middleware allows only the routes of the page, and messages may name only files that
were uploaded to this server.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pallava.serving.guard import Application, Message, Receive, Send, refuse

_PREFIX = "/gradio_api"
_READABLE = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(assets|static|svelte)/.*"
    rf"|{_PREFIX}/(queue/data|startup-events|heartbeat/[\w-]+|upload_progress|theme\.css|file=.*)"
)
_WRITABLE = re.compile(rf"{_PREFIX}/(queue/join|run/predict|upload|cancel|reset)/?")
_UPLOAD = f"{_PREFIX}/upload"


class FileGuard:
    """ASGI middleware around Gradio's application.

    Args:
        app: Application to protect.
        folder: Upload folder; files outside it cannot be named.
        max_folder_bytes: Size of the folder from which further uploads are rejected.
    """

    def __init__(self, app: Application, folder: Path, max_folder_bytes: int) -> None:
        self.app = app
        self.folder = Path(os.path.realpath(folder))
        self.max_folder_bytes = max_folder_bytes

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, method = scope["path"], scope["method"]
        reading = method in ("GET", "HEAD")
        if not (_READABLE if reading else _WRITABLE).fullmatch(path):
            await refuse(send, 404, f"{path!r:.80}: not found")
        elif f"{_PREFIX}/file=" in path and not self._is_ours(path.partition("file=")[2]):
            await refuse(send, 403, "only files of this page are served")
        elif path.rstrip("/") == _UPLOAD and folder_bytes(self.folder) > self.max_folder_bytes:
            await refuse(send, 507, "too many uploads at the moment; try again later")
        elif reading or path.rstrip("/") == _UPLOAD:
            await self.app(scope, receive, send)
        else:
            await self._check_message(scope, receive, send)

    async def _check_message(self, scope: Any, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        try:
            content = _map_files(json.loads(body), self._clean)
        except (ValueError, RecursionError) as error:
            await refuse(send, 400, f"refused: {error}")
            return
        body = json.dumps(content).encode()
        headers = [pair for pair in scope["headers"] if pair[0].lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app({**scope, "headers": headers}, replay, send)

    def _clean(self, file: dict[str, Any]) -> dict[str, Any]:
        path = file.get("path")
        if path is not None and not (isinstance(path, str) and self._is_ours(path)):
            raise ValueError("a message may only name files that were uploaded to this server")
        # Gradio would fetch the URL, or write a data URL to disk.
        return {**file, "url": None} if "url" in file else file

    def _is_ours(self, path: str) -> bool:
        if "\0" in path or not os.path.isabs(unquote(path)):
            return False
        return all(
            Path(os.path.realpath(name)).is_relative_to(self.folder)
            for name in (path, unquote(path))
        )


def folder_bytes(folder: Path) -> int:
    """Returns the total size of the files in a folder; files that vanish meanwhile count 0."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _map_files(value: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Applies a function to every object that names a file, at any depth."""
    if isinstance(value, list):
        return [_map_files(item, change) for item in value]
    if isinstance(value, dict):
        inner = {name: _map_files(item, change) for name, item in value.items()}
        return change(inner) if {"path", "url"} & set(inner) else inner
    return value
