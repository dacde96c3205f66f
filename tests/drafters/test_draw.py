"""Draws follow their distribution, never take what is impossible, and need one uniform."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from accel.drafters.draw import draw


@pytest.mark.parametrize("seed", [0, 1])
def test_draws_follow_their_distribution(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.2, 0.1, 0.0])
    counts = torch.zeros(7)
    for _ in range(4000):
        counts[draw(probabilities, generator)] += 1
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    assert chisquare(counts[possible], 4000 * probabilities[possible], sum_check=False).pvalue > 1e-3


def test_the_largest_uniform_stays_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, **how: torch.ones(1, dtype=torch.float64))
    assert draw(torch.tensor([0.3, 0.7, 0.0]), torch.Generator()) == 1


def test_a_draw_takes_one_uniform() -> None:
    one, other = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    draw(torch.full((50,), 0.02), one)
    torch.rand(1, dtype=torch.float64, generator=other)
    assert torch.equal(one.get_state(), other.get_state())
