"""Acceptance against true rates, costs against numbers worked out by hand, and the length chosen against brute force.

What the policy is worth in tokens a second is tested in simulated decoding at the end.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest

from accel.drafters.base import Beside
from accel.methods.speculative import draft_length
from accel.methods.speculative.draft_length import (
    ASSUMED_COST_PER_POSITION,
    FIRST_PROBE,
    LAST_PROBE,
    LEAST_GAIN,
    MEMORY,
    MOST_PADDING,
    STALE,
    TRIED_PADDING,
    TRUSTED,
    TRY_EVERY,
    WINDOW,
    Acceptance,
    AcceptanceBeside,
    AdaptiveLength,
    Costs,
    FixedLength,
    nearby,
)


def trim(length: AdaptiveLength, row: int, confidences: Sequence[float], rows: int, free: bool) -> int:
    """How much of a guess is verified, where nothing stands beside it."""
    kept, beside = length.choose(row, confidences, rows, free)
    assert not beside
    return kept


# -- acceptance


def feed(estimate: Acceptance, confidence: float, rate: float, count: int, seed: int = 0) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        estimate.observe(confidence, rng.random() < rate)


def test_an_unobserved_acceptance_believes_the_confidence() -> None:
    assert Acceptance().chance(0.7) == pytest.approx(0.7)
    assert (Acceptance().chance(0.0), Acceptance().chance(1.0)) == (0.02, 0.98)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 1.0])
def test_acceptance_comes_to_the_true_rate_of_each_bin(rate: float) -> None:
    estimate = Acceptance()
    # the drafter is wrong about itself, and each of its confidences in another way
    feed(estimate, 0.95, rate, 2000)
    feed(estimate, 0.35, 1 - rate, 2000)
    # 100 effective observations: a standard error of at most 0.05
    assert estimate.chance(0.97) == pytest.approx(rate, abs=0.12)
    assert estimate.chance(0.31) == pytest.approx(1 - rate, abs=0.12)
    assert estimate.chance(0.55) == pytest.approx(0.55)


def test_a_row_differs_from_the_rows_it_learns_from() -> None:
    shared = Acceptance()
    good, bad, new = Acceptance(shared), Acceptance(shared), Acceptance(shared)
    for seed in range(200):
        feed(good, 0.5, 0.95, 1, seed)
        feed(bad, 0.5, 0.05, 1, seed + 1000)
    assert good.chance(0.5) > 0.65
    assert bad.chance(0.5) < 0.35
    assert new.chance(0.5) == shared.chance(0.5) == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("parent", [None, Acceptance()], ids=["shared", "row"])
def test_forgetting_follows_a_change(parent: Acceptance | None) -> None:
    estimate = Acceptance(parent)
    feed(estimate, 0.5, 1.0, 1000)
    assert estimate.chance(0.5) > 0.9
    feed(estimate, 0.5, 0.0, 250)
    assert estimate.chance(0.5) < 0.12


def test_survival_is_the_running_product() -> None:
    estimate = Acceptance()
    assert estimate.survival([0.5, 0.8, 0.1]) == pytest.approx([0.5, 0.4, 0.04])
    assert estimate.survival([]) == []


# -- costs


def test_costs_before_anything_was_measured() -> None:
    costs = Costs()
    assert costs.verify(5) == pytest.approx(1 + 4 * ASSUMED_COST_PER_POSITION)
    assert costs.draft() == 0.0
    assert not costs.knows_draft
    assert costs.ratio(1) is None


def test_costs_between_below_and_above_what_was_measured() -> None:
    costs = Costs()
    costs.observe_verify(4, 2.0)
    for _ in range(TRUSTED):
        costs.observe_verify(8, 3.0)
    per_position = ASSUMED_COST_PER_POSITION
    assert [costs.verify(n) for n in (4, 5, 6, 8)] == pytest.approx([2.0, 2.25, 2.5, 3.0])
    assert costs.verify(10) == pytest.approx(3.0 * (1 + 9 * per_position) / (1 + 7 * per_position))
    assert costs.verify(1) == pytest.approx(2.0 / (1 + 3 * per_position))


def test_what_is_drafted_at_once_costs_the_same_however_much_it_is() -> None:
    tokens, block = Costs(), Costs(at_once=True)
    for costs in (tokens, block):
        assert costs.drafting(4) == 0.0
        for _ in range(WINDOW):
            costs.observe_draft(4, 2.0)
            costs.observe_verify(1, 10.0)
    assert [tokens.drafting(n) for n in (0, 1, 8)] == [0.0, 0.5, 4.0]
    assert [block.drafting(n) for n in (0, 1, 8)] == [0.0, 2.0, 2.0]
    assert tokens.draft() == block.draft() == 0.5 and tokens.ratio(1) == block.ratio(1) == 0.05


def test_one_more_token_of_a_block_is_weighed_by_its_verification_alone() -> None:
    """Tokens of one doubtful confidence: dear ones stop the draft at once, those of a block that is paid do not."""

    def drafted(at_once: bool) -> int:
        length = AdaptiveLength(16, Costs(at_once))
        length.open(0)
        for _ in range(TRUSTED):
            length.costs.observe_draft(1, 6.0)
            for positions in range(1, 18):
                length.costs.observe_verify(positions, 10.0 + 0.1 * positions)
        confidences = [0.6]
        while len(confidences) < 16 and length.keep_going(0, confidences, 1):
            confidences.append(0.6)
        return len(confidences)

    assert drafted(at_once=False) < 3 < 6 < drafted(at_once=True)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_new_row_does_not_try_a_block_twice_before_it_gives_up(at_once: bool) -> None:
    """A draft that reads whole rows each time has nothing to catch up: its first one in a row tells what it costs."""
    length = AdaptiveLength(4, Costs(at_once))
    for _ in range(TRUSTED):
        length.costs.observe_draft(4, 40.0)
        length.costs.observe_verify(1, 10.0)
    length.open(0)
    tries = 0
    while length.allowance(0):
        tries += 1
        trim(length, 0, [0.9] * 4, 1, free=False)
        length.costs.observe_draft(4, 40.0)
    assert tries == (1 if at_once else 2)


def test_medians_resist_an_outlier_and_follow_a_change() -> None:
    costs = Costs()
    for seconds in (1.0, 50.0, 1.0, 1.1):
        costs.observe_verify(1, seconds)
        costs.observe_draft(2, 2 * seconds)
    assert costs.verify(1) == pytest.approx(1.05)
    assert costs.draft() == pytest.approx(1.05)
    assert costs.ratio(1) == pytest.approx(1.0)
    for _ in range(WINDOW):
        costs.observe_verify(1, 4.0)
    assert costs.verify(1) == 4.0


def test_a_step_is_padded_to_a_count_that_was_timed_to_be_faster(monkeypatch) -> None:
    monkeypatch.setattr(draft_length, "TRY_EVERY", 10**9)
    costs = Costs()
    for seconds, count in ((1.2, 2), (1.0, 4), (0.5, 2 + MOST_PADDING + 1)):
        for _ in range(TRUSTED):
            assert costs.padded(1, 2) == (4 if count > 4 else 2)  # not before both are trusted
            costs.observe_verify(count, seconds)
    assert costs.padded(1, 2) == 4
    assert costs.padded(2, 1) == 3  # 6 positions over two rows
    assert costs.padded(1, 4) == 6  # and what is out of reach of 2 is not of 4
    assert costs.padded(1, 1) == costs.padded(3, 1) == 1  # its own cost is unknown
    for _ in range(WINDOW):
        costs.observe_verify(4, 1.19)
    assert costs.padded(1, 2) == 2  # not worth it
    for _ in range(MEMORY):
        costs.observe_verify(1, 1.0)
    assert costs.padded(1, 4) == 4  # forgotten


@pytest.mark.parametrize(("longer", "settles"), [(0.9, 2 + TRIED_PADDING), (1.1, 2)])
def test_padding_is_tried_now_and_then_until_it_is_known(longer: float, settles: int) -> None:
    costs, read = Costs(), []
    for _ in range(60):
        read.append(costs.padded(1, 2))
        costs.observe_verify(read[-1], 1.0 if read[-1] == 2 else longer)
    tries = [step for step, n in enumerate(read) if n != 2][:TRUSTED]
    assert tries == [TRY_EVERY * (i + 1) for i in range(TRUSTED)]
    assert set(read[tries[-1] + 1 :]) == {settles}
    assert FixedLength(1).padded(1, 2) == 2
    assert AdaptiveLength(4, costs).padded(1, 2) == settles


def test_one_slow_moment_is_not_believed_and_a_slow_time_is_forgotten() -> None:
    costs = Costs()
    costs.observe_verify(1, 1.0)
    costs.observe_verify(5, 40.0)
    assert costs.verify(5) == pytest.approx(1 + 4 * ASSUMED_COST_PER_POSITION)
    for _ in range(TRUSTED):
        costs.observe_verify(5, 40.0)
    assert costs.verify(5) == 40.0
    for _ in range(MEMORY):
        costs.observe_verify(1, 1.0)
    assert costs.verify(5) == pytest.approx(1 + 4 * ASSUMED_COST_PER_POSITION)


def test_a_slow_moment_of_fewer_positions_does_not_stand_against_what_is_trusted() -> None:
    """A first step that was timed cold must not make every longer one look like a gain, or a loss."""
    costs = Costs()
    costs.observe_verify(1, 50.0)
    costs.observe_verify(3, 56.0)
    for _ in range(TRUSTED):
        costs.observe_verify(2, 40.0)
    assert costs.verify(1) == costs.verify(2) == 40.0
    # what one slow timing says is voted down by what the trusted one lets expect
    assert costs.verify(3) == pytest.approx(
        40.0 * (1 + 2 * ASSUMED_COST_PER_POSITION) / (1 + ASSUMED_COST_PER_POSITION)
    )


def test_a_draft_that_catches_up_is_not_a_timing_of_drafting() -> None:
    costs = Costs()
    costs.expect_catch_up()
    costs.observe_draft(1, 9.0)
    assert not costs.knows_draft
    assert costs.catch_up == 9.0
    costs.observe_draft(0, 5.0)  # a round in which nobody drafted
    costs.observe_draft(4, 2.0)
    assert costs.draft() == 0.5


def test_a_timing_grows_stale() -> None:
    costs = Costs()
    assert costs.is_stale(1)
    costs.observe_verify(1, 1.0)
    for _ in range(STALE - 1):
        costs.observe_verify(5, 1.0)
    assert not costs.is_stale(1)
    costs.observe_verify(5, 1.0)
    assert costs.is_stale(1)


# -- the choice of a length


def known_costs(slope: float = 0.05, draft: float = 0.0, longest: int = 40) -> Costs:
    """V(n) = 1 + slope · (n - 1) measured at every n, and the seconds of drafting a token."""
    costs = Costs()
    for _ in range(TRUSTED - 1):  # one vote for the assumption is left, and outvoted
        for n in range(1, longest + 1):
            costs.observe_verify(n, 1 + slope * (n - 1))
    costs.observe_draft(1, draft)
    return costs


def brute_force(chances: list[float], slope: float, rows: int = 1) -> int:
    """argmax over L of (1 + Σ_{i ≤ L} Π_{j ≤ i} chance_j) / V(rows · (1 + L)), or 0 where it gains too little."""
    rates = []
    for length in range(len(chances) + 1):
        tokens = 1.0
        for i in range(1, length + 1):
            product = 1.0
            for chance in chances[:i]:
                product *= chance
            tokens += product
        rates.append(tokens / (1 + slope * (rows * (1 + length) - 1)))
    best = rates.index(max(rates))
    return best if rates[best] >= LEAST_GAIN * rates[0] else 0


@pytest.mark.parametrize("slope", [0.0, 0.02, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_trim_is_the_argmax(slope: float, rows: int) -> None:
    rng = random.Random(1)
    chosen = set()
    for _ in range(40):
        confidences = [rng.uniform(0.02, 0.98) ** 0.5 for _ in range(rng.randrange(9))]
        length = AdaptiveLength(16, known_costs(slope))
        length.open(0)
        chosen.add(trim(length, 0, confidences, rows, free=True))
        assert trim(length, 0, confidences, rows, free=True) == brute_force(
            [min(c, 0.98) for c in confidences], slope, rows
        )
    assert len(chosen) > 1 or slope == 1.0


@pytest.mark.parametrize("slope", [0.0, 0.02, 0.1, 0.3])
def test_what_stands_beside_is_chosen_with_the_guess(slope: float) -> None:
    """Against all ways to choose: a prefix of the guess, and any tokens beside what it begins with."""
    rng = random.Random(2)
    sizes = set()
    for _ in range(40):
        confidences = [rng.uniform(0.1, 0.97) for _ in range(rng.randrange(1, 4))]
        beside = [Beside(d, 7, rng.uniform(0.02, 1 - c)) for d, c in enumerate(confidences) for _ in range(2)]
        length = AdaptiveLength(16, known_costs(slope))
        length.open(0)
        kept, chosen = length.choose(0, confidences, 1, free=True, beside=beside)
        alive = [1.0, *Acceptance().survival(confidences)]

        def rate(count: int, others: Sequence[Beside], alive: list[float] = alive, slope: float = slope) -> float:
            chances = [alive[each.depth] * max(each.confidence, 0.02) for each in others]
            return (1 + sum(alive[1 : count + 1]) + sum(chances)) / (1 + slope * (count + len(others)))

        ways = [
            (count, others)
            for count in range(len(confidences) + 1)
            for size in range(len(beside) + 1)
            for others in itertools.combinations(beside, size)
            if all(each.depth <= count for each in others)
        ]
        best = max(rate(*way) for way in ways)
        if best >= LEAST_GAIN * rate(0, ()):
            assert rate(kept, chosen) == pytest.approx(best)
        else:
            assert (kept, chosen) == (0, [])
        sizes.add((kept, len(chosen)))
    assert len(sizes) > 1


def test_tokens_beside_a_guess_have_an_acceptance_of_their_own() -> None:
    length = AdaptiveLength(16, known_costs(0.2))
    length.open(0)
    beside = [Beside(0, 5, 0.2), Beside(1, 6, 0.2), Beside(0, 9, 0.2, source="other")]
    for _ in range(300):
        # the guess's first token never comes true: the one beside it does, and what follows says nothing
        length.learn_beside(0, beside, [5], "lm")
    assert length._estimate_beside(0, "lm").chance(0.2) > 0.9 > 0.1 > length._estimate_beside(0, "other").chance(0.2)
    assert length._estimate(0, "lm").chance(0.2) == pytest.approx(0.2)
    assert length.choose(0, [0.1], 1, free=True, source="lm", beside=beside[:1]) == (0, beside[:1])
    # small confidences are told apart
    assert len({AcceptanceBeside.bin(each) for each in (0.005, 0.02, 0.05, 0.1, 0.2)}) == 5


def test_one_rows_draft_is_not_worth_a_whole_batch() -> None:
    """All rows are read as far as the longest guess: what one of them gains, all of them pay for."""
    costs = Costs()
    for positions in (1, 2, 3, 4, 5, 8, 12, 16, 32, 48, 64, 80):
        for _ in range(TRUSTED):
            # one position is dear, from 16 on each costs its share
            costs.observe_verify(positions, max(8.0, positions))
    length = AdaptiveLength(4, costs)
    for row in range(16):
        length.open(row)
    sure = [0.98] * 4

    def drafts(num_sure: int, rows: int, ragged: bool = False, confidences: Sequence[float] = sure) -> list[int]:
        guesses = [(row, confidences if row < num_sure else [], "") for row in range(rows)]
        return length.together(guesses, ragged=ragged)

    assert drafts(1, 1) == [4]
    assert drafts(1, 16) == [0] * 16
    # all sixteen are sure: twice the time for nearly twice the tokens is no gain, and none is taken
    assert drafts(16, 16) == [0] * 16
    assert drafts(4, 4) == [1] * 4
    assert drafts(0, 4) == [0] * 4
    assert FixedLength(3).together([(0, sure, "")] * 16, ragged=False) == [3] * 16


def test_rows_that_are_read_apart_are_drafted_for_apart() -> None:
    """A position costs the same in every row: those likeliest to come true are read, whoever's they are."""
    costs = Costs()
    for positions in range(16, 60):
        for _ in range(TRUSTED):
            costs.observe_verify(positions, 16 + 0.7 * (positions - 16))
    length = AdaptiveLength(4, costs)
    for row in range(16):
        length.open(row)
    guesses = [(0, [0.95, 0.95, 0.95, 0.2], ""), (1, [0.9, 0.3], ""), (2, [0.4, 0.98], ""), (3, [0.95], "")]
    rest = [(row, [], "") for row in range(4, 16)]
    assert length.together([*guesses, *rest], ragged=True) == [3, 1, 0, 1, *[0] * 12]
    assert length.together([(0, [0.95], ""), *((row, [], "") for row in range(1, 16))], ragged=True) == [0] * 16, "3 %"
    assert nearby(16, 16) == 16 and nearby(17, 16) == nearby(20, 16) == 20 and nearby(21, 16) == 24


