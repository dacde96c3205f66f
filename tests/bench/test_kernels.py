"""The kernels' benchmark: floors from known bytes, no figure without a green check, peers named, time kept, JSON.

Cases here are made of cheap callables; the real families run once, on a CPU's shapes, against their references.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from accel.bench.kernels import ceilings, families, peers, report, sampling, suite, timing, verify
from accel.bench.kernels.cases import Case, Check, Goal, Peer, Ready, close, equal
from accel.bench.kernels.ceilings import Ceilings
from accel.bench.kernels.timing import Clock, Times
from accel.cli.main import main
from accel.errors import OptionError
from accel.kernels.verify import reference as verify_reference

CPU = torch.device("cpu")
# 100 GB/s, 1 TFLOP/s
LIMITS = Ceilings(copy_gb_s=100.0, matmul_tflop_s=1.0, matmul_dtype="fp32", launch_ms=0.001)
GREEN = Check("output", 0.0, 1e-5)
RED = Check("output", 0.5, 1e-5)


def make(run: Callable[[], Any] = lambda: None, checks: tuple[Check, ...] = (GREEN,), **changes: Any) -> Case:
    peers = changes.pop("peers", {})
    fields: dict[str, Any] = {
        "family": "unmask",
        "name": "a case",
        "shape": {"N": 1},
        "dtype": "fp32",
        "bytes": 2_000_000,
        "flops": 0,
        "prepare": lambda: Ready(run, lambda: checks, peers),
    }
    return Case(**fields | changes)


@pytest.fixture
def clock() -> Clock:
    return Clock(CPU, seconds=0.001, flush_bytes=1024)


def measure(clock: Clock, *cases: Case, **options: Any) -> dict[str, Any]:
    document = suite.measure(cases, clock, limits=LIMITS, **options)
    # strict: NaN and infinity are no JSON
    return json.loads(report.dump(document), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def test_floor_is_the_longer_of_traffic_and_products():
    assert LIMITS.floor_ms(2_000_000, 0) == pytest.approx(0.02)
    assert LIMITS.floor_ms(2_000_000, 3_000_000_000) == pytest.approx(3.0)
    assert [LIMITS.bound(2_000_000, 0), LIMITS.bound(2, 3_000_000_000), LIMITS.bound(2, 2)] == [
        "copy",
        "matmul",
        "launch",
    ]


def test_share_is_floor_over_median(clock, monkeypatch):
    monkeypatch.setattr(clock, "race", lambda runs: {name: Times([0.04, 0.05, 0.02]) for name in runs})
    row = suite.measure_case(make(), clock, LIMITS)
    assert row["status"] == "ok"
    assert row["floor_ms"] == pytest.approx(0.02)
    assert row["median_ms"] == 0.04
    assert row["share"] == pytest.approx(0.5)


def test_ceilings_are_what_copies_and_products_take(clock, monkeypatch):
    taken = iter([1.0, 0.002, 4.0])  # copy, launch, matmul
    monkeypatch.setattr(clock, "race", lambda runs: {"": Times([next(taken)])})
    found = ceilings.measure(clock, sizes=(4_000_000, 64))
    # read and written
    assert found.copy_gb_s == pytest.approx(8.0)
    assert found.matmul_tflop_s == pytest.approx(2 * 64**3 / 4e-3 / 1e12)
    assert found.launch_ms == 0.002


@pytest.mark.parametrize("checks", [(RED,), (GREEN, RED), (Check("output", None, 1e-5),), ()])
def test_a_red_check_gives_no_figure(clock, checks):
    (row,) = measure(clock, make(checks=checks))["cases"]
    assert row["status"] == "red"
    assert row["reason"]
    assert not {"median_ms", "share", "goals", "peers"} & set(row)


@pytest.mark.parametrize("where", ["prepare", "run"])
def test_a_case_that_fails_is_named_and_the_next_one_follows(clock, where):
    def fail() -> Any:
        raise RuntimeError("out of\nluck")

    bad = make(prepare=fail) if where == "prepare" else make(run=fail)
    first, second = measure(clock, bad, make())["cases"]
    assert (first["status"], first["reason"]) == ("failed", "RuntimeError: out of")
    assert second["status"] == "ok"


def test_peers_are_timed_or_named_with_their_reason(clock):
    def refuse() -> None:
        raise ValueError("no kernel for this shape")

    found = {
        "fine": Peer(lambda: torch.ones(1), agrees=lambda out: close("output", out, torch.ones(1), 1e-5)),
        "absent": peers.imported("a_package_that_nobody_has", "function", lambda f: f),
        "imported": peers.imported("math", "sqrt", lambda f: lambda: f(4.0)),
        "refusing": Peer(refuse),
        "wrong": Peer(lambda: torch.zeros(1), agrees=lambda out: close("output", out, torch.ones(1), 1e-5)),
    }
    document = measure(clock, make(peers=found))
    told = document["cases"][0]["peers"]
    assert told["imported"]["median_ms"] > 0
    assert set(told["fine"]) == {"median_ms", "p20_ms", "p80_ms", "ratio", "ratio_p20", "ratio_p80"}
    assert "a_package_that_nobody_has" in told["absent"]["reason"]
    assert told["refusing"]["reason"] == "ValueError: no kernel for this shape"
    assert told["wrong"]["reason"] == "its output differs from ours by 1"
    table = report.terminal(document)
    assert "absent, 1 cases: cannot import a_package_that_nobody_has" in table


def test_time_budget_ends_the_run_with_the_rest_named(clock):
    now = iter(range(100))
    budget = suite.Budget(1.5, clock=lambda: next(now))
    cases = [make(name=str(i)) for i in range(4)]
    saved = []
    rows = measure(clock, *cases, budget=budget, save=saved.append)["cases"]
    assert [row["status"] for row in rows] == ["ok", "ok", "skipped", "skipped"]
    assert rows[3]["reason"] == "the suite's 1.5 s were spent before its turn"
    # after each case, and whole at the end
    assert [(len(part["cases"]), part["complete"]) for part in saved] == [(1, False), (2, False), (4, True)]


def test_repetitions_are_bounded_by_time_and_contestants_take_turns():
    calls = []
    clock = Clock(CPU, seconds=0.0, flush_bytes=1024)
    times = clock.race({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert len(times["a"].ms) == len(times["b"].ms) == timing.LEAST
    assert calls[2:8] == ["a", "b", "b", "a", "a", "b"]


class FakeEvent:
    """Stands in for torch.cuda.Event where there is no GPU."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1000 * (end.at - self.at)


