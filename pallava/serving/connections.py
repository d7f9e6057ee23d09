"""Connections that send nothing: closed after a while, and never so many that others are refused.

uvicorn limits how long a connection is kept after an answer, but not how long it may take over a
request, and it counts idle connections towards `limit_concurrency`: a few hundred of them, which
need no key, would shut everybody out.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEADER_S = 10.0
"""How long the headers of a request may take."""

MAX_WAITING = 128
"""Connections without a complete request; half of what the server takes in all."""


def timed_protocol(
    header_s: float = HEADER_S, max_waiting: int = MAX_WAITING
) -> type[asyncio.Protocol]:
    """Returns uvicorn's HTTP protocol with limits on connections that wait for a request.

    Args:
        header_s: A connection is closed if the headers of its next request take longer than this,
            counted from its first byte, or from the connection for the first request.
        max_waiting: Of more connections without a complete request, the oldest are closed.
    """
    waiting: OrderedDict[Any, asyncio.TimerHandle] = OrderedDict()

    class TimedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        """Closes its connection when headers do not come."""

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
            if self in waiting:  # a byte now and then does not extend the time
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
