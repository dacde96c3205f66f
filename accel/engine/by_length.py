"""Softmax or linear layers for a call, whichever answer sooner at its length: both are at hand, and timed here.

Which length is long enough depends on the machine and on how much is to be said: so nothing of it is read from an
artifact. A prompt is judged by the times of the largest power of two that it reaches, which is timed when the first
such prompt comes: that call takes three to five times as long. Below the smallest, softmax.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from accel.models.lean import target_for
from accel.models.linear import Conversion
from accel.models.softmax_target import SoftmaxTarget

# lengths that are timed: a shorter prompt is softmax's, a longer one is judged by the longest
SHORTEST, LONGEST = 256, 16384
# tokens read before the clock starts, and tokens decoded in a run
WARM, STEPS = 64, 4
# where one reads so many times as fast as the other, a second run would change nothing
CLEAR = 1.5


@dataclass(frozen=True)
class Times:
    """Seconds to read a prompt and to decode one token behind it."""

    read: float
    step: float

    def of(self, prompt: float, new: int) -> float:
        """Seconds for ``prompt`` times the prompt and ``new`` tokens."""
        return prompt * self.read + new * self.step

    def fastest(self, other: Times) -> Times:
        """The better of two runs, part by part."""
        return Times(min(self.read, other.read), min(self.step, other.step))


@dataclass(frozen=True)
class Point:
    """Both at one length."""

    length: int
    softmax: Times
    linear: Times

    def __str__(self) -> str:
        said = (f"{name} {each.read:.3g} s + {1e3 * each.step:.3g} ms a token" for name, each in self.pairs)
        return f"timed here at {self.length} tokens: {', '.join(said)}"

    @property
    def pairs(self) -> tuple[tuple[str, Times], tuple[str, Times]]:
        return ("softmax", self.softmax), ("linear", self.linear)


class ByLength:
    """The choice for one model whose ``conversion`` is installed. ``given``: linear from so many tokens on, untimed.

    Between calls the softmax layers stand in the model.
    """

    def __init__(self, conversion: Conversion, given: int | None = None) -> None:
        self.conversion, self.given = conversion, given
        self.linear = False
        self.reason = ""
        self._points: dict[tuple[int, torch.device], Point] = {}

    def choose(self, prompt: int, new: int) -> None:
        """Put the layers in that a call with the longest prompt ``prompt`` and at most ``new`` new tokens runs on."""
        try:
            self.linear, self.reason = self._choice(prompt, new)
        finally:
            self.conversion.use(linear=self.linear)

    def rest(self) -> None:
        """The call is over."""
        self.linear, self.reason = False, ""
        self.conversion.use(linear=False)

    def _choice(self, prompt: int, new: int) -> tuple[bool, str]:
        limit = target_for(self.conversion.model).max_positions
        if limit is not None and prompt > limit and self.conversion.is_whole:
            return True, f"the softmax model has {limit} positions"
        if self.given is not None:
            return prompt >= self.given, f"linear from {self.given} tokens on, as asked"
        if prompt < SHORTEST:
            return False, f"the prompt is shorter than {SHORTEST} tokens"
        point = self._timed(min(1 << (prompt.bit_length() - 1), LONGEST))
        # the rest of the prompt costs softmax more than its share: where that would decide, softmax is kept
        larger = prompt / point.length
        return point.linear.of(larger, new) < point.softmax.of(larger, new), str(point)

    def _timed(self, length: int) -> Point:
        key = (length, self.conversion.model.device)
        if key not in self._points:
            self._pair(WARM)
            softmax, linear = self._pair(length)
            if max(softmax.read, linear.read) < CLEAR * min(softmax.read, linear.read):
                again = self._pair(length)
                softmax, linear = softmax.fastest(again[0]), linear.fastest(again[1])
            self._points[key] = Point(length, softmax, linear)
        return self._points[key]

    def _pair(self, length: int) -> tuple[Times, Times]:
        """Softmax and linear, one run of each."""
        found = []
        for linear in (False, True):
            self.conversion.use(linear=linear)
            found.append(times(target_for(self.conversion.model), length))
        return found[0], found[1]


def times(target: SoftmaxTarget, length: int, clock: Callable[[], float] = time.perf_counter) -> Times:
    """Read and continue a prompt of any tokens; the target is as before."""
    tokens = torch.arange(length, device=target.device)[None] % target.vocab_size
    row = target.open()

    def read(piece: torch.Tensor) -> float:
        n = piece.shape[1]
        start = clock()
        logits = target.forward(piece, [row], keep=[n - 1], final=[n])
        target.commit([n], [row])
        int(logits[0, -1].argmax())  # waits for the device
        return clock() - start

    try:
        first = read(tokens)
        return Times(first, min(read(tokens[:, :1]) for _ in range(STEPS)))
    finally:
        target.close([row])
