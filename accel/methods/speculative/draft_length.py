"""How many tokens to draft: from online acceptance and measured cost, per row. Knows no models and no tensors.

A round that verifies L drafted tokens costs V(1 + L) and brings 1 + Σ_{i ≤ L} S_i tokens in expectation, where S_i is
the chance that the first i drafted tokens are all accepted. The length that brings the most tokens per second is
chosen; 0, plain decoding, is one of the choices.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from accel.drafters.base import Beside

# acceptance is learned per bin of the drafter's own confidence
NUM_BINS = 10
# weight, in observations, of the belief that confidence is already calibrated / that a row is like the other rows
PRIOR_WEIGHT = 4.0
ROW_PRIOR_WEIGHT = 16.0
# an observation's weight after n later ones is FORGET**n: text changes its mind
FORGET = 0.99
ROW_FORGET = 0.95
# cost of verifying one more position, as a share of one step, believed until it is measured
ASSUMED_COST_PER_POSITION = 0.03
# recent timings kept per number of positions
WINDOW = 15
# rows that are read as far as each one's own guess: so many more positions than rows share their timings
NEARBY = 4
# timings of a number of positions until they are believed alone; before, the assumption votes with them, because one
# slow moment of the machine would otherwise end drafting for good
TRUSTED = 4
# A pass over a few more positions may be faster: kernels like some counts better than others. It is taken if timed this
# much below what is needed. Whether it is gets found out by padding by TRIED_PADDING, one step in so many, until timed.
MOST_PADDING, MOST_PADDED, WORTH_PADDING = 3, 16, 0.97
TRIED_PADDING, TRY_EVERY = 2, 4
# steps after which a timing is forgotten: the machine, or its other work, may have changed meanwhile
MEMORY = 128
# a gain that is predicted below this is not worth the risk of the prediction
LEAST_GAIN = 1.03
# a losing drafter sits out at least this many rounds: doubled after each try that fails
FIRST_PROBE, LAST_PROBE = 8, 128
# and as many as it takes for what the try lost to be this share of the time until the next one
MOST_LOSS, LONGEST_PAUSE = 0.02, 512
# rounds after which a step without drafts is timed again: everything is compared with it, and contexts grow
STALE = 128
# what a row's recent rounds gained over plain decoding fades by this a round: one poor guess is no verdict
BALANCE_FORGET = 0.9
# and a row may be this many plain steps behind: a cheap drafter loses most rounds by a little, wins others by more
TOLERATED = 0.3


class Acceptance:
    """The chance that a drafted token is accepted, given its drafter's confidence in it.

    One Beta-Bernoulli estimate per confidence bin with forgetting; its prior is ``parent``'s estimate or, without a
    parent, the confidence itself.
    """

    def __init__(self, parent: Acceptance | None = None) -> None:
        self._parent = parent
        self._weight = PRIOR_WEIGHT if parent is None else ROW_PRIOR_WEIGHT
        self._forget = FORGET if parent is None else ROW_FORGET
        self._hits = [0.0] * NUM_BINS
        self._tries = [0.0] * NUM_BINS

    def chance(self, confidence: float) -> float:
        prior = self._parent.chance(confidence) if self._parent else min(max(confidence, 0.02), 0.98)
        i = self.bin(confidence)
        return (self._hits[i] + self._weight * prior) / (self._tries[i] + self._weight)

    def observe(self, confidence: float, accepted: bool) -> None:
        i = self.bin(confidence)
        self._hits[i] = self._hits[i] * self._forget + accepted
        self._tries[i] = self._tries[i] * self._forget + 1.0
        if self._parent:
            self._parent.observe(confidence, accepted)

    @staticmethod
    def bin(confidence: float) -> int:
        return _bin(confidence)

    def survival(self, confidences: Sequence[float]) -> list[float]:
        """S_1 … S_k for k drafted tokens."""
        survival, alive = [], 1.0
        for confidence in confidences:
            alive *= self.chance(confidence)
            survival.append(alive)
        return survival


class AcceptanceBeside(Acceptance):
    """The same for tokens beside the guess, whose confidences are small: bins by their square roots."""

    @staticmethod
    def bin(confidence: float) -> int:
        return _bin(math.sqrt(confidence))


class Costs:
    """Measured seconds of verifying n positions and of drafting; medians of recent timings.

    ``at_once``: a round of drafting costs the same, however many tokens it drafts and whatever came before it.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.at_once = at_once
        # number of positions → (step, seconds)
        self._verify: dict[int, deque[tuple[int, float]]] = {}
        # (tokens, seconds) of a round
        self._draft: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._catching_up = False
        self._last_seen: dict[int, int] = {}
        self._num_steps = 0
        # what _believe made of the timings; a round asks many times between two of them
        self._believed: dict[int, float] | None = None
        # seconds of the last draft that had to catch up
        self.catch_up = 0.0

    @property
    def knows_draft(self) -> bool:
        """Whether drafting has been timed."""
        return bool(self._draft)

    def expect_catch_up(self) -> None:
        """The next draft first reads a prompt, or all that a row gained in a pause: its time says little."""
        self._catching_up = True

    def observe_verify(self, positions: int, seconds: float) -> None:
        self._num_steps += 1
        self._verify.setdefault(positions, deque(maxlen=WINDOW)).append((self._num_steps, seconds))
        self._last_seen[positions] = self._num_steps
        self._believed = None

    def observe_draft(self, tokens: float, seconds: float) -> None:
        if self._catching_up:
            self.catch_up = seconds
        elif tokens:
            self._draft.append((tokens, seconds))
        self._catching_up = False

    def draft(self) -> float:
        """Seconds per drafted token; 0 until measured, so that an unknown drafter is given a try."""
        return median(seconds / tokens for tokens, seconds in self._draft) if self._draft else 0.0

    def drafting(self, tokens: int) -> float:
        """Seconds of a round that drafts so many tokens a row; 0 until measured."""
        if not self.at_once:
            return tokens * self.draft()
        return median(seconds for _, seconds in self._draft) if tokens and self._draft else 0.0

    def verify(self, positions: int) -> float:
        """Seconds of one target step over n positions: measured, interpolated, or assumed to grow slowly."""
        if not self._verify:
            return _assumed(1.0, 1, positions)
        known = self._believed = self._believed or self._believe()
        below = max((n for n in known if n <= positions), default=None)
        above = min((n for n in known if n >= positions), default=None)
        if below is None or above is None:
            nearest = min(known) if below is None else below
            return _assumed(known[nearest], nearest, positions)
        if below == above:
            return known[below]
        share = (positions - below) / (above - below)
        return (1 - share) * known[below] + share * known[above]

    def _believe(self) -> dict[int, float]:
        """Seconds by number of positions. The assumption starts from the next fewer positions that were timed.

        Numbers of positions are timed at different moments, and machines have slow ones: a step never costs more than
        one over more positions that has been timed often enough to be trusted.
        """
        fewest = below = min(self._verify)
        believed = {fewest: median(seconds for _, seconds in self._verify[fewest])}
        for n in sorted(self._verify):
            recent = self._recent(n)
            if n != fewest and recent:
                votes = [_assumed(believed[below], below, n)] * (TRUSTED - len(recent))
                believed[n] = median([*recent, *votes])
                below = n
            if len(recent) >= TRUSTED:
                for fewer in believed:
                    believed[fewer] = min(believed[fewer], believed[n])
        return believed

    def padded(self, rows: int, n: int) -> int:
        """n, or so many more positions a row as were timed to make the whole step faster, or are to be tried."""
        own = self._trusted(rows * n)
        # which kernel takes how many is a matter of few positions, and trying is dear with many
        if own is None or rows * n > MOST_PADDED:
            return n
        tried = n + TRIED_PADDING
        if self._num_steps % TRY_EVERY == 0 and self._trusted(rows * tried) is None:
            return tried
        seconds = {m: self._trusted(rows * m) for m in range(n + 1, n + MOST_PADDING + 1)}
        known = {m: each for m, each in seconds.items() if each is not None}
        best = min(known, key=known.__getitem__, default=n)
        return best if known and known[best] < WORTH_PADDING * own else n

    def _trusted(self, positions: int) -> float | None:
        """The median of recent timings, None where these are too few."""
        recent = self._recent(positions)
        return median(recent) if len(recent) >= TRUSTED else None

    def _recent(self, positions: int) -> list[float]:
        timings = self._verify.get(positions, ())
        return [seconds for step, seconds in timings if self._num_steps - step < MEMORY]

    def is_stale(self, positions: int) -> bool:
        """Whether a step over so many positions was never timed, or long ago."""
        seen = self._last_seen.get(positions)
        return seen is None or self._num_steps - seen >= STALE

    def ratio(self, rows: int) -> float | None:
        """c: drafting one token over one plain target step."""
        return self.draft() / self.verify(rows) if self._draft and self._verify else None


