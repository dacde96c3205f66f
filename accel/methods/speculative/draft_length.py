"""How many tokens to draft: from online acceptance and measured cost, per row. Knows no models and no tensors.

A round that verifies L drafted tokens costs V(1 + L) and brings 1 + Σ_{i ≤ L} S_i tokens in expectation, where S_i is
the chance that the first i drafted tokens are all accepted. The length that brings the most tokens per second is
chosen; 0, plain decoding, is one of the choices.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

# acceptance is learned per bin of the drafter's own confidence
NUM_BINS = 10
# weight, in observations, of the belief that confidence is already calibrated / that a row is like the other rows
PRIOR_WEIGHT = 4.0
ROW_PRIOR_WEIGHT = 8.0
# an observation's weight after n later ones is FORGET**n: text changes its mind
FORGET = 0.99
ROW_FORGET = 0.9
# cost of verifying one more position, as a share of one step, believed until it is measured
ASSUMED_COST_PER_POSITION = 0.03
# recent timings kept per number of positions
WINDOW = 15
# a gain that is predicted below this is not worth the risk of the prediction
LEAST_GAIN = 1.03
# rounds between tries of a drafter that was turned off: doubled after each try that fails
FIRST_PROBE, LAST_PROBE = 8, 128


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
        i = _bin(confidence)
        return (self._hits[i] + self._weight * prior) / (self._tries[i] + self._weight)

    def observe(self, confidence: float, accepted: bool) -> None:
        i = _bin(confidence)
        self._hits[i] = self._hits[i] * self._forget + accepted
        self._tries[i] = self._tries[i] * self._forget + 1.0
        if self._parent:
            self._parent.observe(confidence, accepted)

    def survival(self, confidences: Sequence[float]) -> list[float]:
        """S_1 … S_k for k drafted tokens."""
        survival, alive = [], 1.0
        for confidence in confidences:
            alive *= self.chance(confidence)
            survival.append(alive)
        return survival


class Costs:
    """Measured seconds of verifying n positions and of drafting one token; medians of recent timings."""

    def __init__(self) -> None:
        self._verify: dict[int, deque[float]] = {}
        self._draft: deque[float] = deque(maxlen=WINDOW)

    def observe_verify(self, positions: int, seconds: float) -> None:
        self._verify.setdefault(positions, deque(maxlen=WINDOW)).append(seconds)

    def observe_draft(self, tokens: int, seconds: float) -> None:
        if tokens:
            self._draft.append(seconds / tokens)

    def draft(self) -> float:
        """Seconds per drafted token; 0 until measured, so that an unknown drafter is given a try."""
        return median(self._draft) if self._draft else 0.0

    def verify(self, positions: int) -> float:
        """Seconds of one target step over n positions: measured, interpolated, or assumed to grow slowly."""
        if not self._verify:
            return 1.0 + ASSUMED_COST_PER_POSITION * (positions - 1)
        known = sorted(self._verify)
        below = max((n for n in known if n <= positions), default=None)
        above = min((n for n in known if n >= positions), default=None)
        if below is None:
            return self._measured(known[0]) / (1 + ASSUMED_COST_PER_POSITION * (known[0] - positions))
        if above is None:
            return self._measured(below) * (1 + ASSUMED_COST_PER_POSITION * (positions - below))
        if below == above:
            return self._measured(below)
        share = (positions - below) / (above - below)
        return (1 - share) * self._measured(below) + share * self._measured(above)

    def ratio(self, rows: int) -> float | None:
        """c: drafting one token over one plain target step."""
        return self.draft() / self.verify(rows) if self._draft and self._verify else None

    def _measured(self, positions: int) -> float:
        return median(self._verify[positions])


class FixedLength:
    """The same draft length in every round."""

    def __init__(self, length: int) -> None:
        self.length = length

    def open(self, row: int) -> None: ...

    def close(self, row: int) -> None: ...

    def allowance(self, row: int) -> int:
        return self.length

    def keep_going(self, row: int, confidences: Sequence[float], rows: int) -> bool:
        return True

    def trim(self, row: int, confidences: Sequence[float], rows: int, free: bool) -> int:
        return len(confidences)

    def learn(self, row: int, confidences: Sequence[float], matches: int, labels: int) -> None: ...


class AdaptiveLength:
    """The length that promises the most tokens per second, per row; shared over the calls of one attached model."""

    def __init__(self, longest: int, costs: Costs) -> None:
        self.longest = longest
        self.costs = costs
        self._shared = Acceptance()
        self._rows: dict[int, Acceptance] = {}
        # for drafters that cost something: rounds to sit out, and how long the next pause will be
        self._pause: dict[int, int] = {}
        self._next_pause: dict[int, int] = {}

    def open(self, row: int) -> None:
        self._rows[row] = Acceptance(self._shared)
        self._pause[row], self._next_pause[row] = 0, FIRST_PROBE

    def close(self, row: int) -> None:
        for table in (self._rows, self._pause, self._next_pause):
            table.pop(row, None)

    def allowance(self, row: int) -> int:
        """How many tokens the drafter may propose this round; 0 while a losing drafter sits out."""
        if self._pause[row] > 0:
            self._pause[row] -= 1
            return 0
        return self.longest

    def keep_going(self, row: int, confidences: Sequence[float], rows: int) -> bool:
        """Whether one more token is worth its drafting, judged before it is drafted by the last one's confidence."""
        survival = self._rows[row].survival([*confidences, confidences[-1]] if confidences else [0.8])
        done = len(confidences)
        now = self._rate(survival[:done], rows, drafted=done)
        return done == 0 or self._rate(survival, rows, drafted=done + 1) > now

    def trim(self, row: int, confidences: Sequence[float], rows: int, free: bool) -> int:
        """How many of the drafted tokens to verify: their drafting is paid for, only verification still costs."""
        survival = self._rows[row].survival(confidences)
        rates = [self._rate(survival[:length], rows, drafted=0) for length in range(len(survival) + 1)]
        best = max(range(len(rates)), key=rates.__getitem__)
        if not free:
            # would the round have been better without its draft? then pause, and probe again later
            spent = self._rate(survival[:best], rows, drafted=len(confidences))
            if spent < rates[0]:
                self._pause[row] = self._next_pause[row]
                self._next_pause[row] = min(2 * self._next_pause[row], LAST_PROBE)
            else:
                self._next_pause[row] = FIRST_PROBE
        return best if rates[best] >= LEAST_GAIN * rates[0] else 0

    def learn(self, row: int, confidences: Sequence[float], matches: int, labels: int) -> None:
        """The first ``matches`` tokens turned out right, of ``labels`` whose outcome is known, trimmed ones included."""
        estimate = self._rows[row]
        for index in range(min(matches + 1, labels)):
            estimate.observe(confidences[index], index < matches)

    def _rate(self, survival: Sequence[float], rows: int, drafted: int) -> float:
        """Expected tokens per second of a round that verifies ``len(survival)`` tokens after drafting ``drafted``."""
        seconds = self.costs.verify(rows * (1 + len(survival))) + drafted * self.costs.draft()
        return (1.0 + sum(survival)) / seconds


def _bin(confidence: float) -> int:
    return min(int(confidence * NUM_BINS), NUM_BINS - 1)
