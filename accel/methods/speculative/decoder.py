"""Speculative decoding: a drafter guesses, the target verifies all guesses of a round in one forward pass.

Lossless unless lenience is asked for (README.md beside this file). Rows draft, accept and finish on their own.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel.axes import Branching, Ragged, Target
from accel.drafters.base import Ask, Beside, Draft, Drafter, drafts_at_once, leaves, open_row, target_readers
from accel.errors import IncompatibleError
from accel.kernels.verify import accept, draw, longest_path, longest_prefix, residual, verify
from accel.methods.plain.decoder import LiveRow, RowDecoder
from accel.methods.speculative.draft_length import AdaptiveLength, Costs, FixedLength, nearby
from accel.methods.speculative.options import SpeculativeOptions
from accel.sampling import checked
from accel.types import Emission, Request, Stats

# other tokens that a drafter is asked for beside each of its guess's; few are worth their verification
MOST_BESIDE = 4


@dataclass(frozen=True)
class Speculator:
    """What outlives a single call: the drafter, and what was learned about its acceptance and cost."""

    drafter: Drafter
    length: AdaptiveLength | FixedLength
    costs: Costs

    @classmethod
    def create(cls, drafter: Drafter, options: SpeculativeOptions) -> Speculator:
        costs = Costs(drafts_at_once(drafter))
        fixed = not isinstance(options.draft_length, str)
        length = FixedLength(options.longest_draft) if fixed else AdaptiveLength(options.longest_draft, costs)
        return cls(drafter, length, costs)


@dataclass(frozen=True)
class _Guess:
    """A row's draft of this round: what was proposed, and how much of it goes to the target."""

    proposed: Draft
    length: int
    # verified in the same pass: what else some of these tokens might be
    beside: Sequence[Beside] = ()

    @property
    def num_drafted(self) -> int:
        return self.length + len(self.beside)

    @property
    def tokens(self) -> list[int]:
        return self.proposed.tokens[: self.length]

    @property
    def probs(self) -> Tensor | None:
        return None if self.proposed.probs is None else self.proposed.probs[: self.length]


@dataclass(frozen=True)
class _Verdict:
    """How many drafted tokens a row keeps, the token after them, and the scores behind all of these ``[k, V]``.

    ``path``: the places of what was read that are kept, where they are not simply the first ones.
    """

    num_accepted: int
    next_token: int
    scores: Tensor | None
    path: Sequence[int] | None = None


