"""How answers are decoded in an evaluation; greedy unless a published protocol differs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Decoding:
    """Decoding of an evaluation.

    Attributes:
        temperature: Sampling temperature; 0 takes the most likely token.
        top_p: Nucleus sampling: tokens are drawn from the smallest set with this total probability.
        num_beams: Number of beams.
        seed: Seed of the sampling. Each batch starts from it, so that a resumed run gives the same
            answers.

    Raises:
        ValueError: If a value is out of range, or `top_p` is given without a temperature.

    Example:
        >>> Decoding.parse("temperature=0.9,num_beams=5")
        Decoding(temperature=0.9, top_p=1.0, num_beams=5, seed=0)
    """

    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature: expected 0 to 2, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected above 0, at most 1, found {self.top_p}")
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError(f"top_p: {self.top_p} has no effect without a temperature above 0")
        if self.num_beams < 1:
            raise ValueError(f"num_beams: expected at least 1, found {self.num_beams}")

    @classmethod
    def parse(cls, text: str) -> Decoding:
        """Reads `greedy`, or settings such as `temperature=0.9,num_beams=5`.

        Raises:
            ValueError: If a name is unknown or a value is not a number.
        """
        if text == "greedy":
            return cls()
        kinds: dict[str, Any] = {field.name: type(field.default) for field in fields(cls)}
        values: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = (word.strip() for word in part.partition("="))
            if name not in kinds:
                raise ValueError(
                    f"decoding {text!r}: expected greedy, or NAME=VALUE of {', '.join(kinds)}"
                )
            try:
                values[name] = kinds[name](value)
            except ValueError as error:
                raise ValueError(f"decoding, {name}: expected a number, found {value!r}") from error
        return cls(**values)

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the most likely one."""
        return self.temperature == 0 and self.num_beams == 1

    @property
    def settings(self) -> dict[str, Any]:
        """The values as part of a model's settings; empty for greedy decoding."""
        return {} if self.is_greedy else {"decoding": dict(vars(self))}

    def generation_kwargs(self) -> dict[str, Any]:
        """Returns the keyword arguments of `generate` of transformers."""
        if self.temperature == 0:
            return {"do_sample": False, "num_beams": self.num_beams}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,  # disables the top-k of 50 that transformers applies by default
            "num_beams": self.num_beams,
        }
