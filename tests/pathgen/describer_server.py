"""A describer behind a local HTTP server, which behaves as a word in brackets says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests import fake_server

WORDS = (
    "Sheets of atypical epithelial cells with vesicular nuclei and prominent nucleoli lie in a "
    "fibrous stroma with scattered lymphocytes, a few mitoses and small foci of necrosis."
)


class DescriberServer(fake_server.FakeServer):
    """Takes the word in brackets, such as `[stall]`, as the mood; see `fake_server.chat_reply`.

    `short`, `refusal`, `leak`, `control`, `surrogate`, `empty`: replies that cannot be used;
    `once`: the first reply is a refusal. Otherwise `write(user text)` is the reply.
    """

    def __init__(self) -> None:
        super().__init__()
        self.write: Callable[[str], str] = lambda text: f"{WORDS} {_number(text)}"

    def key_of(self, body: dict[str, Any]) -> str:
        return user_text(body)

    def reply(self, key: str, number: int) -> tuple[int, Any]:
        found = re.search(r"\[(\w+)\]", key)
        mood = found[1] if found else ""

        def content() -> str:
            if mood == "refusal" or (mood == "once" and number == 1):
                return f"I'm sorry, but I cannot describe this. {WORDS}"
            return {
                "short": "Tissue.",
                "leak": f"Based on the additional description, {WORDS}",
                "control": f"{WORDS}\x00",
                "surrogate": f"{WORDS}\ud800",
                "empty": " ",
            }.get(mood) or self.write(key)

        return fake_server.chat_reply(mood, number, content)


def user_text(body: dict[str, Any]) -> str:
    """The first user message's text."""
    content = next(m["content"] for m in body["messages"] if m["role"] == "user")
    if isinstance(content, str):
        return content
    return next(part["text"] for part in content if part["type"] == "text")


def _number(text: str) -> str:
    found = re.findall(r"case (\d+)", text)
    return f"Field {found[-1]}." if found else "No number."


@contextmanager
def running_server() -> Iterator[DescriberServer]:
    with fake_server.running(DescriberServer()) as server:
        yield server