class FixedLength:
    """The same draft length in every round."""

    def __init__(self, length: int) -> None:
        self.longest = length

    def open(self, row: int) -> None: ...

    def close(self, row: int) -> None: ...

    def allowance(self, row: int) -> int:
        return self.longest

    def keep_going(self, row: int, confidences: Sequence[float], rows: int, source: str = "") -> bool:
        return True

    def choose(
        self,
        row: int,
        confidences: Sequence[float],
        rows: int,
        free: bool,
        sampled: bool = False,
        source: str = "",
        beside: Sequence[Beside] = (),
    ) -> tuple[int, list[Beside]]:
        return len(confidences), []

    def learn(self, row: int, confidences: Sequence[float], matches: int, labels: int, source: str = "") -> None: ...

    def learn_beside(self, row: int, beside: Sequence[Beside], emitted: Sequence[int], source: str) -> None: ...

    def together(self, guesses: Sequence[tuple[int, Sequence[float], str]], ragged: bool) -> list[int]:
        """No bound but the length itself."""
        return [self.longest] * len(guesses)

    def padded(self, rows: int, n: int) -> int:
        """n: rounding depends on how many positions are read, and a fixed length is for repeatable runs."""
        return n


@dataclass
class _Trial:
    """How a drafter that costs something is doing in one row.

    ``pause``: rounds it still sits out; ``patience``: the least of the next pause. ``is_fresh``: its next draft is
    the first since the row was opened or since a pause. ``balance``: tokens gained over plain decoding, fading.
    """

    patience: int
    pause: int = 0
    is_fresh: bool = True
    balance: float = 0.0