@pytest.fixture
def gpu_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that goes a GPU's way, events and all, on a CPU."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    clock = Clock(CPU, seconds=0.001, flush_bytes=1024)
    clock.on_gpu = True
    return clock


def test_a_gpu_is_timed_by_events_and_its_goals_are_judged(gpu_clock):
    case = make(lambda: time.sleep(0.002), goals=(Goal(share=0.5), Goal(peer="sleeper"), Goal(peer="other")))
    sleeper = {"sleeper": Peer(lambda: time.sleep(0.006))}
    case = replace(case, prepare=lambda: Ready(lambda: time.sleep(0.002), lambda: [GREEN], sleeper))
    (row,) = measure(gpu_clock, case)["cases"]
    assert row["status"] == "ok", row
    assert row["median_ms"] >= 2
    # what the host took to queue the call: all of it, where there is no device
    assert row["host_ms"] >= 2
    assert row["peers"]["sleeper"]["ratio"] > 1
    assert [goal["verdict"] for goal in row["goals"]] == ["not met", "met", "open"]


def test_work_is_queued_ahead_of_a_call_that_takes_the_host_long(gpu_clock, monkeypatch):
    flushes = []
    monkeypatch.setattr(gpu_clock, "_flush", lambda: flushes.append(1))
    gpu_clock._flush_ms = 1.0
    gpu_clock._once(lambda: None, 2.5)
    assert len(flushes) == 4


def test_ratios_are_paired():
    ratios = Times([2.0, 20.0, 4.0]).ratio_to(Times([1.0, 10.0, 1.0]))
    assert ratios["ratio"] == 2.0
    assert 2.0 <= ratios["ratio_p20"] <= ratios["ratio_p80"] <= 4.0


def test_goals():
    share, peer = Goal(share=0.8), Goal(peer="sdpa", ratio=2.0)
    assert [share.verdict(s, {}) for s in (0.8, 0.79)] == ["met", "not met"]
    # every variant of the peer counts
    assert peer.verdict(0, {"sdpa": 3.0, "sdpa folded": 2.0}) == "met"
    assert peer.verdict(0, {"sdpa": 3.0, "sdpa folded": 1.9}) == "not met"
    assert peer.verdict(0, {"flash-attn": 9.0}) == "open"


def test_goals_stay_open_on_a_cpu(clock):
    document = measure(clock, make(goals=(Goal(share=0.0),)))
    assert document["cases"][0]["goals"] == [{"goal": "share ≥ 0.00", "verdict": "open"}]
    assert document["goals"]["unmask"] == {"met": 0, "not met": 0, "open": 1, "no figure": 0}


def test_checks_see_wrong_results():
    x = torch.randn(100)
    assert close("x", x, x, 1e-5).ok
    assert not close("x", x + 1e-3, x, 1e-5).ok
    assert not close("x", torch.full_like(x, torch.nan), x, 1e-5).ok
    assert not close("x", torch.zeros_like(x), x, 1e-2).ok
    i = torch.arange(100)
    assert equal("i", i, i).ok
    assert not equal("i", i, i.flip(0), 0.05).ok
    with pytest.raises(ValueError, match="shape"):
        close("x", x[:1], x, 1e-5)


