"""Prices, limits on cost and tokens, and the maximum cost of a request."""

from __future__ import annotations

from dataclasses import dataclass

_TEMPLATE_TOKENS = 100
"""Generous estimate of the tokens that a chat template adds to the messages."""


@dataclass(frozen=True)
class Budget:
    """Prices and limits. The limits include what earlier runs with the same cache spent.

    Attributes:
        price_in: US dollars per million prompt tokens.
        price_out: US dollars per million reply tokens.
        max_cost: Limit in US dollars; a request that could exceed it is not sent.
        max_tokens: Limit on prompt and reply tokens together, likewise.
        image_tokens: Maximum number of prompt tokens per image.

    Raises:
        ValueError: If the cost is limited but no price is given, or a number is negative.
    """

    price_in: float = 0.0
    price_out: float = 0.0
    max_cost: float | None = None
    max_tokens: int | None = None
    image_tokens: int = 3000

    def __post_init__(self) -> None:
        if min(self.price_in, self.price_out, self.image_tokens) < 0:
            raise ValueError("budget: expected prices and image tokens of at least 0")
        if self.max_cost is not None and self.price_in + self.price_out <= 0:
            raise ValueError("max_cost: a limit on the cost requires price_in and price_out")

    def cost(self, prompt_tokens: int, reply_tokens: int) -> float:
        """Returns the cost of one request in US dollars."""
        return (prompt_tokens * self.price_in + reply_tokens * self.price_out) / 1e6

    def highest(self, *, text_bytes: int, has_image: bool, max_reply_tokens: int) -> Spent:
        """Returns an upper bound for one request: a token has at least one byte."""
        prompt = text_bytes + _TEMPLATE_TOKENS + (self.image_tokens if has_image else 0)
        return Spent(self.cost(prompt, max_reply_tokens), prompt + max_reply_tokens)

    def allows(self, spent: Spent) -> bool:
        """Returns whether `spent` is within the limits."""
        within_cost = self.max_cost is None or spent.cost <= self.max_cost
        return within_cost and (self.max_tokens is None or spent.tokens <= self.max_tokens)


@dataclass(frozen=True)
class Spent:
    """Cost and tokens of requests.

    Attributes:
        cost: US dollars.
        tokens: Prompt and reply tokens together.
    """

    cost: float = 0.0
    tokens: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.cost + other.cost, self.tokens + other.tokens)

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.cost - other.cost, self.tokens - other.tokens)
