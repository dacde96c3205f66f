"""When requests go out: the drawn gaps have the rate and the burstiness asked for, and no limit is overstepped."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
from refusals import refusal

from accel.bench.serving.load import arrivals, check_rate, drive
from accel.bench.serving.stream import Outcome


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_gaps_are_gamma_distributed_with_the_rate_asked_for(burstiness):
    count, rate = 20_000, 5.0
    times = arrivals(count, rate, burstiness, seed=1)
    gaps = np.diff([0.0, *times])
    assert times[-1] == pytest.approx(count / rate)
    assert gaps.min() >= 0
    # a gamma distribution's deviation over its mean is 1/√shape; at 20,000 draws it is known to about 1 in 50
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.04)
    if burstiness == 1.0:
        # a Poisson process: as many arrivals in each second as their variance says, and no memory
        counts = np.bincount(np.asarray(times[:-1], int))[:-1]
        assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.1)
        assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03


def test_seeds_decide_and_infinities_are_even():
    assert arrivals(50, 2.0, seed=3) == arrivals(50, 2.0, seed=3) != arrivals(50, 2.0, seed=4)
    assert arrivals(3, float("inf")) == [0.0, 0.0, 0.0]
    assert arrivals(4, 2.0, float("inf")) == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_no_load_is_refused():
    assert "request_rate=0" in refusal(lambda: check_rate(0, 1, None))
    assert "request_rate=nan" in refusal(lambda: check_rate(float("nan"), 1, None))
    assert "burstiness=-1" in refusal(lambda: check_rate(1, -1, None))
    assert "max_concurrency=0" in refusal(lambda: check_rate(1, 1, 0))


class Asked:
    """Answers after ``seconds``; knows how many were under way at once, and when each began."""

    def __init__(self, seconds):
        self.seconds, self.running, self.most, self.began = seconds, 0, 0, []

    async def __call__(self, prompt):
        outcome = Outcome(started=time.perf_counter(), text=prompt)
        self.began.append(outcome.started)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self.seconds)
        self.running -= 1
        return outcome


def test_the_limit_holds_and_waiting_for_it_is_counted():
    asked = Asked(0.05)
    prompts = [str(number) for number in range(9)]
    outcomes, duration = asyncio.run(drive(asked, prompts, [0.0] * 9, max_concurrency=3))
    assert asked.most == 3
    assert 0.15 <= duration < 1.0
    assert [each.text for each in outcomes] == prompts
    assert outcomes[0].queued < 0.04 and outcomes[8].queued >= 0.095


def test_without_a_limit_requests_go_out_at_their_times():
    asked = Asked(0.2)
    times = [0.0, 0.1, 0.1, 0.3]
    heard = []
    asyncio.run(drive(asked, ["x"] * 4, times, told=heard.append))
    assert asked.most == 3 and len(heard) == 4
    late = [began - asked.began[0] - at for began, at in zip(asked.began, times, strict=True)]
    assert min(late) > -0.01 and max(late) < 0.1


def test_a_failure_of_ours_ends_the_others():
    async def broken(prompt):
        if prompt == "bad":
            raise ZeroDivisionError
        await asyncio.sleep(60)

    async def timed():
        began = time.perf_counter()
        with pytest.raises(ZeroDivisionError):
            await drive(broken, ["good", "bad"], [0.0, 0.0])
        return time.perf_counter() - began

    assert asyncio.run(timed()) < 5
