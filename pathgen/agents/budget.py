"""What asking may cost: prices, ceilings, and the most that one request can come to."""

from __future__ import annotations

from dataclasses import dataclass

_TEMPLATE_TOKENS = 100
"""Room for what chat templates put around the messages."""


@dataclass(frozen=True)
class Budget:
    """Prices and ceilings. Ceilings count what earlier runs with the same cache spent.

    Attributes:
        price_in: US dollars for a million tokens of prompt.
        price_out: US dollars for a million tokens of reply.
        max_cost: In US dollars; no request is sent that could exceed it.
        max_tokens: Of prompts and replies together; likewise.
        image_tokens: The most that one image can count as prompt.

    Raises:
        ValueError: A ceiling on money without prices, or negative numbers.
    """

    price_in: float = 0.0
    price_out: float = 0.0
    max_cost: float | None = None
    max_tokens: int | None = None
    image_tokens: int = 3000

    def __post_init__(self) -> None:
        if min(self.price_in, self.price_out, self.image_tokens) < 0:
            raise ValueError("budget: prices and image tokens of at least 0 expected")
        if self.max_cost is not None and self.price_in + self.price_out <= 0:
            raise ValueError("budget: a ceiling on the cost needs --price-in and --price-out")

    def cost(self, prompt_tokens: int, reply_tokens: int) -> float:
        """US dollars for one request."""
        return (prompt_tokens * self.price_in + reply_tokens * self.price_out) / 1e6

    def highest(self, *, text_bytes: int, has_image: bool, max_reply_tokens: int) -> Spent:
        """The most that one request can come to: a token is at least one byte."""
        prompt = text_bytes + _TEMPLATE_TOKENS + (self.image_tokens if has_image else 0)
        return Spent(self.cost(prompt, max_reply_tokens), prompt + max_reply_tokens)

    def allows(self, spent: Spent) -> bool:
        """Whether so much may be spent."""
        within_cost = self.max_cost is None or spent.cost <= self.max_cost
        return within_cost and (self.max_tokens is None or spent.tokens <= self.max_tokens)


@dataclass(frozen=True)
class Spent:
    """Money and tokens.

    Attributes:
        cost: US dollars.
        tokens: Of prompts and replies together.
    """

    cost: float = 0.0
    tokens: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.cost + other.cost, self.tokens + other.tokens)

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.cost - other.cost, self.tokens - other.tokens)
