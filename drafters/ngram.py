"""Guess by prompt lookup: copy what followed the last earlier occurrence of the row's last n tokens.

The method of Saxena (2023) that transformers and vLLM have too, with an index instead of a scan. Knows tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from accel.drafters.base import Ask, Draft
from accel.drafters.rows import Rows
from accel.errors import OptionError

# For state_bytes: a dict slot, a tuple header and a boxed number; then one pointer a token of the tuple
BYTES_PER_NGRAM = 100 + 56 + 32
BYTES_PER_POINTER = 8


@dataclass
class _Row:
    tokens: list[int] = field(default_factory=list)
    # n-gram → how many tokens of text there were up to the end of its last occurrence that something followed
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)


class NgramDrafter:
    """Tries n-grams of ``max_ngram`` down to ``min_ngram`` tokens and proposes what followed the first one found."""

    free = True

    def __init__(self, max_ngram: int = 3, min_ngram: int = 1, name: str = "ngram") -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise OptionError(
                f"min_ngram={min_ngram}, max_ngram={max_ngram}: 1 ≤ min_ngram ≤ max_ngram is needed; 1 and 3 are usual"
            )
        self.name = name
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram
        self._rows: Rows[_Row] = Rows(name)

    def open(self, row: int, prompt: Sequence[int], seed: int) -> None:
        """Start a row; ``seed`` is not needed, for nothing here is drawn at random."""
        self._rows.open(row, _Row())
        self.observe(row, prompt)

    def observe(self, row: int, tokens: Sequence[int]) -> None:
        state = self._rows[row]
        text, ends = state.tokens, state.ends
        for token in tokens:
            size = len(text)
            # Indexed only now that a token follows: a lookup of the text's end then never finds itself
            for n in range(self.min_ngram, min(self.max_ngram, size) + 1):
                ends[tuple(text[size - n :])] = size
            text.append(token)

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        return [self._propose(self._rows[ask.row], ask.max_tokens) for ask in asks]

    def close(self, row: int) -> None:
        self._rows.close(row)

    def state_bytes(self) -> int:
        """Memory held, estimated from the number of n-grams."""
        per_ngram = BYTES_PER_NGRAM + BYTES_PER_POINTER * self.max_ngram
        return sum(len(row.ends) * per_ngram + len(row.tokens) * BYTES_PER_POINTER for row in self._rows.states())

    def _propose(self, row: _Row, max_tokens: int) -> Draft:
        size = len(row.tokens)
        for n in range(min(self.max_ngram, size), self.min_ngram - 1, -1):
            end = row.ends.get(tuple(row.tokens[size - n :]))
            if end is not None:
                # Past the end of the text the copy goes on with itself: a loop of p tokens is guessed for any length
                period = size - end
                tokens = [row.tokens[end + i % period] for i in range(max_tokens)]
                # One witness for a context that grows with each right guess; the prior of suffix.belief
                confidence = [(n + i) / (n + i + 2.0) for i in range(max_tokens)]
                return Draft(tokens, confidence=confidence, source=self.name)
        return Draft(source=self.name)
