"""Shares of tasks that never meet: what one seed deals for a key, no other seed deals for it.

Tasks of a benchmark and those that its demonstrations come from are drawn with different seeds. Chance alone would
almost keep them apart; a deal does, because a key's hands are numbered and every seed takes another number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from accel.errors import OptionError

# seeds 0..SEEDS - 1 share nothing
SEEDS = 100
# of the hands, from one seed to the next: the golden section, which comes near no simple fraction
STRIDE = (math.sqrt(5) - 1) / 2


def dealt(seed: int, key: str, sizes: Sequence[int]) -> list[int]:
    """A number below each of ``sizes``; for one key, no two seeds are dealt the same ones."""
    hands = math.prod(sizes)
    assert hands >= SEEDS, sizes
    # without a common divisor every hand comes up once before the first comes again
    stride = next(number for number in range(round(STRIDE * hands), hands) if math.gcd(number, hands) == 1)
    first = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    number, hand = (first + seed * stride) % hands, []
    for size in sizes:
        number, digit = divmod(number, size)
        hand.append(digit)
    return hand


def check_draw(count: int, seed: int, most: int) -> None:
    """Refuse a seed that might share tasks with another, and more tasks than there are different ones."""
    if type(seed) is not int or not 0 <= seed < SEEDS:
        raise OptionError(f"seed={seed!r}: must be a whole number in 0..{SEEDS - 1}, which share no task")
    if type(count) is not int or not 1 <= count <= most:
        raise OptionError(f"count={count!r}: must be a whole number in 1..{most}; take another seed for more")