def test_traffic_of_known_shapes():
    """Counted by hand, for the shapes of a GPU: nothing is allocated before a case's turn."""
    found = {case.name: case for family in families.FAMILIES for case in families.gather([family], CPU, quick=False)}
    V = 128_256
    greedy = found["greedy, R 64, K 5, V 128,256"]
    assert greedy.bytes == pytest.approx(64 * 6 * V * 4, rel=1e-3)
    # the row of q at the refused token
    assert found["p/q by token, R 64, K 5, V 128,256"].bytes - greedy.bytes == 64 * V * 4
    assert found["certainty, 256 positions, V 126,464"].bytes == 256 * 126_464 * 4 + 256 * 16
    # each segment once, however many rows read it: fp32 here, keys and values
    decode = found["decode 32/8/128, R 16, own 128 + 1 shared segment of 4,096"]
    assert decode.bytes == 4 * (2 * 8 * 128 * (16 * 128 + 4_096) + 2 * 16 * 32 * 128)
    assert found["prefill 32/8/128, 4,096 positions"].flops == 2 * 4_096**2 * 32 * 128
    assert len({(case.family, case.name, case.dtype) for case in found.values()}) == len(found)


def test_ranks_order_the_cases():
    ranks = [case.rank for case in families.gather(families.FAMILIES, CPU, quick=False)]
    assert ranks == sorted(ranks)
    assert ranks[0] == 0


@pytest.mark.parametrize(("given", "expected"), [(None, families.FAMILIES), ("unmask, verify", ("verify", "unmask"))])
def test_families_are_chosen_by_name(given, expected):
    assert families.choose(given) == expected


@pytest.mark.parametrize("given", ["attention", "unmask,attention", ","])
def test_an_unknown_family_is_refused(given):
    with pytest.raises(OptionError, match="choose from verify, sampling"):
        families.choose(given)


@pytest.mark.parametrize("mode", ["token", "certain", "greedy"])
def test_the_torch_peer_of_verify_keeps_the_same_tokens(mode):
    """Same lengths as the reference for the same uniforms; its draws have their own randomness."""
    given, named = verify._inputs(CPU, mode, 64, 512)
    n_accepted, token = verify.torch_verify(*given, **named)
    expected = verify_reference.verify(*given, **named)
    assert torch.equal(n_accepted, expected.n_accepted)
    assert 0 < n_accepted.float().mean() < verify.K
    if mode == "greedy":
        assert torch.equal(token, expected.next_token)
    else:
        at = given[1].gather(1, n_accepted.clamp(max=verify.K - 1)[:, None])[:, 0]
        # a certain guess that was refused is not drawn again
        assert mode == "token" or not (token == at)[n_accepted < verify.K].any()


def test_the_torch_peer_of_sampling_filters_as_asked():
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    token, log_p = sampling.torch_sample(logits, temperature=0.8, top_k=3)
    ranks = (logits > logits.gather(1, token[:, None])).sum(-1)
    assert ranks.max() == 2
    assert (log_p <= 0).all()
    assert torch.equal(sampling.torch_sample(logits, temperature=1.0, top_p=1e-6)[0], logits.argmax(-1))
    assert torch.equal(sampling.torch_sample(logits, temperature=1.0, min_p=1.0)[0], logits.argmax(-1))


def test_cli_measures_a_family_and_saves_it(tmp_path):
    path = tmp_path / "kernels.json"
    words = ["bench", "--suite", "kernels", "--arms", "unmask", "--device", "cpu", "--output", str(path), "--json"]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert json.loads(path.read_text()) == document
    assert document["complete"]
    assert {row["family"] for row in document["cases"]} == {"unmask"}
    assert all(row["status"] == "ok" and row["share"] > 0 for row in document["cases"]), document["cases"]
    assert document["ceilings"]["copy_gb_s"] > 0
    assert {"torch", "triton", "commit", "cpu"} <= set(document["environment"])


def test_cli_refuses_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = CliRunner().invoke(main, ["bench", "--suite", "kernels", "--device", "cuda"])
    assert result.exit_code
    assert "torch sees 0 CUDA devices" in result.output


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_case_of_a_family_agrees_with_its_reference(family, clock):
    """Inputs, checks and peers of the real cases, on a CPU's shapes."""
    for case in families.gather([family], CPU, quick=True):
        row = suite.measure_case(case, clock, LIMITS)
        assert row["status"] == "ok", row
        here = {name: peer for name, peer in row["peers"].items() if not name.startswith(("flash-attn", "fla "))}
        assert all("ratio" in peer or "plain implementation" in peer["reason"] for peer in here.values()), here