class SpeculativeDecoder(RowDecoder):
    """One round a step: draft, verify, keep."""

    def __init__(self, target: Target, options: SpeculativeOptions, stats: Stats, speculator: Speculator) -> None:
        super().__init__(target, stats)
        self.options = options
        self.drafter = speculator.drafter
        self.readers = target_readers(self.drafter)
        for reader in self.readers:
            reader.listen(target)
        parts = leaves(self.drafter)
        self.free = {part.name for part in parts if part.free}
        # whose tokens cost something: at most one of the parts of a cascade that accel builds
        self.paid = next((part.name for part in parts if not part.free), "")
        self.is_mixed = bool(self.paid and self.free)
        # who reads hidden states has the target's own pass run, over rows of one length
        self._ragged = target if isinstance(target, Ragged) and not self.readers else None
        self._branching = target if isinstance(target, Branching) and not self.readers else None
        self.length = speculator.length
        self.costs = speculator.costs
        stats.method, stats.lossless = "speculative", options.is_lossless

    def check(self, request: Request) -> None:
        pipeline = request.pipeline
        if self.options.acceptance == "block" and pipeline is not None and not pipeline.rowwise:
            raise IncompatibleError(
                "acceptance='block' looks at all drafted positions, but a custom logits processor may only see kept "
                "tokens: use acceptance='token' or 'auto'"
            )
        custom = pipeline is not None and not pipeline.rowwise
        if self.options.lenience is not None and not request.do_sample and custom:
            raise IncompatibleError("lenience with greedy decoding does not work with custom logits processors")

    def on_admitted(self, rows: Sequence[LiveRow]) -> None:
        for live in rows:
            request = live.request
            open_row(self.drafter, request.draft_segments, request.id, request.prompt.tolist(), request.seed)
            for reader in self.readers:
                reader.follow(request.id, self.target, live.row)
            self.length.open(request.id)

    def on_evicted(self, rows: Sequence[LiveRow]) -> None:
        for live in rows:
            self.drafter.close(live.request.id)
            self.length.close(live.request.id)

    def emit(self, live: LiveRow, tokens: list[int], logits: Tensor, scores: Tensor | None) -> Emission:
        self.drafter.observe(live.request.id, tokens)
        return super().emit(live, tokens, logits, scores)

    def advance(self) -> list[Emission]:
        rows = list(self.live.values())
        start = time.perf_counter()
        guesses = self._draft(rows)
        drafted = time.perf_counter()
        names = [live.row for live in rows]
        logits, num_read = self._read(rows, names, guesses)
        verdicts = self._verify(rows, guesses, logits)
        if self._branching is not None and verdicts[0].path is not None:
            self._branching.commit_path(verdicts[0].path, names[0])
        else:
            self.target.commit([1 + v.num_accepted for v in verdicts], names)
        emissions = [self._settle(*each) for each in zip(rows, guesses, verdicts, logits, strict=True)]
        done = time.perf_counter()
        self._account(len(rows), num_read, guesses, drafting=drafted - start, verifying=done - drafted)
        return emissions

    def _read(
        self, rows: Sequence[LiveRow], names: Sequence[int], guesses: Sequence[_Guess]
    ) -> tuple[Sequence[Tensor] | Tensor, int]:
        """The target's logits of each row, ``[n, V]`` with n > its guess, and as how many positions that counts."""
        if self._branching is not None and guesses[0].beside:
            return self._read_branches(rows[0], names[0], guesses[0])
        lengths = [1 + guess.length for guess in guesses]
        longest = max(lengths)
        # what stands behind a row's own guess is never looked at
        n = longest if self._reads_ragged(rows) else self.length.padded(len(rows), longest)
        tokens = torch.zeros(len(rows), n, dtype=torch.long)
        for index, (live, guess) in enumerate(zip(rows, guesses, strict=True)):
            tokens[index, : lengths[index]] = torch.tensor([live.pending, *guess.tokens])
        if self._ragged is not None and self._reads_ragged(rows):
            return self._ragged.forward_ragged(tokens, names, lengths), nearby(sum(lengths), len(rows))
        return self.target.forward(tokens.to(self.target.device), names), len(rows) * n

    def _read_branches(self, live: LiveRow, name: int, guess: _Guess) -> tuple[Tensor, int]:
        assert self._branching is not None
        tokens = [live.pending, *guess.tokens, *(each.token for each in guess.beside)]
        depths = [*range(1 + guess.length), *(each.depth + 1 for each in guess.beside)]
        return self._branching.forward_branches(torch.tensor(tokens), name, depths)[None], len(tokens)

    def _may_branch(self, rows: Sequence[LiveRow]) -> bool:
        """Whether tokens beside a guess can be verified with it: of one row, greedily, where scores are of no history.

        Rows of a batch share what a step can read at little cost: there the likeliest tokens of each are worth more.
        """
        live = rows[0]
        return (
            self._branching is not None
            and len(rows) == 1
            and isinstance(self.length, AdaptiveLength)
            and not live.request.do_sample
            and self.options.lenience is None
            and live.sampler.pipeline.rowwise
            and live.sampler.pipeline.ignores_ids
            and self._branching.may_branch(live.row)
        )

    def _reads_ragged(self, rows: Sequence[LiveRow]) -> bool:
        """Whether rows are read as far as their own guesses, and not as far as the longest one."""
        return self._ragged is not None and len(rows) > 1

    def _draft(self, rows: Sequence[LiveRow]) -> list[_Guess]:
        """Ask the drafter for the rows that may draft this round, and trim what it says to what is worth verifying."""
        asks = {}
        beside = MOST_BESIDE if self._may_branch(rows) else 0
        for live in rows:
            allowed = self.length.allowance(live.request.id)
            # a part that costs nothing goes on while the one that loses sits out
            free_only = allowed == 0 and self.is_mixed
            most = min(self.length.longest if free_only else allowed, live.num_left - 1, self._room(live))
            if most > 0:
                asks[live.request.id] = self._ask(live, most, len(rows), free_only, beside)
        drafts = dict(zip(asks, self.drafter.propose(list(asks.values())) if asks else [], strict=True))
        guesses = []
        for live in rows:
            draft = drafts.get(live.request.id, Draft())
            sampled = draft.probs is not None
            free, source = self._is_free(draft), self._source(draft)
            given = (draft.confidence, len(rows), free, sampled, source, draft.beside)
            keep, chosen = self.length.choose(live.request.id, *given)
            ending = _through_stop(draft.tokens[:keep], live.request.stop_tokens)
            guesses.append(_Guess(draft, ending, [each for each in chosen if each.depth <= ending]))
        return guesses if len(rows) == 1 else self._bounded(rows, guesses)

    def _bounded(self, rows: Sequence[LiveRow], guesses: Sequence[_Guess]) -> list[_Guess]:
        """Guesses as long as is worth it for the batch. Sampled drafts stay whole (see ``AdaptiveLength.choose``)."""
        told = [
            (live.request.id, guess.proposed.confidence[: guess.length], self._source(guess.proposed))
            for live, guess in zip(rows, guesses, strict=True)
        ]
        most = self.length.together(told, ragged=self._reads_ragged(rows))
        return [
            guess if guess.probs is not None else _Guess(guess.proposed, min(guess.length, length))
            for guess, length in zip(guesses, most, strict=True)
        ]

    def _source(self, draft: Draft) -> str:
        return draft.source or self.drafter.name

    def _is_free(self, draft: Draft) -> bool:
        return self.drafter.free or self._source(draft) in self.free

    def _ask(self, live: LiveRow, most: int, num_rows: int, free_only: bool, beside: int) -> Ask:
        return Ask(
            row=live.request.id,
            max_tokens=most,
            sample=live.request.do_sample,
            warp=live.sampler.pipeline.warp if live.sampler.pipeline else None,
            names_tokens=live.sampler.pipeline.names_tokens,
            keep_going=lambda confidences: self.length.keep_going(live.request.id, confidences, num_rows, self.paid),
            free_only=free_only,
            passes=self.options.draft_steps,
            beside=beside,
        )

    def _room(self, live: LiveRow) -> int:
        """Positions left in the model's context behind the pending token; past it a row is decoded plainly."""
        if self.target.max_positions is None:
            return live.num_left
        return self.target.max_positions - self.target.num_positions(live.row) - 1

    def _verify(
        self, rows: Sequence[LiveRow], guesses: Sequence[_Guess], logits: Sequence[Tensor] | Tensor
    ) -> list[_Verdict]:
        """A verdict per row. Rows that can be judged alike are judged in one call; the rest one by one."""
        verdicts: dict[int, _Verdict] = {}
        together: dict[tuple[bool, bool, int], list[int]] = {}
        for index, (live, guess) in enumerate(zip(rows, guesses, strict=True)):
            has_q = guess.probs is not None and guess.length > 0
            drawn = live.request.do_sample and not has_q and self.options.lenience is None
            greedy = not live.request.do_sample and self.options.lenience is None
            if live.sampler.pipeline.rowwise and greedy and logits[index].device.type == "cpu":
                verdicts[index] = _greedy_verdict(live, guess, logits[index])
            elif live.sampler.pipeline.rowwise and not drawn:
                # of one length where none is padded: what would be copied to pad them is a vocabulary wide
                length = guess.length if self._reads_ragged(rows) else 0
                together.setdefault((live.request.do_sample, has_q, length), []).append(index)
            else:
                verdicts[index] = self._verify_in_order(live, guess, logits[index])
        for (sampled, has_q, _), members in together.items():
            chosen = [(rows[i], guesses[i], logits[i]) for i in members]
            verdicts.update(zip(members, self._verify_together(chosen, sampled, has_q), strict=True))
        return [verdicts[index] for index in range(len(rows))]

    def _verify_together(
        self, members: Sequence[tuple[LiveRow, _Guess, Tensor]], sampled: bool, has_q: bool
    ) -> list[_Verdict]:
        """One call of the verify kernel over rows of one kind."""
        most = max(guess.length for _, guess, _ in members)
        scores = torch.stack([_scores(live, guess, row_logits[: most + 1]) for live, guess, row_logits in members])
        tokens = torch.zeros(len(members), most, dtype=torch.long)
        uniforms = torch.zeros(len(members), most + 1, dtype=torch.float64)
        q = torch.zeros(len(members), most, scores.shape[-1]) if has_q else None
        for index, (live, guess, _) in enumerate(members):
            tokens[index, : guess.length] = torch.tensor(guess.tokens, dtype=torch.long)
            if sampled:
                # as many uniforms as the row's own draft needs: its neighbours' lengths must not shift its stream
                own = live.sampler.uniforms(guess.length + 1)
                uniforms[index, : guess.length], uniforms[index, most] = own[:-1], own[-1]
            if q is not None and guess.probs is not None:
                q[index, : guess.length] = guess.probs
        device = scores.device
        verdict = verify(
            scores,
            tokens.to(device),
            torch.tensor([guess.length for _, guess, _ in members], device=device),
            q=None if q is None else q.to(device),
            greedy=not sampled,
            uniforms=uniforms.to(device) if sampled else None,
            acceptance=self._acceptance(has_q),
            lenience=self.options.lenience,
        )
        counts, next_tokens = verdict.n_accepted.tolist(), checked(verdict.next_token)
        return [_Verdict(counts[i], next_tokens[i], scores[i]) for i in range(len(members))]

    def _acceptance(self, has_q: bool) -> str:
        """Block verification gains only where the draft was sampled; for a certain guess both rules are one law."""
        if not has_q or self.options.lenience is not None:
            return "token"
        return "token" if self.options.acceptance == "token" else "block"

    def _verify_in_order(self, live: LiveRow, guess: _Guess, logits: Tensor) -> _Verdict:
        """Token by token up to the first one that is not kept; nothing behind it is looked at."""
        scores: list[Tensor] = []
        for position, token in enumerate([*guess.tokens, None]):
            scores.append(live.sampler.scores(logits[position], guess.tokens[:position]))
            choice = self._decide(live, guess, position, token, scores[-1])
            if choice != token or choice in live.request.stop_tokens:
                return _Verdict(position, choice, torch.stack(scores))
        raise AssertionError("the bonus position always decides")

    def _decide(self, live: LiveRow, guess: _Guess, position: int, token: int | None, scores: Tensor) -> int:
        """The token at one position: the drafted one where it is kept."""
        if token is None or (guess.probs is None and self.options.lenience is None):
            # A certain guess is kept exactly when it is what the row draws anyway. That happens with probability
            # p(token), as the accept-or-resample rule asks, and leaves the row's tokens independent of its drafts.
            return live.sampler.choose(scores)
        p = scores.softmax(-1)
        q = None if guess.probs is None else guess.probs[position].to(p.device)
        if accept(p, q, token, float(live.sampler.uniforms(1)), self.options.lenience):
            return token
        return draw(residual(p, q, token, self.options.lenience), float(live.sampler.uniforms(1)))

    def _settle(self, live: LiveRow, guess: _Guess, verdict: _Verdict, logits: Tensor) -> Emission:
        """Make a verdict final: learn from it, count it, emit its tokens."""
        kept = verdict.num_accepted
        tokens = [*_kept_tokens(guess, verdict), verdict.next_token]
        matches, labels = _outcome(guess, verdict, tokens)
        source = self._source(guess.proposed)
        self.length.learn(live.request.id, guess.proposed.confidence, matches, labels, source)
        if guess.proposed.beside:
            self.length.learn_beside(live.request.id, guess.proposed.beside, tokens[: matches + 1], source)
        self.stats.count(guess.num_drafted, kept)
        if live.request.stats is not None:
            live.request.stats.count(guess.num_drafted, kept)
        places: Any = slice(kept + 1) if verdict.path is None else list(verdict.path)
        return self.emit(live, tokens, logits[places], None if verdict.scores is None else verdict.scores[places])

    def _account(self, rows: int, num_read: int, guesses: Sequence[_Guess], drafting: float, verifying: float) -> None:
        self.costs.observe_verify(num_read, verifying)
        # in a cascade, what a free guess took says nothing of the tokens that cost something
        paid = [guess for guess in guesses if not (self.is_mixed and self._is_free(guess.proposed))]
        # rows draft side by side: the round takes as many steps as its longest draft has tokens
        num_drafted: float = max((len(guess.proposed.tokens) for guess in paid), default=0)
        if num_drafted and self.costs.at_once:
            # one price for the block: a token's share of it goes by how many of them were worth verifying, a row
            lengths = [guess.length for guess in paid if guess.proposed.tokens]
            num_drafted = max(1.0, sum(lengths) / len(lengths))
        if num_drafted or not self.is_mixed:
            self.costs.observe_draft(num_drafted, drafting)
        self.stats.target_calls += 1
        self.stats.add_seconds("draft", drafting)
        self.stats.add_seconds("verify", verifying)
        self.stats.cost_ratio = self.costs.ratio(rows)


