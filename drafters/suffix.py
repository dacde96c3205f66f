"""Guess by copying what followed the longest earlier occurrence of the row's last tokens, found by suffix automaton.

The row's own prompt and output come first; an optional corpus shared by all rows is asked where it matches longer.
Knows tokens only: no model, no tokenizer, no special tokens. The idea is that of SAM-Decoding (Hu et al. 2024) and
SuffixDecoding (Oliaro et al. 2024); README.md says what is different here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from accel.drafters.automaton import ROOT, SuffixAutomaton
from accel.drafters.base import Ask, Draft
from accel.drafters.rows import Rows
from accel.errors import OptionError

# Separates the corpus' sequences in its automaton: no token of a row is negative
SEPARATOR = -1


def belief(agreeing: int, seen: int, matched: int) -> float:
    """How likely the next token is, when ``agreeing`` of ``seen`` occurrences of a ``matched``-token context had it.

    A Beta posterior mean whose prior says "none of these" with weight 2/m: a longer context needs fewer witnesses.
    One witness gives m / (m + 2).
    """
    return agreeing / (seen + 2.0 / matched)


@dataclass
class _Row:
    text: SuffixAutomaton
    # the longest suffix of the row's text that occurs in the corpus: its state there and its length
    corpus_state: int = ROOT
    corpus_matched: int = 0


class SuffixDrafter:
    """Proposes the majority continuation of the longest repeated suffix, token by token.

    ``max_spec_factor``: a match of m tokens yields at most max(1, factor·m) tokens. ``min_match``: shorter matches
    propose nothing. ``min_probability``: the draft ends where the product of its confidences would fall below this.
    ``corpus``: token sequences such as earlier outputs, indexed once (about 0.5 kB a token).
    """

    free = True

    def __init__(
        self,
        max_spec_factor: float = 4.0,
        min_match: int = 1,
        min_probability: float = 0.1,
        corpus: Sequence[Sequence[int]] = (),
        name: str = "suffix",
    ) -> None:
        if not max_spec_factor > 0:
            raise OptionError(f"max_spec_factor={max_spec_factor}: must be above 0; 4.0 is the default")
        if min_match < 1:
            raise OptionError(f"min_match={min_match}: must be ≥ 1, the tokens that have to match before a guess")
        if not 0 <= min_probability <= 1:
            raise OptionError(f"min_probability={min_probability}: must be in [0, 1]; 0 never ends a draft early")
        self.name = name
        self.max_spec_factor = max_spec_factor
        self.min_match = min_match
        self.min_probability = min_probability
        self._corpus = SuffixAutomaton()
        for number, sequence in enumerate(corpus):
            for token in sequence:
                if token < 0:
                    raise OptionError(f"corpus sequence {number} holds the token {token}: token ids are ≥ 0")
                self._corpus.append(token)
            # Each separator is new: equal ones would nest copies of a sequence deeper than counts are kept
            self._corpus.append(SEPARATOR - number)
        self._rows: Rows[_Row] = Rows(name)

    def open(self, row: int, prompt: Sequence[int], seed: int) -> None:
        """Start a row; ``seed`` is not needed, for nothing here is drawn at random."""
        self._rows.open(row, _Row(SuffixAutomaton()))
        self.observe(row, prompt)

    def observe(self, row: int, tokens: Sequence[int]) -> None:
        state = self._rows[row]
        for token in tokens:
            state.text.append(token)
            if self._corpus.tokens:
                state.corpus_state, state.corpus_matched = self._corpus.advance(
                    state.corpus_state, state.corpus_matched, token
                )

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        return [self._propose(self._rows[ask.row], ask.max_tokens) for ask in asks]

    def close(self, row: int) -> None:
        self._rows.close(row)

    def state_bytes(self) -> int:
        """Memory held, estimated; the corpus included."""
        return self._corpus.state_bytes() + sum(row.text.state_bytes() for row in self._rows.states())

    def _propose(self, row: _Row, max_tokens: int) -> Draft:
        state = row.text.repeated_suffix()
        matched = row.text.length[state]
        state_there, matched_there = self._corpus_match(row)
        if matched_there > matched:
            return self._follow(self._corpus, state_there, matched_there, max_tokens, at_end=ROOT)
        # A repeated suffix always has a follower, but following it may lead to the end of the text: there the text
        # repeats itself, and goes on as it did after the match.
        return self._follow(row.text, state, matched, max_tokens, at_end=state)

    def _corpus_match(self, row: _Row) -> tuple[int, int]:
        """The longest match in the corpus that something follows: shorter suffixes where a sequence ended there."""
        state, matched = row.corpus_state, row.corpus_matched
        while state != ROOT and self._corpus.follower(state) is None:
            state = self._corpus.link[state]
            matched = self._corpus.length[state]
        return state, matched

    def _follow(self, text: SuffixAutomaton, state: int, matched: int, max_tokens: int, at_end: int) -> Draft:
        """Walk from ``state`` along the majority; ``at_end`` is where to go on from the end of the text."""
        if matched < self.min_match:
            return Draft(source=self.name)
        tokens: list[int] = []
        confidence: list[float] = []
        limit = int(min(max_tokens, max(1.0, self.max_spec_factor * matched)))
        together = 1.0
        while len(tokens) < limit:
            follower = text.follower(state)
            if follower is None:
                if at_end == ROOT:
                    break
                state = at_end
                continue
            probability = belief(follower.agreeing, follower.seen, matched + len(tokens))
            together *= probability
            if together < self.min_probability:
                break
            tokens.append(follower.token)
            confidence.append(probability)
            state = follower.state
        return Draft(tokens, confidence=confidence, source=self.name)