def test_trim_says_plain_where_speculation_loses() -> None:
    length = AdaptiveLength(16, known_costs(slope=0.6))
    length.open(0)
    assert trim(length, 0, [0.5] * 8, 1, free=True) == 0
    assert trim(length, 0, [0.9] * 8, 1, free=True) > 0
    assert trim(length, 0, [], 1, free=True) == 0


def test_plain_steps_are_timed_first_and_again_from_time_to_time() -> None:
    costs = Costs()
    length = AdaptiveLength(16, costs)
    length.open(0)
    kept = []
    for _ in range(3 * STALE):
        kept.append(trim(length, 0, [0.95] * 4, 1, free=True))
        costs.observe_verify(1 + kept[-1], 1.0 + 0.01 * kept[-1])
    assert [i for i, k in enumerate(kept) if k == 0] == [0, STALE + 1, 2 * STALE + 2]


@pytest.mark.parametrize("draft", [0.05, 0.2, 0.6])
def test_drafting_stops_when_one_more_token_does_not_pay(draft: float) -> None:
    slope, chance = 0.05, 0.8
    length = AdaptiveLength(16, known_costs(slope, draft))
    length.open(0)
    done = 1
    while done < 16 and length.keep_going(0, [chance] * done, 1):
        done += 1

    def rate(k: int) -> float:
        return sum(chance**i for i in range(k + 1)) / (1 + slope * k + draft * k)

    assert done == max(range(1, 17), key=rate)


