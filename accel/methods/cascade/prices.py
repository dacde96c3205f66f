"""What an attempt costs: by the token, or by the second of the machine it ran on. Knows no requests."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from accel.errors import OptionError

MILLION = 1_000_000


@dataclass(frozen=True)
class Usage:
    """Tokens of one attempt. ``input_tokens`` includes ``cached_tokens``, as OpenAI's ``usage`` counts them."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is not int or value < 0:
                raise OptionError(f"{name}={value!r}: must be a whole number ≥ 0")
        if self.cached_tokens > self.input_tokens:
            raise OptionError(
                f"cached_tokens={self.cached_tokens} of input_tokens={self.input_tokens}: the input includes what was "
                "cached, so it cannot be less"
            )

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
        )


class Price(Protocol):
    """Dollars for an attempt; None where what it depends on is unknown."""

    def dollars(self, usage: Usage | None, seconds: float) -> float | None: ...

    def as_dict(self) -> dict[str, float]: ...


def _check_dollars(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise OptionError(f"{name}={value!r}: a price is a number of dollars ≥ 0")


@dataclass(frozen=True)
class TokenPrice:
    """$ per million tokens: input read anew, input from the provider's cache (None: like other input), output."""

    input: float
    output: float
    cached_input: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None or name != "cached_input":
                _check_dollars(name, value)

    def dollars(self, usage: Usage | None, seconds: float = 0.0) -> float | None:
        if usage is None:
            return None
        cached = self.input if self.cached_input is None else self.cached_input
        fresh = usage.input_tokens - usage.cached_tokens
        # multiplied before it is divided: whole cents stay whole
        return (fresh * self.input + usage.cached_tokens * cached + usage.output_tokens * self.output) / MILLION

    def as_dict(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class HourPrice:
    """$ per hour of the accelerators (or the machine) that a local model occupies while it answers."""

    per_hour: float

    def __post_init__(self) -> None:
        _check_dollars("per_hour", self.per_hour)

    def dollars(self, usage: Usage | None, seconds: float) -> float | None:
        return self.per_hour * seconds / 3600

    def as_dict(self) -> dict[str, float]:
        return {"per_hour": self.per_hour}


FREE = HourPrice(0.0)

# List prices of October 2025, without discounts for batches. Prices change: a user's own file goes first.
LISTED: Mapping[str, Price] = {
    "gpt-4.1": TokenPrice(2.00, 8.00, 0.50),
    "gpt-4.1-mini": TokenPrice(0.40, 1.60, 0.10),
    "gpt-4.1-nano": TokenPrice(0.10, 0.40, 0.025),
    "gpt-4o": TokenPrice(2.50, 10.00, 1.25),
    "gpt-4o-mini": TokenPrice(0.15, 0.60, 0.075),
    "claude-sonnet-4-5": TokenPrice(3.00, 15.00, 0.30),
}

_SHAPES: Mapping[frozenset[str], type] = {
    frozenset({"input", "output"}): TokenPrice,
    frozenset({"input", "output", "cached_input"}): TokenPrice,
    frozenset({"per_hour"}): HourPrice,
}
_WANTED = '{"input": $, "output": $, "cached_input": $ (optional)} per million tokens, or {"per_hour": $}'


class PriceTable:
    """Prices by a model's name: those given, in front of the listed ones."""

    def __init__(self, own: Mapping[str, Price] | None = None) -> None:
        self._prices: dict[str, Price] = {**LISTED, **(own or {})}

    @classmethod
    def read(cls, path: str | Path) -> PriceTable:
        """A JSON file: ``{"a-model": {"input": 0.4, "output": 1.6, "cached_input": 0.1}, "mine": {"per_hour": 2}}``."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OptionError(f"the price file {path} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(raw, dict):
            raise OptionError(f"the price file {path} must be a JSON object of models, each with {_WANTED}")
        return cls({model: parse_price(entry, f"{path}: {model}") for model, entry in raw.items()})

    def __contains__(self, model: str) -> bool:
        return model in self._prices

    def of(self, model: str) -> Price:
        """The price of a model; what is not in the table is refused, because a guess would pass for a measurement."""
        found = self._prices.get(model)
        if found is None:
            raise OptionError(
                f"no price for {model!r}: known are {', '.join(sorted(self._prices))}; give one, or a price file"
            )
        return found


def parse_price(raw: Any, where: str) -> Price:
    """A price from its JSON; ``where`` opens the message when it is none."""
    shape = _SHAPES.get(frozenset(raw)) if isinstance(raw, dict) else None
    if shape is None:
        raise OptionError(f"{where}: a price is {_WANTED}, got {str(raw)[:80]}")
    try:
        price: Price = shape(**raw)
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from error
    return price