class AdaptiveLength:
    """The length that promises the most tokens per second, per row; shared over the calls of one attached model.

    ``source`` names who drafted: the confidences of two drafters are not on one scale, so acceptance is learned for
    each. What a draft costs, and whether it pays, is asked of those that are not ``free``.
    """

    def __init__(self, longest: int, costs: Costs) -> None:
        self.longest = longest
        self.costs = costs
        # by source and kind
        self._shared: dict[tuple[str, type], Acceptance] = {}
        self._rows: dict[int, dict[tuple[str, type], Acceptance]] = {}
        self._trials: dict[int, _Trial] = {}
        # where a new row starts: what the last one that ended had come to
        self._patience = FIRST_PROBE

    def open(self, row: int) -> None:
        self._rows[row] = {}
        self._trials[row] = _Trial(self._patience)

    def close(self, row: int) -> None:
        self._rows.pop(row, None)
        trial = self._trials.pop(row, None)
        if trial is not None:
            self._patience = trial.patience

    def allowance(self, row: int) -> int:
        """How many tokens a drafter that is not free may propose this round; 0 while a losing one sits out."""
        trial = self._trials[row]
        if trial.pause > 0:
            trial.pause -= 1
            return 0
        if trial.is_fresh and not self.costs.at_once:
            self.costs.expect_catch_up()
        return self.longest

    def keep_going(self, row: int, confidences: Sequence[float], rows: int, source: str = "") -> bool:
        """Whether one more token is worth its drafting, judged before it is drafted by the last one's confidence."""
        if not confidences:
            return True
        if not self.costs.knows_draft:
            return False  # a drafter of unknown cost is given a try, and not a long one
        survival = self._estimate(row, source).survival([*confidences, confidences[-1]])
        done = len(confidences)
        return self._rate(survival, rows, drafted=done + 1) > self._rate(survival[:done], rows, drafted=done)

    def choose(
        self,
        row: int,
        confidences: Sequence[float],
        rows: int,
        free: bool,
        sampled: bool = False,
        source: str = "",
        beside: Sequence[Beside] = (),
    ) -> tuple[int, list[Beside]]:
        """How many of the drafted tokens to verify, and which ones beside them.

        Their drafting is paid for, only verification still costs. A token beside the guess's token i is the one with a
        chance of its own where the first i tokens survive, and nothing stands behind it.

        A ``sampled`` draft is verified whole or, for reasons that lie before it, not at all. Its tokens were drawn
        from q and are accepted as such; leaving out those that look bad would keep a sample that no longer follows q.
        """
        trial = self._trials[row]
        was_fresh, trial.is_fresh = trial.is_fresh, trial.is_fresh and (free or not confidences)
        if self.costs.is_stale(rows):
            return 0, []
        survival = self._estimate(row, source).survival(confidences)
        nodes: list[tuple[float, Beside | None]] = [(chance, None) for chance in survival]
        alive = [1.0, *survival]
        for each in beside:
            chance = self._estimate_beside(row, each.source or source).chance(each.confidence)
            nodes.append((alive[each.depth] * chance, each))
        # a token is never likelier than the one before it: the best are the guess's first ones, and some beside those
        nodes.sort(key=lambda node: -node[0])
        chances = [chance for chance, _ in nodes]
        rates = [self._rate(chances[:count], rows, drafted=0) for count in range(len(chances) + 1)]
        best = max(range(len(rates)), key=rates.__getitem__)
        kept = best if rates[best] >= LEAST_GAIN * rates[0] else 0
        if sampled:
            kept = len(confidences)
        # a fresh draft is not judged where what drafting costs is only known after the next one
        is_judged = not (free or not confidences or (was_fresh and not (self.costs.at_once and self.costs.knows_draft)))
        if is_judged and self._judge(trial, chances[:kept], rows, drafted=len(confidences)):
            # a failed try still verifies a token: without its outcome, the belief that made it fail could never change
            kept = max(kept, 1)
        chosen = [each for _, each in nodes[:kept] if each is not None]
        return kept - len(chosen), chosen

    def _judge(self, trial: _Trial, survival: Sequence[float], rows: int, drafted: int) -> bool:
        """Whether recent rounds would have been better without their drafts: then the drafter is paused."""
        steps = (self.costs.verify(rows * (1 + len(survival))) + self.costs.drafting(drafted)) / self.costs.verify(rows)
        trial.balance = BALANCE_FORGET * trial.balance + 1.0 + sum(survival) - steps
        if trial.balance >= 0:
            trial.patience = FIRST_PROBE
        if trial.balance >= -TOLERATED:
            return False
        lost = -trial.balance + self.costs.catch_up / self.costs.verify(rows)
        trial.pause = min(max(trial.patience, math.ceil(lost / MOST_LOSS)), LONGEST_PAUSE)
        trial.patience = min(2 * trial.patience, LAST_PROBE)
        trial.is_fresh, trial.balance = True, 0.0
        return True

    def learn(self, row: int, confidences: Sequence[float], matches: int, labels: int, source: str = "") -> None:
        """The first ``matches`` tokens came true, of ``labels`` whose outcome is known, trimmed ones included."""
        estimate = self._estimate(row, source)
        for index in range(min(matches + 1, labels)):
            estimate.observe(confidences[index], index < matches)
        if matches and self._trials[row].pause:
            self._trials[row].patience = FIRST_PROBE  # the try that was given up came true: ask again soon

    def learn_beside(self, row: int, beside: Sequence[Beside], emitted: Sequence[int], source: str) -> None:
        """Which of the tokens beside a guess were the ones, where the guess had survived up to there.

        ``emitted``: the row's next tokens as far as the guess before each of them came true, and one more.
        """
        for each in beside:
            if each.depth < len(emitted):
                estimate = self._estimate_beside(row, each.source or source)
                estimate.observe(each.confidence, each.token == emitted[each.depth])

    def together(self, guesses: Sequence[tuple[int, Sequence[float], str]], ragged: bool) -> list[int]:
        """How many drafted tokens of each row of a batch to verify at most.

        ``guesses``: row, confidences of what was trimmed already (none, where it drafted nothing), source; of all rows.
        ``ragged``: rows are read as far as their own guesses, and not all of them as far as the longest.
        """
        survivals = [self._estimate(row, source).survival(each) if each else [] for row, each, source in guesses]
        rows = len(guesses)
        if ragged:
            # a token is never likelier to come true than the one before it: the best of all are prefixes of each
            gained = sorted((chance for each in survivals for chance in each), reverse=True)
            best = self._best(rows, gained, 1)
            least = gained[best - 1] if best else 2.0
            return [sum(chance >= least for chance in each) for each in survivals]
        longest = max(map(len, survivals))
        gained = [sum(each[i] for each in survivals if i < len(each)) for i in range(longest)]
        return [self._best(rows, gained, rows)] * rows

    def _best(self, rows: int, gained: Sequence[float], positions: int) -> int:
        """How many steps of so many positions are worth it, where each brings the tokens ``gained``."""
        rates = [(rows + sum(gained[:n])) / self.costs.verify(rows + n * positions) for n in range(len(gained) + 1)]
        best = max(range(len(rates)), key=rates.__getitem__)
        return best if rates[best] >= LEAST_GAIN * rates[0] else 0

    def padded(self, rows: int, n: int) -> int:
        """How many positions of each row to read where n are needed."""
        return self.costs.padded(rows, n)

    def _estimate(self, row: int, source: str, kind: type[Acceptance] = Acceptance) -> Acceptance:
        of_row, key = self._rows[row], (source, kind)
        if key not in of_row:
            of_row[key] = kind(self._shared.setdefault(key, kind()))
        return of_row[key]

    def _estimate_beside(self, row: int, source: str) -> Acceptance:
        return self._estimate(row, source, AcceptanceBeside)

    def _rate(self, survival: Sequence[float], rows: int, drafted: int) -> float:
        """Expected tokens per second of a round that verifies ``len(survival)`` tokens after drafting ``drafted``."""
        seconds = self.costs.verify(rows * (1 + len(survival))) + self.costs.drafting(drafted)
        return (1.0 + sum(survival)) / seconds


def _bin(confidence: float) -> int:
    return min(int(confidence * NUM_BINS), NUM_BINS - 1)


def nearby(positions: int, rows: int) -> int:
    """The number of positions under which a step of so many, of so many rows, is timed."""
    return rows + math.ceil((positions - rows) / NEARBY) * NEARBY


def _assumed(seconds: float, positions: int, wanted: int) -> float:
    """What ``wanted`` positions cost if ``positions`` take ``seconds`` and each one more adds its assumed share."""
    return seconds * (1 + ASSUMED_COST_PER_POSITION * (wanted - 1)) / (1 + ASSUMED_COST_PER_POSITION * (positions - 1))