def test_an_unsure_token_ends_the_draft_and_an_unknown_cost_keeps_it_short() -> None:
    length = AdaptiveLength(16, known_costs(draft=0.1))
    length.open(0)
    assert length.keep_going(0, [], 1)
    assert length.keep_going(0, [0.9, 0.9], 1)
    assert not length.keep_going(0, [0.9, 0.1], 1)
    unknown = AdaptiveLength(16, Costs())
    unknown.open(0)
    assert not unknown.keep_going(0, [0.9], 1)


def test_a_fixed_length_is_kept() -> None:
    length = FixedLength(5)
    length.open(0)
    assert length.allowance(0) == 5
    assert length.keep_going(0, [0.01], 1)
    assert trim(length, 0, [0.01] * 5, 1, free=False) == 5
    length.learn(0, [0.01] * 5, 0, 5)
    assert length.allowance(0) == 5
    length.close(0)


# -- pauses


def play(length: AdaptiveLength, rounds: int, right: Callable[[int], bool], confidence: float = 0.6) -> list[int]:
    """One token is drafted in each round that allows it; returns those rounds."""
    drafted = []
    for i in range(rounds):
        if length.allowance(0):
            drafted.append(i)
            trim(length, 0, [confidence], 1, free=False)
            length.learn(0, [confidence], int(right(i)), 1)
            length.costs.observe_draft(1, length.costs.draft())
        else:
            trim(length, 0, [], 1, free=False)
        length.costs.observe_verify(1, 1.0)
    return drafted


