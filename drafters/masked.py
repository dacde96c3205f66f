"""A masked-diffusion model as the drafter: masks behind a row's text, and one forward pass guesses them all.

Whole rows are read each round and nothing is kept between rounds, so that a guess is a function of the row's text.
Positions that one pass fills are drawn without one another. A sampled token is nevertheless drawn from a distribution
that only the text and drafted tokens *in front of it* decide, which is what verification asks of q: sampled rows are
filled from left to right, however many passes they take; greedy ones, whose guesses are points, in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from accel.drafters.base import Ask, Draft
from accel.drafters.growing import Growing
from accel.drafters.rows import Rows
from accel.errors import IncompatibleError
from accel.kernels.unmask import Certainty, certainty, commit
from accel.models.diffusion import Denoiser


@dataclass
class _Row:
    generator: torch.Generator
    num_prompt: int
    # final tokens
    tokens: list[int]


@dataclass
class _Block:
    """The masks behind a row's text, of which the first ``length`` are drafted, and what they have become."""

    draft: Growing[_Row]
    length: int
    num_masks: int
    filled: dict[int, int] = field(default_factory=dict)
    beliefs: dict[int, float] = field(default_factory=dict)

    @property
    def gaps(self) -> list[int]:
        return [place for place in range(self.length) if place not in self.filled]

    def text(self, mask: int) -> list[int]:
        return self.draft.row.tokens + [self.filled.get(place, mask) for place in range(self.num_masks)]

    def take(self, place: int, token: int, belief: float, ends: bool) -> None:
        """Fill one mask; what stands behind the end of a text is no draft."""
        self.filled[place], self.beliefs[place] = token, belief
        if ends:
            self.length = min(self.length, place + 1)

    def finish(self, source: str) -> Draft:
        if self.draft.ask.sample:
            return self.draft.finish(source)
        places = range(self.length)
        return Draft([self.filled[p] for p in places], None, [self.beliefs[p] for p in places], source)


class MaskedDrafter:
    """Fulfils ``Drafter``; the denoiser's vocabulary is the target's, but for a mask token of its own behind it.

    As many passes as ``Ask.passes`` allows: each but the last keeps what the model's own rule is certain of, the last
    one keeps everything.
    """

    name = "masked"
    free = False
    at_once = True

    def __init__(self, denoiser: Denoiser, target_vocab_size: int) -> None:
        size, mask = denoiser.vocab_size, denoiser.facts.mask_token
        sayable = size - 1 if mask == size - 1 == target_vocab_size else size
        if sayable != target_vocab_size:
            raise IncompatibleError(
                f"the masked-diffusion draft has a vocabulary of {size} and the target of {target_vocab_size}: its "
                "drafts are not translated; use one with the target's tokenizer, or a small causal model"
            )
        self.reader = denoiser
        self._facts = denoiser.facts
        self._vocab_size = target_vocab_size
        self._rows: Rows[_Row] = Rows(self.name)

    def open(self, row: int, prompt: Sequence[int], seed: int) -> None:
        # the draft's randomness must be its own: the row's generator decides what is accepted
        generator = torch.Generator().manual_seed((seed ^ 0x5EED_3A5C) & 0x7FFF_FFFF_FFFF_FFFF)
        self._rows.open(row, _Row(generator, len(prompt), list(prompt)))

    def observe(self, row: int, tokens: Sequence[int]) -> None:
        self._rows[row].tokens += tokens

    def close(self, row: int) -> None:
        self._rows.close(row)

    def state_bytes(self) -> int:
        return 0

    @torch.no_grad()
    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        """One draft per ask, in order; rows whose text fills the model's context draft nothing."""
        blocks = [self._block(ask) for ask in asks]
        active = [block for block in blocks if block.gaps]
        num_passes = 0
        while active:
            num_passes += 1
            rows = [torch.tensor(block.text(self._facts.mask_token)) for block in active]
            at = [len(block.draft.row.tokens) + torch.tensor(block.gaps) for block in active]
            logits = self.reader.logits(rows, at)
            self._fill_greedy(
                [(b, x) for b, x in zip(active, logits, strict=True) if not b.draft.ask.sample], num_passes
            )
            for block, own in zip(active, logits, strict=True):
                if block.draft.ask.sample:
                    self._fill_sampled(block, own, num_passes)
            active = [block for block in active if block.gaps]
        return [block.finish(self.name) for block in blocks]

    def _block(self, ask: Ask) -> _Block:
        row = self._rows[ask.row]
        limit, length = self.reader.max_positions, self._facts.block_length
        written = len(row.tokens) - row.num_prompt
        # a model that learned from whole blocks takes the end of its masks for the end of the text
        num_masks = -(-(written + ask.max_tokens) // length) * length - written
        room = num_masks if limit is None else max(0, min(num_masks, limit - len(row.tokens)))
        return _Block(Growing(ask, row), min(ask.max_tokens, room), room)

    def _fill_greedy(self, members: Sequence[tuple[_Block, Tensor]], num_passes: int) -> None:
        """Take the likeliest tokens of each block's gaps (logits [L, V] of each), or of those that are certain."""
        if not members:
            return
        found = certainty(torch.cat([logits for _, logits in members]), forbidden=self._facts.mask_token)
        tokens, beliefs = found.token.tolist(), found.probability.tolist()
        begin = 0
        for block, logits in members:
            end = begin + len(logits)
            chosen = self._certain(Certainty(*(part[begin:end] for part in found)), block.draft.ask.passes - num_passes)
            for place, token, belief, yes in zip(
                block.gaps, tokens[begin:end], beliefs[begin:end], chosen, strict=True
            ):
                if yes:
                    block.take(place, token, belief, token in self._facts.stop_tokens)
            begin = end

    def _fill_sampled(self, block: _Block, logits: Tensor, num_passes: int) -> None:
        """Draw the tokens of the block's gaps from logits [L, V], or of as many from the first on as are certain.

        Whether a gap is filled now must not depend on what would be drawn there or behind it: certainty is judged on
        the distribution, and nothing is drawn where it is not kept.
        """
        draft, places = block.draft, block.gaps
        logits = logits.float()
        if self._facts.mask_token < self._vocab_size:
            logits[:, self._facts.mask_token] = -torch.inf
        logits = logits[:, : self._vocab_size]
        count, left = len(places), draft.ask.passes - num_passes
        if left > 0:
            chosen = self._certain(certainty(logits if draft.ask.warp is None else draft.ask.warp(logits)), left)
            count = max(1, next((i for i, yes in enumerate(chosen) if not yes), count))
        for place, scores in zip(places[:count], logits, strict=False):
            draft.sample(scores, None, self._vocab_size)
            token = draft.tokens[-1]
            block.take(place, token, draft.confidence[-1], token in self._facts.stop_tokens or not draft.wants_more())
            if block.length == place + 1:
                break

    def _certain(self, found: Certainty, passes_left: int) -> list[bool]:
        """Which of a block's gaps to fill now: all in the last pass, before it what the model's own rule says."""
        count = len(found.token)
        if passes_left <= 0:
            return [True] * count
        facts = self._facts
        counts = facts.rule.startswith("top_k")
        chosen = commit(
            Certainty(*(part[None] for part in found)),
            torch.ones(1, count, dtype=torch.bool, device=found.token.device),
            rule=facts.rule,
            threshold=None if counts else facts.threshold,
            count=torch.tensor([-(-count // (passes_left + 1))], device=found.token.device) if counts else None,
            strict=facts.strict,
        )
        return [bool(yes) for yes in chosen[0].tolist()]
