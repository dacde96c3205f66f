"""The deal: every seed gets another hand for one key."""

from __future__ import annotations

import pytest
from refusals import refusal

from accel.bench.dealing import SEEDS, check_draw, dealt


@pytest.mark.parametrize("sizes", [(SEEDS,), (39, 28, 12), (5, 5, 5, 4, 4, 4, 4, 3, 4)])
def test_no_two_seeds_get_one_hand(sizes):
    hands = [tuple(dealt(seed, "a key", sizes)) for seed in range(SEEDS)]
    assert len(set(hands)) == SEEDS
    assert all(0 <= digit < size for hand in hands for digit, size in zip(hand, sizes, strict=True))
    # every number comes up: the hands of a few seeds are not all alike in a digit
    assert all(len(set(digits)) > 1 for digits in zip(*hands[:20], strict=True))
    assert dealt(3, "another key", sizes) != list(hands[3]) == dealt(3, "a key", sizes)


def test_hands_that_are_too_few_are_not_dealt():
    with pytest.raises(AssertionError):
        dealt(0, "a key", (SEEDS - 1,))


def test_refusals():
    check_draw(5, SEEDS - 1, 5)
    for seed in (-1, SEEDS, 1.0, True):
        assert f"0..{SEEDS - 1}" in refusal(lambda seed=seed: check_draw(1, seed, 5))
    for count in (0, 6, "3"):
        assert "1..5" in refusal(lambda count=count: check_draw(count, 0, 5))