def pauses(drafted: list[int]) -> list[int]:
    return [b - a - 1 for a, b in pairwise(drafted) if b - a > 1]


def test_a_losing_drafter_is_paused_for_twice_as_long_each_time() -> None:
    length = AdaptiveLength(16, known_costs(draft=0.07))
    length.open(0)
    waits = pauses(play(length, 2000, lambda _: False))
    # the first ones are as long as what was lost until then asks for
    assert FIRST_PROBE < waits[0] <= 3 * FIRST_PROBE
    assert waits[2:6] == [4 * FIRST_PROBE, 8 * FIRST_PROBE, LAST_PROBE, LAST_PROBE]


def test_a_drafter_that_loses_next_to_nothing_goes_on() -> None:
    length = AdaptiveLength(16, known_costs(draft=0.02))
    length.open(0)
    assert len(play(length, 500, lambda _: False)) == 500


def test_a_dear_drafter_is_paused_for_longer_than_a_cheap_one() -> None:
    shares = []
    for draft in (0.1, 0.5, 2.0):
        length = AdaptiveLength(16, known_costs(draft=draft))
        length.open(0)
        shares.append(draft * len(play(length, 3000, lambda _: False)) / 3000)
    # what is lost to probing, as a share of plain decoding; a try takes two rounds
    assert max(shares) < 0.025