def _through_stop(tokens: Sequence[int], stop_tokens: Collection[int]) -> int:
    """How many tokens there are up to the first that would end the row: nothing behind it can be kept.

    The end itself stays: a sampled draft must not lose a token for what it is (see ``AdaptiveLength.choose``).
    """
    return next((index + 1 for index, token in enumerate(tokens) if token in stop_tokens), len(tokens))


def _scores(live: LiveRow, guess: _Guess, logits: Tensor) -> Tensor:
    """Scores ``[n, V]`` of all positions of a row; what stands behind its own draft is never read."""
    pipeline = live.sampler.pipeline
    if pipeline.ignores_ids:
        # greedy decoding compares raw logits: no copy of [n, V] in fp32 for an argmax
        return live.sampler.scores_together(logits) if pipeline or live.request.do_sample else logits
    scores = [live.sampler.scores(logits[i], guess.tokens[:i]) for i in range(guess.length + 1)]
    return torch.cat([torch.stack(scores), logits[guess.length + 1 :].float()])


def _greedy_verdict(live: LiveRow, guess: _Guess, logits: Tensor) -> _Verdict:
    """What the target would have said, on the host: logits ``[n, V]`` of one row."""
    scores = _scores(live, guess, logits)
    if not guess.beside:
        return _Verdict(*longest_prefix(scores, guess.tokens), scores)
    path, token = longest_path(scores, guess.tokens, [(each.depth, each.token) for each in guess.beside])
    return _Verdict(len(path) - 1, token, scores, path)


def _kept_tokens(guess: _Guess, verdict: _Verdict) -> list[int]:
    """The drafted tokens that a row keeps."""
    if verdict.path is None:
        return guess.tokens[: verdict.num_accepted]
    read = [*guess.tokens, *(each.token for each in guess.beside)]
    return [read[place - 1] for place in verdict.path[1:]]


def _outcome(guess: _Guess, verdict: _Verdict, emitted: Sequence[int]) -> tuple[int, int]:
    """(tokens of the proposal that came true, tokens whose outcome is known).

    What was trimmed away is judged too where the emitted tokens say how it would have ended: a free drafter learns
    without paying for verification. A sampled draft's outcome is its acceptance and not a comparison.
    """
    if guess.proposed.probs is not None:
        return verdict.num_accepted, guess.length
    proposed = guess.proposed.tokens
    matches = 0
    while matches < min(len(proposed), len(emitted)) and proposed[matches] == emitted[matches]:
        matches += 1
    return matches, min(len(proposed), len(emitted))
