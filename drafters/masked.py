"""A masked-diffusion model as the drafter: masks behind a row's text, and one forward pass guesses them all.

Whole rows are read each round and nothing is kept between rounds, so that a guess is a function of the row's text.
Positions that one pass fills are drawn without one another. A sampled token is nevertheless drawn from a distribution
that only the text and drafted tokens *in front of it* decide, which is what verification asks of q: masks are filled
from left to right, however many passes that takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accel.drafters.base import Ask, Draft
from accel.drafters.growing import Growing
from accel.drafters.rows import Rows
from accel.errors import IncompatibleError
from accel.kernels.unmask import COUNTING_RULES, Certainty, certainty, commit
from accel.models.diffusion import Denoiser


@dataclass
class _Row:
    generator: torch.Generator
    num_prompt: int
    # final tokens
    tokens: list[int]


@dataclass
class _Block:
    """The masks behind a row's text; the first ``length`` are drafted, and those of ``draft.tokens`` are filled."""

    draft: Growing[_Row]
    length: int
    num_masks: int

    @property
    def num_gaps(self) -> int:
        return self.length - len(self.draft.tokens)

    def text(self, mask: int) -> Tensor:
        """int64 [T]: the row's text, what is filled, and masks."""
        tokens = self.draft.tokens
        return torch.tensor([*self.draft.row.tokens, *tokens, *[mask] * (self.num_masks - len(tokens))])

    def gaps(self) -> Tensor:
        """int64 [L], the positions that are to be filled."""
        begin = len(self.draft.row.tokens)
        return torch.arange(begin + len(self.draft.tokens), begin + self.length)


class MaskedDrafter:
    """Fulfils ``Drafter``; the denoiser's vocabulary is the target's, but for a mask token of its own behind it.

    As many passes as ``Ask.passes`` allows: each but the last keeps what the model's own rule is certain of from the
    first mask on, and that one in any case; the last one keeps everything.
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
        active = [block for block in blocks if block.num_gaps]
        num_passes = 0
        while active:
            num_passes += 1
            rows = [block.text(self._facts.mask_token) for block in active]
            logits = self.reader.logits(rows, [block.gaps() for block in active])
            pairs = list(zip(active, logits, strict=True))
            self._fill_greedy([pair for pair in pairs if not pair[0].draft.ask.sample], num_passes)
            for block, own in pairs:
                if block.draft.ask.sample:
                    self._fill_sampled(block, own, num_passes)
            active = [block for block in active if block.num_gaps]
        return [block.draft.finish(self.name) for block in blocks]

    def _block(self, ask: Ask) -> _Block:
        row = self._rows[ask.row]
        limit, length = self.reader.max_positions, self._facts.block_length
        written = len(row.tokens) - row.num_prompt
        # a model that learned from whole blocks takes the end of its masks for the end of the text
        num_masks = -(-(written + ask.max_tokens) // length) * length - written
        room = num_masks if limit is None else max(0, min(num_masks, limit - len(row.tokens)))
        return _Block(Growing(ask, row), min(ask.max_tokens, room), room)

    def _fill_greedy(self, pairs: Sequence[tuple[_Block, Tensor]], num_passes: int) -> None:
        """Take the likeliest tokens of each block's gaps, by their logits [L, V], as far as this pass goes."""
        if not pairs:
            return
        lengths = [len(logits) for _, logits in pairs]
        together = certainty(torch.cat([logits for _, logits in pairs]), forbidden=self._facts.mask_token)
        parts = zip(*(part.split(lengths) for part in together), strict=True)
        for (block, _), part in zip(pairs, parts, strict=True):
            found = Certainty(*part)
            count = self._num_certain(found, block.draft.ask.passes - num_passes)
            tokens = found.token[:count].tolist()
            end = next((i + 1 for i, token in enumerate(tokens) if token in self._facts.stop_tokens), None)
            block.draft.tokens += tokens[:end]
            block.draft.confidence += found.probability[:count].tolist()[:end]
            if end is not None:
                block.length = len(block.draft.tokens)

    def _fill_sampled(self, block: _Block, logits: Tensor, num_passes: int) -> None:
        """Draw the tokens of the block's gaps from logits [L, V], as far as this pass goes.

        How far must not depend on what is drawn at the gap or behind it: certainty is judged on the distribution, the
        draft is ended only before a draw, and nothing is drawn that is not kept.
        """
        draft, logits = block.draft, logits.float()
        if self._facts.mask_token < self._vocab_size:
            logits[:, self._facts.mask_token] = -torch.inf
        logits = logits[:, : self._vocab_size]
        count, left = len(logits), draft.ask.passes - num_passes
        if left > 0:
            count = self._num_certain(certainty(logits if draft.ask.warp is None else draft.ask.warp(logits)), left)
        for scores in logits[:count]:
            draft.sample(scores, None, self._vocab_size)
            if draft.tokens[-1] in self._facts.stop_tokens or not draft.wants_more():
                block.length = len(draft.tokens)
                break

    def _num_certain(self, found: Certainty, passes_left: int) -> int:
        """How many of a block's gaps to fill now, from the first on: all of them in the last pass.

        The published rules fill what is certain wherever it stands. Only what stands behind right tokens is kept by a
        target, and what was certain far ahead agrees less with what then comes in front of it.
        """
        count = len(found.token)
        if passes_left <= 0:
            return count
        facts, device = self._facts, found.token.device
        counts = facts.rule in COUNTING_RULES
        chosen = commit(
            Certainty(*(part[None] for part in found)),
            torch.ones(1, count, dtype=torch.bool, device=device),
            rule=facts.rule,
            threshold=None if counts else facts.threshold,
            count=torch.tensor([-(-count // (passes_left + 1))], device=device) if counts else None,
            strict=facts.strict,
        )
        return max(1, int(chosen[0].cumprod(0).sum()))
