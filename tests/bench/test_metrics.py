"""Every formula against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from accel.bench.metrics import (
    DraftCounts,
    describe,
    drafting,
    itl_ms,
    output_throughput,
    paired_difference,
    paired_ratio,
    paired_speedup,
    speedup_of_means,
    tpot_ms,
    wilson,
)


def test_tpot_leaves_out_the_first_token():
    # 2.0 s in all, 0.5 s to the first of 4 tokens: 1.5 s for the other three
    assert tpot_ms(2.0, 0.5, 4) == pytest.approx(500)
    assert tpot_ms(2.0, 2.0, 1) is None
    assert tpot_ms(2.0, 2.0, 0) is None


def test_itl_is_every_gap_between_chunks():
    assert itl_ms([0.5, 0.6, 0.9]) == pytest.approx([100, 300])
    assert itl_ms([0.5]) == itl_ms([]) == []


def test_throughput_is_all_tokens_over_all_time():
    # not the mean of 10/s and 30/s
    assert output_throughput([10, 30], [1.0, 1.0]) == pytest.approx(20)
    assert output_throughput([10, 30], [1.0, 3.0]) == pytest.approx(10)
    assert output_throughput([], []) == 0.0


def test_describe_has_vllms_keys():
    found = describe("ttft_ms", [1.0, 2.0, 6.0])
    assert found == {
        "mean_ttft_ms": pytest.approx(3),
        "median_ttft_ms": pytest.approx(2),
        "std_ttft_ms": pytest.approx((14 / 3) ** 0.5),
        "p99_ttft_ms": pytest.approx(2 + 0.98 * 4),
    }
    assert set(describe("itl_ms", []).values()) == {None}


def test_paired_ratio_is_per_token_and_within_a_repetition():
    # 10 tokens/s against 20, and 5 against 15: ratios 2 and 3
    assert paired_ratio([(10, 1.0), (10, 2.0)], [(20, 1.0), (15, 1.0)]) == pytest.approx(2.5)
    # the arm ended early but is exactly as fast
    assert paired_ratio([(10, 1.0)], [(5, 0.5)]) == pytest.approx(1)
    assert paired_ratio([(0, 1.0)], [(5, 0.5)]) is None
    assert paired_ratio([], []) is None


def test_paired_difference_draws_pairs_again():
    mine, theirs = [1, 1, 0, 1] * 25, [1, 0, 0, 1] * 25
    found = paired_difference(mine, theirs)
    # one prompt in four: a standard error of √(0.25 · 0.75 / 100)
    error = (0.25 * 0.75 / 100) ** 0.5
    assert found.mean == pytest.approx(0.25)
    assert (found.low, found.high) == pytest.approx((0.25 - 1.96 * error, 0.25 + 1.96 * error), abs=0.015)
    # a difference that every prompt has is certain, however much prompts differ
    same = paired_difference([3.0, 1.0, 7.0], [2.0, 0.0, 6.0])
    assert (same.mean, same.low, same.high) == (1, 1, 1)
    assert paired_difference(theirs, mine).low == -found.high


def test_paired_speedup_median_and_spread():
    found = paired_speedup([1.0, 2.0, 3.0, 4.0, 10.0])
    assert (found.median, found.prompts) == (3.0, 5)
    # linear interpolation: 20 % of the way over four gaps is 0.8 of the first
    assert found.p20 == pytest.approx(1.8)
    assert found.p80 == pytest.approx(4 + 0.2 * 6)
    assert 1.0 <= found.low < 3.0 < found.high <= 10.0
    assert paired_speedup([]) is None


def test_bootstrap_interval_is_reproducible_and_narrows_with_more_prompts():
    rng = np.random.default_rng(1)
    few, many = rng.normal(1.5, 0.2, 10).tolist(), rng.normal(1.5, 0.2, 1000).tolist()
    assert paired_speedup(few) == paired_speedup(few)
    narrow, wide = paired_speedup(many), paired_speedup(few)
    assert narrow.high - narrow.low < 0.3 * (wide.high - wide.low)
    # of a median of normals: 1.96 · σ · sqrt(π/2n) on either side
    assert narrow.high - narrow.low == pytest.approx(2 * 1.96 * 0.2 * (np.pi / 2000) ** 0.5, rel=0.35)
    one = paired_speedup([1.3])
    assert one.low == one.high == one.median == 1.3


def test_spec_benchs_ratio_of_means():
    assert speedup_of_means([10, 30], [30, 50]) == pytest.approx(2.0)
    assert speedup_of_means([], [1.0]) is None


def test_drafting_pools_counts_and_weights_costs():
    # 10 rounds, 30 drafted, 12 accepted; c weighted 20 : 10
    found = drafting([DraftCounts(6, 20, 9, 0.1), DraftCounts(4, 10, 3, 0.4)])
    assert found.tau == pytest.approx(2.2)
    assert found.acceptance == pytest.approx(0.4)
    assert found.gamma == pytest.approx(3)
    assert found.c == pytest.approx(0.2)
    assert found.predicted == pytest.approx(2.2 / 1.6)


def test_drafting_without_drafts_promises_nothing():
    plain = drafting([DraftCounts(10, 0, 0, None)])
    assert (plain.tau, plain.acceptance, plain.c, plain.predicted) == (1.0, None, None, None)
    assert drafting([]).tau is None
    unknown_cost = drafting([DraftCounts(10, 10, 5, None)])
    assert (unknown_cost.tau, unknown_cost.predicted) == (1.5, None)


def test_wilson_interval_covers_the_share_and_stays_a_share():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20
    assert wilson(81, 263) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    assert wilson(0, 20) == (0.0, pytest.approx(0.1611, abs=1e-4))
    assert wilson(20, 20) == (pytest.approx(1 - 0.1611, abs=1e-4), pytest.approx(1))
    for successes, trials in ((1, 0), (3, 2), (-1, 4)):
        with pytest.raises(ValueError, match="no such share"):
            wilson(successes, trials)