def test_a_paused_drafter_comes_back_when_it_starts_to_win() -> None:
    length = AdaptiveLength(16, known_costs(draft=0.1))
    length.open(0)
    drafted = play(length, 1500, lambda i: i >= 500)
    assert len([i for i in drafted if 100 <= i < 500]) < 25
    assert len([i for i in drafted if i >= 1200]) > 290


def test_one_poor_guess_does_not_pause_a_winning_drafter() -> None:
    length = AdaptiveLength(16, known_costs(draft=0.1))
    length.open(0)
    for _ in range(10):
        assert length.allowance(0)
        trim(length, 0, [0.9, 0.9], 1, free=False)
    trim(length, 0, [0.05], 1, free=False)
    assert length.allowance(0)


def test_rounds_in_which_nothing_was_drafted_are_no_verdict() -> None:
    length = AdaptiveLength(16, known_costs(draft=0.1))
    length.open(0)
    for confidences in ([0.9], [0.9], *([[]] * 50), [0.05]):
        assert length.allowance(0)
        trim(length, 0, confidences, 1, free=False)
    assert length.allowance(0)


def test_a_failed_try_verifies_a_token_so_that_a_sampled_draft_teaches() -> None:
    length = AdaptiveLength(16, known_costs(draft=0.5))
    length.open(0)
    assert trim(length, 0, [0.05], 1, free=False) == 0
    assert trim(length, 0, [0.05], 1, free=False) == 1
    assert length.allowance(0) == 0


