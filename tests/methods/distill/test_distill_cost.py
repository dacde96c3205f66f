"""The cost model against simulation and by hand, the measurement with a clock of its own and once for real."""

from __future__ import annotations

import random

import pytest
import torch

from accel.errors import OptionError
from accel.methods.speculative.distill.cost import (
    Candidate,
    best_gamma,
    measure,
    measure_verify,
    paired_ratios,
    predicted_speedup,
    table,
    tokens_per_round,
    verify_cost,
)
from accel.methods.speculative.distill.student import Shape
from accel.models import cpu_linear
from accel.models.cpu_linear import Installed

SMALL, LARGE = Shape(1, 16, 2, 1, 24), Shape(2, 32, 4, 2, 48)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.3, 1), (0.7, 4), (0.9, 7)])
def test_tokens_of_a_round_as_simulated(alpha, gamma):
    chance = random.Random(0)
    total, rounds = 0, 40_000
    for _ in range(rounds):
        accepted = 0
        while accepted < gamma and chance.random() < alpha:
            accepted += 1
        total += accepted + 1
    assert tokens_per_round(alpha, gamma) == pytest.approx(total / rounds, rel=0.01)
    assert tokens_per_round(alpha, gamma) == pytest.approx((1 - alpha ** (gamma + 1)) / (1 - alpha))


def test_speedup_by_hand():
    assert predicted_speedup(0.5, 0.1, 1) == pytest.approx(1.5 / 1.1)
    assert predicted_speedup(0.5, 0.1, 1, verify=1.4) == pytest.approx(1.0)
    assert predicted_speedup(1.0, 0.0, 7) == 8
    assert predicted_speedup(0.0, 0.5, 2) == pytest.approx(0.5)
    assert predicted_speedup(0.8, 0.3, 0) == 1


def test_the_best_length_is_the_best():
    for alpha in (0.1, 0.5, 0.8, 0.95):
        for c in (0.02, 0.1, 0.4):
            speeds = [predicted_speedup(alpha, c, gamma) for gamma in range(17)]
            assert best_gamma(alpha, c) == speeds.index(max(speeds))


def test_the_best_length_at_the_ends():
    assert best_gamma(0.3, 0.5) == 0  # Leviathan et al. 2023, corollary 3.9: no gain unless α > c
    assert best_gamma(0.51, 0.5) == 1
    assert best_gamma(1.0, 0.1) == 16
    assert best_gamma(1.0, 0.1, longest=5) == 5
    assert best_gamma(0.0, 0.0) == 0


def test_a_dear_verification_shortens_drafts():
    free = best_gamma(0.8, 0.05)
    dear = best_gamma(0.8, 0.05, verify={3: 1.2, 7: 2.0, 15: 5.0})
    assert 0 < dear < free
    assert best_gamma(0.8, 0.05, verify={1: 9.0}) == 0


def test_verification_is_known_between_and_beyond_what_was_measured():
    known = {3: 1.3, 7: 2.1}
    assert [verify_cost(known, gamma) for gamma in (0, 3, 7, 16)] == [1.0, 1.3, 2.1, 2.1]
    assert verify_cost(known, 1) == pytest.approx(1.1)
    assert verify_cost(known, 5) == pytest.approx(1.7)
    assert verify_cost(None, 9) == verify_cost({}, 9) == 1


class Clock:
    """Time passes only where ``spend`` is called."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def spend(self, name, seconds):
        def step():
            self.log.append(name)
            self.now += seconds(len(self.log)) if callable(seconds) else seconds

        return step


def test_pairs_take_turns_and_the_first_does_not_count():
    clock = Clock()
    found = paired_ratios(
        clock.spend("draft", lambda n: 9.0 if n < 4 else 0.2), clock.spend("target", 2.0), 3, 2, clock
    )
    assert found == pytest.approx([0.1] * 3)
    assert clock.log == ["target", "draft", "draft"] * 4


def test_a_slow_moment_hits_both_sides_of_a_ratio():
    clock = Clock()

    def slower_each_turn(seconds):
        return lambda n: seconds * (1 + (n - 1) // 2)

    found = paired_ratios(
        clock.spend("draft", slower_each_turn(0.5)), clock.spend("target", slower_each_turn(2.0)), 5, 1, clock
    )
    assert found == pytest.approx([0.25] * 5)


def test_the_table_names_each_shape_with_its_best_length():
    cheap, dear = Candidate(SMALL, 3_500_000, 0.05, 0.04, 0.06), Candidate(LARGE, 8_000_000, 0.6, 0.5, 0.7)
    lines = table([cheap, dear], alphas=(0.5, 0.8)).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert "α=0.5" in lines[0] and "α=0.8" in lines[0] and "α=0.9" not in lines[0]
    gamma = best_gamma(0.8, 0.05)
    assert f"{predicted_speedup(0.8, 0.05, gamma):.2f}x @{gamma}" in lines[1]
    assert "1x16x2x1x24" in lines[1] and "3.50M" in lines[1] and "0.050 (0.040 to 0.060)" in lines[1]
    assert "1.00x @0" in lines[2]
    assert "1.00x @0" in table([cheap], verify=dict.fromkeys(range(1, 17), 20.0))
    assert "α=0.9" in table([cheap])


def test_a_real_measurement(tiny):
    target = tiny.build("llama", num_hidden_layers=12)
    before = {name: weight.clone() for name, weight in target.state_dict().items()}
    found = measure(target, [SMALL, LARGE], 33, context=12, repeat=5)
    assert [each.shape for each in found] == [SMALL, LARGE]
    assert found[0].parameters < found[1].parameters
    for each in found:
        assert 0 < each.c_p20 <= each.c <= each.c_p80
        # a sixth of the layers at most; no closer, because the machine may be shared
        assert each.c < 0.9
    assert all(torch.equal(weight, before[name]) for name, weight in target.state_dict().items())
    assert not any("forward" in module.__dict__ for module in target.modules())


def test_a_real_verification(tiny):
    found = measure_verify(tiny.build("llama"), (1, 7), context=12, repeat=3)
    assert list(found) == [1, 7] and all(0.2 < cost < 20 for cost in found.values())


def test_both_are_measured_with_the_layers_and_in_the_precision_that_they_decode_in(tiny, monkeypatch):
    installed = []

    def install(module, way="auto", may_round=False):
        installed.append((type(module).__name__, next(module.parameters()).dtype, may_round))
        return Installed((), {}, 0)

    monkeypatch.setattr(cpu_linear, "install", install)
    measure(tiny.build("llama").bfloat16(), [SMALL], 67, context=4, repeat=1)
    # the draft's are those of the lean pass
    assert installed == [("LlamaForCausalLM", torch.bfloat16, False), ("ModuleList", torch.float32, True)]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda t: predicted_speedup(1.1, 0.1, 3), "alpha=1.1"),
        (lambda t: predicted_speedup(0.5, 0.1, -1), "gamma=-1"),
        (lambda t: predicted_speedup(0.5, -0.1, 1), "c=-0.1"),
        (lambda t: predicted_speedup(0.5, 0.1, 1, verify=0), "verify=0"),
        (lambda t: best_gamma(0.5, 0.1, longest=-1), "longest=-1"),
        (lambda t: measure(t, [SMALL], 68), "vocabulary of 68: the target has 67"),
        (lambda t: measure(t, [SMALL], 67, repeat=0), "repeat=0"),
    ],
)
def test_refusals(tiny, call, says):
    with pytest.raises(OptionError, match=says):
        call(tiny.build("llama"))
