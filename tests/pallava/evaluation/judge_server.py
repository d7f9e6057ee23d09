"""A judge behind a local HTTP server, which behaves as each candidate text says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests import fake_server


class JudgeServer(fake_server.FakeServer):
    """Takes the first word of the candidate as the mood; see `fake_server.chat_reply`.

    `words`, `range`, `twice`: replies without a usable number; `lie once`: no number at first, then
    one. Otherwise `score N` is replied as N.
    """

    def key_of(self, body: dict[str, Any]) -> str:
        text = body["messages"][0]["content"]
        return str(json.loads(text[text.index("{") : text.index("}") + 1])["candidate"])

    def reply(self, key: str, number: int) -> tuple[int, Any]:
        return fake_server.chat_reply(key.split()[0], number, lambda: _content(key, number))


def _content(candidate: str, number: int) -> str:
    if candidate == "words" or (candidate == "lie once" and number == 1):
        return "They are rather similar."
    if candidate == "range":
        return '{"score": 11}'
    if candidate == "twice":
        return '{"score": 2} or {"score": 9}'
    value = candidate.split()[-1] if candidate.startswith("score") else "5"
    return f"{{'score': {value}}} since both name it."


@contextmanager
def running_server() -> Iterator[JudgeServer]:
    with fake_server.running(JudgeServer()) as server:
        yield server