def test_a_free_drafter_is_never_paused() -> None:
    length = AdaptiveLength(16, known_costs(draft=0.5))
    length.open(0)
    for _ in range(50):
        assert length.allowance(0) == 16
        assert trim(length, 0, [0.03] * 4, 1, free=True) == 0


def test_a_new_row_starts_with_the_patience_of_the_last_one() -> None:
    length = AdaptiveLength(16, known_costs(draft=0.07))
    length.open(0)
    play(length, 200, lambda _: False)
    length.close(0)
    length.open(0)
    assert pauses(play(length, 200, lambda _: False))[0] > 4 * FIRST_PROBE


def test_rows_are_paused_on_their_own() -> None:
    length = AdaptiveLength(16, known_costs(draft=0.1))
    length.open(0)
    length.open(1)
    for _ in range(6):
        trim(length, 0, [0.03], 2, free=False)
        trim(length, 1, [0.97], 2, free=False)
    assert length.allowance(0) == 0
    assert length.allowance(1) == 16


# -- what the policy is worth


def decode(
    policy: AdaptiveLength | FixedLength,
    costs: Costs,
    acceptance: Callable[[int], float],
    draft: float,
    *,
    tokens: int = 2000,
    believed: float | None = None,
    slope: float = 0.06,
    sampled: bool = False,
    seed: int = 0,
) -> float:
    """Tokens per second of a simulated row; plain decoding makes 1. ``draft``: c; 0 is a free drafter.

    ``believed``: the drafter's confidence, its true acceptance if None. ``sampled``: trimmed tokens teach nothing.
    """
    rng = random.Random(seed)
    policy.open(0)
    made, seconds = 0, 0.0
    while made < tokens:
        rate = acceptance(made)
        confidences: list[float] = []
        most = policy.allowance(0)
        while len(confidences) < most and (draft == 0 or policy.keep_going(0, confidences, 1)):
            confidences.append(rate if believed is None else believed)
        length = trim(policy, 0, confidences, 1, free=draft == 0)
        right = 0
        while right < len(confidences) and rng.random() < rate:
            right += 1
        kept = min(right, length)
        labels = length if sampled else min(len(confidences), kept + 1)
        policy.learn(0, confidences, min(right, labels), labels)
        verifying, drafting = 1 + slope * length, draft * len(confidences)
        costs.observe_verify(1 + length, verifying)
        costs.observe_draft(len(confidences), drafting)
        made += 1 + kept
        seconds += verifying + drafting
    policy.close(0)
    return made / seconds


