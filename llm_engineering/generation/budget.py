"""What a run may spend, counted from the usage that responses report."""

from __future__ import annotations

from llm_engineering.config import ClientConfig
from llm_engineering.generation.store import Reply


class Budget:
    """Counts tokens and money against the caps of the recipe."""

    def __init__(self, config: ClientConfig) -> None:
        self.max_tokens = config.max_total_tokens
        self.max_usd = config.max_cost_usd
        self.prices = config.prices
        self.input_tokens = 0
        self.output_tokens = 0

    @property
    def tokens(self) -> int:
        """Tokens in and out."""
        return self.input_tokens + self.output_tokens

    @property
    def usd(self) -> float | None:
        """What they cost, if the recipe has prices."""
        if self.prices is None:
            return None
        return (
            self.input_tokens * self.prices.input_per_million + self.output_tokens * self.prices.output_per_million
        ) / 1e6

    @property
    def is_capped(self) -> bool:
        """Whether the recipe has a cap."""
        return self.max_tokens is not None or self.max_usd is not None

    def spend(self, reply: Reply) -> None:
        """Count a reply, new or stored."""
        self.input_tokens += reply.input_tokens
        self.output_tokens += reply.output_tokens

    def reached(self) -> str:
        """The cap that is reached, as `key value`, or an empty string."""
        if self.max_tokens is not None and self.tokens >= self.max_tokens:
            return f"generation.max_total_tokens {self.max_tokens}"
        if self.max_usd is not None and self.usd is not None and self.usd >= self.max_usd:
            return f"generation.max_cost_usd {self.max_usd}"
        return ""

    def __str__(self) -> str:
        cost = "" if self.usd is None else f", ${self.usd:.2f}" if self.usd >= 1 else f", ${self.usd:.4f}"
        return f"{self.tokens:,} tokens{cost}"
