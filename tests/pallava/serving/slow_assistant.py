"""A slow model, so that other requests arrive while it answers."""

from __future__ import annotations

import time
from typing import Any

from pallava.inference.assistant import Assistant


class SlowAssistant(Assistant):
    """Waits a while at every token."""

    brake_s = 0.05

    def decode(self, ids: Any) -> str:
        time.sleep(self.brake_s)
        return super().decode(ids)

    @classmethod
    def like(cls, other: Assistant, brake_s: float = 0.05) -> SlowAssistant:
        slow = cls(other.model, other.tokenizer, other.anyres)
        slow.brake_s = brake_s
        return slow
