"""The unmask reference against the definitions, computed another way, and the rules against the papers' loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from accel.kernels.unmask import Certainty, certainty, commit


def test_certainty_is_scipys():
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)) * 3
    got = certainty(logits)
    p = np.exp(logits.double().numpy())
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(got.entropy, stats.entropy(p, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(got.probability, p.max(-1), rtol=1e-5)
    assert got.token.tolist() == p.argmax(-1).tolist()


def test_certainty_of_known_distributions():
    logits = torch.tensor([[0.0, 0, 0, 0], [0, -torch.inf, 0, -torch.inf], [5, -torch.inf, -torch.inf, -torch.inf]])
    got = certainty(logits)
    assert got.token.tolist() == [0, 0, 0]
    torch.testing.assert_close(got.probability, torch.tensor([0.25, 0.5, 1.0]))
    torch.testing.assert_close(got.entropy, torch.tensor([math.log(4), math.log(2), 0.0]))


def test_a_forbidden_token_has_no_probability():
    got = certainty(torch.tensor([[0.0, 9.0, 0.0]]), forbidden=1)
    assert got.token.tolist() == [0]
    torch.testing.assert_close(got.probability, torch.tensor([0.5]))
    torch.testing.assert_close(got.entropy, torch.tensor([math.log(2)]))


def published_loop(doubt, masked, limit, strict):
    """The authors' loop over candidates sorted by certainty: always the first; stop at the first beyond the limit."""
    chosen = [[False] * len(row) for row in masked]
    for b, row in enumerate(masked):
        order = sorted((i for i, m in enumerate(row) if m), key=lambda i: (doubt[b][i], i))
        for place, i in enumerate(order):
            if place and not (doubt[b][i] < limit if strict else doubt[b][i] <= limit):
                break
            chosen[b][i] = True
    return chosen


# eighths: exact in fp32, so that values stand exactly at the threshold
EIGHTHS = st.integers(0, 8).map(lambda n: n / 8)


@given(
    figures=st.lists(st.tuples(EIGHTHS, st.booleans()), min_size=1, max_size=12),
    threshold=EIGHTHS,
    strict=st.booleans(),
    rule=st.sampled_from(["entropy", "confidence"]),
)
def test_threshold_rules_are_the_published_loop(figures, threshold, strict, rule):
    values = torch.tensor([[f[0] for f in figures]])
    masked = torch.tensor([[f[1] for f in figures]])
    nothing = torch.full_like(values, torch.nan)
    pair = (nothing, values) if rule == "entropy" else (values, nothing)
    got = commit(
        Certainty(torch.zeros_like(masked, dtype=torch.int64), *pair),
        masked,
        rule=rule,
        threshold=threshold,
        strict=strict,
    )
    sign = 1 if rule == "entropy" else -1
    assert got.tolist() == published_loop((sign * values).tolist(), masked.tolist(), sign * threshold, strict)


@given(figures=st.lists(st.tuples(EIGHTHS, st.booleans()), min_size=1, max_size=12), count=st.integers(0, 13))
def test_top_k_takes_the_most_certain_ones_lower_positions_first(figures, count):
    values = torch.tensor([[f[0] for f in figures]])
    masked = torch.tensor([[f[1] for f in figures]])
    certain = Certainty(torch.zeros_like(masked, dtype=torch.int64), values, -values)
    best = sorted((i for i, f in enumerate(figures) if f[1]), key=lambda i: (-figures[i][0], i))[:count]
    for rule in ("top_k", "top_k_entropy"):
        got = commit(certain, masked, rule=rule, count=torch.tensor([count]))
        assert got[0].nonzero()[:, 0].tolist() == sorted(best)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "entropi"}, "rule='entropi': choose one of entropy, confidence"),
        ({"threshold": None}, "rule='entropy' takes threshold"),
        ({"rule": "top_k"}, "rule='top_k' takes count"),
        ({"masked": torch.ones(2, 3)}, "masked is torch.float32"),
        ({"masked": torch.ones(2, 4, dtype=torch.bool)}, r"\[2, 4\] for certainty \[2, 3\]"),
    ],
)
def test_bad_input_is_refused_in_one_line(change, message):
    given = {"masked": torch.ones(2, 3, dtype=torch.bool), "rule": "entropy", "threshold": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        commit(certainty(torch.randn(2, 3, 5)), given.pop("masked"), **given)


def test_bad_logits_are_refused():
    with pytest.raises(ValueError, match="floating point"):
        certainty(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"forbidden=5: must be a token id in 0\.\.4"):
        certainty(torch.randn(2, 5), forbidden=5)
