"""Limits on connections that send no request: a timeout, and a maximum number.

uvicorn limits how long a connection is kept alive after a response, but not how long it may take to
send a request, and counts idle connections towards `limit_concurrency`. A few hundred idle
connections, which need no key, would therefore lock out all other clients.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEADER_S = 10.0
"""Timeout for the headers of a request, in seconds."""

MAX_WAITING = 128
"""Maximum number of connections without a complete request: half of the server's total limit."""


def timed_protocol(
    header_s: float = HEADER_S, max_waiting: int = MAX_WAITING
) -> type[asyncio.Protocol]:
    """Returns uvicorn's HTTP protocol with limits on connections that wait for a request.

    Args:
        header_s: Timeout for the headers of a request in seconds, counted from its first byte, or
            from the connection for the first request.
        max_waiting: Maximum number of connections without a complete request; beyond it, the oldest
            are closed.
    """
    waiting: OrderedDict[Any, asyncio.TimerHandle] = OrderedDict()

    class TimedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        """Closes its connection if headers do not arrive in time."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._is_between_requests():
                self._wait()
            else:
                self._stop_waiting()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _is_between_requests(self) -> bool:
            return self.cycle is None or bool(self.cycle.response_complete)

        def _wait(self) -> None:
            if self in waiting:  # single bytes do not extend the timeout
                return
            waiting[self] = asyncio.get_running_loop().call_later(header_s, self._give_up)
            while len(waiting) > max_waiting:
                next(iter(waiting))._give_up()

        def _stop_waiting(self) -> None:
            if timer := waiting.pop(self, None):
                timer.cancel()

        def _give_up(self) -> None:
            self._stop_waiting()
            if not self.transport.is_closing():
                self.transport.close()

    return TimedProtocol
