"""A small causal language model as the drafter, with the target's tokenizer and maybe only part of its vocabulary.

Rows live in the draft model's own reader (``accel.models.lean``). Final tokens are committed there; drafted ones stay
tentative until ``observe`` tells which of them came true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from accel.drafters.base import Ask, Draft
from accel.drafters.growing import Growing
from accel.errors import AccelError, IncompatibleError
from accel.models.lean import draft_reader
from accel.models.row_cache import Segment


@dataclass(frozen=True)
class VocabularyMap:
    """A draft vocabulary that is part of the target's.

    ``d2t``: int64 ``[draft vocabulary]``, the target id of each draft id (absolute ids, not offsets). ``unknown`` is
    the draft id that stands for target tokens the draft has no id for when they are read.
    """

    d2t: Tensor
    unknown: int
    target_vocab_size: int

    def __post_init__(self) -> None:
        if self.d2t.ndim != 1 or self.d2t.unique().numel() != self.d2t.numel():
            raise IncompatibleError("d2t must list each target id at most once, one entry a draft id")
        if int(self.d2t.min()) < 0 or int(self.d2t.max()) >= self.target_vocab_size:
            raise IncompatibleError(
                f"d2t names target ids up to {int(self.d2t.max())}, but the target's vocabulary has "
                f"{self.target_vocab_size}"
            )
        if not 0 <= self.unknown < len(self.d2t):
            raise IncompatibleError(f"unknown={self.unknown} is no draft id: the draft vocabulary has {len(self.d2t)}")

    def t2d(self) -> Tensor:
        """int64 ``[target vocabulary]``: the draft id of each target id, ``unknown`` where there is none."""
        table = torch.full((self.target_vocab_size,), self.unknown, dtype=torch.long)
        table[self.d2t] = torch.arange(len(self.d2t))
        return table


@dataclass
class _Row:
    name: int
    generator: torch.Generator
    # final tokens (target ids) the draft model has not read yet
    unread: list[int]
    # drafted tokens (target ids) that the draft model has read tentatively
    tentative: list[int] = field(default_factory=list)


class SmallLMDrafter:
    """Drafts with a causal language model, many rows at once, stopping each row as early as its ``keep_going`` says."""

    name = "lm"
    free = False

    def __init__(self, model: PreTrainedModel, target_vocab_size: int, vocabulary: VocabularyMap | None = None) -> None:
        self.reader = draft_reader(model)
        self.model = model
        self._vocab_size = target_vocab_size
        self.vocabulary = vocabulary
        expected = target_vocab_size if vocabulary is None else len(vocabulary.d2t)
        if self.reader.vocab_size != expected:
            raise IncompatibleError(
                f"the draft model has a vocabulary of {self.reader.vocab_size} and the target of {target_vocab_size}: "
                "use a draft with the target's tokenizer, a draft artifact with a vocabulary map, or pass tokenizers "
                "(tokenizer=, assistant_tokenizer=) to translate between the two"
            )
        self._d2t = None if vocabulary is None else vocabulary.d2t.to(self.reader.device)
        # on the host, as the tokens are: one at a time is asked for, and a tensor takes its time to answer
        self._target_ids = None if vocabulary is None else vocabulary.d2t.tolist()
        self._draft_ids = None if vocabulary is None else vocabulary.t2d().tolist()
        self._rows: dict[int, _Row] = {}

    def open(self, row: int, prompt: Sequence[int], seed: int) -> None:
        self.open_behind((), row, prompt, seed)

    def open_behind(self, segments: Sequence[Segment], row: int, prompt: Sequence[int], seed: int) -> None:
        """``segments``: context of the draft model's own, in front of the prompt."""
        if row in self._rows:
            raise AccelError(f"row {row} is open already: close it first")
        # the draft's randomness must be its own: the row's generator decides what is accepted
        generator = torch.Generator().manual_seed((seed ^ 0x5EED_D12A) & 0x7FFF_FFFF_FFFF_FFFF)
        self._rows[row] = _Row(self.reader.open(segments), generator, list(prompt))

    def close(self, row: int) -> None:
        state = self._rows.pop(row, None)
        if state is not None:
            self.reader.close([state.name])

    def observe(self, row: int, tokens: Sequence[int]) -> None:
        """Keep what came true of the tentative tokens; the rest of ``tokens`` is still to be read.

        The last one always is: drafting starts from the logits behind it.
        """
        state = self._rows[row]
        kept = 0
        while kept < min(len(tokens) - 1, len(state.tentative)) and tokens[kept] == state.tentative[kept]:
            kept += 1
        if state.tentative:
            self.reader.commit([kept], [state.name])
        state.tentative = []
        state.unread += tokens[kept:]

    def state_bytes(self) -> int:
        return self.reader.state_bytes()

    @torch.no_grad()
    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        """One draft per ask, in order; rows whose context is full, or who have nothing to read, draft nothing."""
        drafts = {ask.row: Growing(ask, self._rows[ask.row]) for ask in asks}
        active = [d for d in drafts.values() if d.row.unread and self._room(d) > 0]
        logits = self._read(active)
        while active:
            for draft, row_logits in zip(active, logits, strict=True):
                self._extend(draft, row_logits)
            active = [d for d in active if len(d.tokens) < self._room(d) and d.wants_more()]
            if active:
                logits = self._forward([[d.tokens[-1]] for d in active], active)
                for draft in active:
                    draft.row.tentative.append(draft.tokens[-1])
        return [drafts[ask.row].finish(self.name) for ask in asks]

    def _room(self, draft: Growing[_Row]) -> int:
        if self.reader.max_positions is None:
            return draft.ask.max_tokens
        used = self.reader.num_positions(draft.row.name) + len(draft.row.unread)
        return min(draft.ask.max_tokens, self.reader.max_positions - used)

    def _read(self, drafts: Sequence[Growing[_Row]]) -> Sequence[Tensor]:
        """Let the draft model read the rows' unread final tokens; logits ``[V]`` after the last of each."""
        if not drafts:
            return []
        logits = self._forward([d.row.unread for d in drafts], drafts, final=True)
        self.reader.commit([len(d.row.unread) for d in drafts], [d.row.name for d in drafts])
        for draft in drafts:
            draft.row.unread = []
        return logits

    def _forward(
        self, tokens: Sequence[Sequence[int]], drafts: Sequence[Growing[_Row]], final: bool = False
    ) -> Sequence[Tensor]:
        """Read some tokens of each row, which are ``final`` or tentative; logits ``[V]`` after the last of each."""
        lengths = [len(each) for each in tokens]
        longest = max(lengths)
        ids = self._draft_ids
        known = tokens if ids is None else [[ids[token] for token in each] for each in tokens]
        padded = torch.tensor([[*each, *[0] * (longest - len(each))] for each in known], device=self.reader.device)
        ends = sorted({length - 1 for length in lengths})
        names = [d.row.name for d in drafts]
        logits = self.reader.forward(padded, names, ends, lengths if final else None)
        return [logits[i, ends.index(length - 1)] for i, length in enumerate(lengths)]

    def _extend(self, draft: Growing[_Row], logits: Tensor) -> None:
        """Choose the row's next drafted token from the draft model's logits ``[V]`` (its own vocabulary)."""
        if draft.ask.sample:
            draft.sample(logits, self._d2t, self._vocab_size)
            return
        draft.take(logits, self._target_ids)