def adaptive(acceptance: float | Callable[[int], float], draft: float, **kwargs) -> float:
    costs = Costs()
    rule = acceptance if callable(acceptance) else lambda _: acceptance
    return decode(AdaptiveLength(16, costs), costs, rule, draft, **kwargs)


def best_fixed(rate: float, draft: float, slope: float = 0.06) -> float:
    return max(sum(rate**i for i in range(k + 1)) / (1 + slope * k + draft * k) for k in range(17))


def of_two_kinds(low: float, high: float, share: float, draft: float, slope: float, seed: int) -> float:
    """``decode`` where tokens are of two kinds and the drafter knows which; rows of 64 tokens, noisy timings."""
    rng = random.Random(seed)
    costs = Costs()
    policy = AdaptiveLength(16, costs)
    made, seconds, row = 0, 0.0, 0
    policy.open(row)
    while made < 3000:
        if made // 64 > row:
            policy.close(row)
            row = made // 64
            policy.open(row)
        confidences: list[float] = []
        most = policy.allowance(row)
        while len(confidences) < most and policy.keep_going(row, confidences, 1):
            confidences.append(high if rng.random() < share else low)
        length = trim(policy, row, confidences, 1, free=False)
        right = 0
        while right < len(confidences) and rng.random() < confidences[right]:
            right += 1
        kept = min(right, length)
        labels = min(len(confidences), kept + 1)
        policy.learn(row, confidences, min(right, labels), labels)
        verifying, drafting = 1 + slope * length, draft * len(confidences)
        costs.observe_verify(1 + length, verifying * rng.gauss(1, 0.1))
        costs.observe_draft(len(confidences), drafting * rng.gauss(1, 0.1))
        made += 1 + kept
        seconds += verifying + drafting
    policy.close(row)
    return made / seconds


@pytest.mark.parametrize("slope", [0.03, 0.06])
@pytest.mark.parametrize(("low", "high", "share"), [(0.08, 0.85, 0.2), (0.08, 0.85, 0.4), (0.05, 0.95, 0.6)])
def test_a_cheap_drafter_that_loses_most_rounds_and_wins_on_the_whole(
    low: float, high: float, share: float, slope: float
) -> None:
    rates = [of_two_kinds(low, high, share, 0.07, slope, seed) for seed in (0, 1)]
    # who knows nothing of the kinds drafts as if every token were of the mean
    mean = share * high + (1 - share) * low
    assert sum(rates) / 2 >= 0.97 * best_fixed(mean, 0.07, slope)


RATES = [0.0, 0.2, 0.4, 0.6, 0.8, 0.95]
DRAFTS = [0.0, 0.05, 0.3, 2.0]


@pytest.mark.parametrize("slope", [0.06, 0.25])
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("rate", RATES)
def test_adaptive_is_near_the_best_fixed_length_and_never_far_below_plain(
    rate: float, draft: float, slope: float
) -> None:
    # two seeds: the draws alone spread by about 2 %
    rates = [adaptive(rate, draft, slope=slope, seed=seed) for seed in (0, 1)]
    assert sum(rates) / 2 >= 0.95 * best_fixed(rate, draft, slope)
    assert min(rates) >= 0.97


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("sampled", [False, True])
def test_a_hopeless_drafter_that_believes_in_itself(draft: float, sampled: bool) -> None:
    assert adaptive(0.0, draft, believed=0.9, sampled=sampled and draft > 0) >= 0.97


@pytest.mark.parametrize("draft", [0.05, 0.15, 0.3])
def test_a_sampled_draft_that_is_better_than_it_says(draft: float) -> None:
    assert adaptive(0.85, draft, believed=0.15, sampled=True) >= 0.9 * best_fixed(0.85, draft)


@pytest.mark.parametrize("draft", [0.0, 0.05, 0.3])
def test_a_drafter_that_turns_good_half_way(draft: float) -> None:
    rate = adaptive(lambda made: 0.0 if made < 1500 else 0.9, draft, tokens=3000, believed=0.7)
    # the time of two halves, each at its best
    assert rate >= 0.88 * 2 / (1 + 1 / best_fixed(0.9, draft))


def test_a_fixed_length_can_lose() -> None:
    costs = Costs()
    assert decode(FixedLength(8), costs, lambda _: 0.2, 0.3) < 0.5
