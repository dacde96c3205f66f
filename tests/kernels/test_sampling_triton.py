"""The sampling kernels against their reference: interpreted without a GPU, compiled with one."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, assert_close, assert_equal, random
from scipy import stats

from accel.kernels.sampling import Settings, reference
from accel.kernels.sampling import triton as kernels

pytestmark = pytest.mark.kernel
INF = torch.inf


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """What a kernel does not write is NaN or a number that stands out."""
    monkeypatch.setattr(torch, "empty", poisoned)


def poisoned(*shape, dtype=torch.float32, device=None):
    return torch.full(shape, torch.nan if dtype.is_floating_point else -77, dtype=dtype, device=device)


def rand(R, seed=1):
    return torch.rand(R, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def check(module, logits=None, u=None, top=0, of="processed", counted=False, **settings):
    """Tokens equal, log-probabilities close."""
    logits = random(3, 300, scale=3) if logits is None else logits
    u = rand(len(logits)) if u is None else torch.tensor(u, dtype=torch.float64, device=DEVICE)
    counts = None
    if counted:
        generator = torch.Generator().manual_seed(4)
        counts = torch.randint(-3, 4, logits.shape, generator=generator).clamp(min=0).to(DEVICE, torch.int32)
    settings = Settings(**settings)
    arguments = {"counts": counts, "uniforms": u, "top_logprobs": top, "logprobs_of": of}
    got = module.sample(logits, settings, **arguments)
    expected = reference.sample(logits, settings, **arguments)
    assert_equal(got.token, expected.token, "token")
    # a probability near 1 has a log-probability near 0, where fp32 keeps 1e-7 of the probability
    assert_close(got.logprob.exp(), expected.logprob.exp(), what="probability")
    assert_equal(got.top_tokens, expected.top_tokens, "top tokens")
    assert_close(got.top_logprobs, expected.top_logprobs, what="top log-probabilities")


CASES = [
    {},
    {"temperature": 0},
    {"temperature": 0.7},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.3, "top_p": 0.95, "min_p": 0.05},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 4097)], ids=str)
def test_sample(shape, settings):
    check(kernels, random(*shape, scale=3), top=min(5, shape[1]), **settings)


@pytest.mark.parametrize("settings", [{"temperature": 0.8}, {"temperature": 0.7, "top_k": 20, "top_p": 0.8}], ids=str)
@pytest.mark.parametrize("shape", [(2, 4095), (2, 8192), (1, 49152), (1, 151936)], ids=str)
def test_sample_from_real_vocabularies(shape, settings):
    check(kernels, random(*shape, scale=5), **settings)


def test_penalties():
    for settings in ({"temperature": 0.0}, {"top_k": 9, "top_p": 0.9}):
        penalties = {"repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": -0.2}
        check(kernels, random(2, 4500, scale=3), counted=True, top=3, **penalties, **settings)


def test_raw_log_probabilities():
    check(kernels, random(2, 4500, scale=3), of="raw", top=4, counted=True, presence_penalty=3.0, top_k=5)


def test_rows_have_their_own_settings():
    rows = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 1.0, 2.0, 1e-9]),
        "top_k": torch.tensor([3, 0, 3, 0, 0, 400]),
        "top_p": torch.tensor([0.9, 0.4, 1.0, 1.0, 1.0, 0.5]),
        "min_p": torch.tensor([0.0, 0.0, 0.0, 0.3, 0.0, 0.0]),
    }
    check(kernels, random(6, 300, scale=3), top=3, **{name: column.to(DEVICE) for name, column in rows.items()})


def test_a_list_that_cannot_hold_the_candidates_is_not_needed():
    flat = random(1, 9000, scale=0.3)
    check(kernels, flat, top_p=0.99)
    check(kernels, flat, temperature=3.0, top_k=8500, top_p=0.9)
    check(kernels, flat, min_p=1e-4)


def test_ties_and_cut_off_logits():
    ties = (random(3, 300) * 2).round() / 2
    ties[0] = 0
    ties[1, ::2] = -INF
    ties[2, 50:] = -INF
    for settings in ({"top_k": 20}, {"top_k": 250, "top_p": 0.7}, {"top_p": 0.3}, {"min_p": 0.5}, {"top_p": 0.0}):
        check(kernels, ties, top=4, **settings)


def test_saturated_logits():
    logits = random(4, 300)
    logits[0, 17] = 1e4
    logits[1] = -1e30
    logits[2, 5] = 3e38
    logits[3] *= 1e6
    for settings in ({}, {"top_p": 0.9}, {"temperature": 1e-30, "top_k": 4}, {"temperature": 1e30, "top_p": 0.5}):
        check(kernels, logits, **settings)


def test_the_ends_of_the_interval_never_give_a_token_of_weight_0():
    logits = torch.full((4, 4100), -INF, device=DEVICE)
    logits[:, [3, 4097]] = 0
    u = [0.0, 0.5 - 2**-54, 0.5, 1 - 2**-53]
    check(kernels, logits, u)
    check(kernels, logits, u, top_k=2)
    assert kernels.sample(logits, Settings(), uniforms=rand(4) * 0).token.tolist() == [3] * 4


def test_a_row_without_any_token_is_marked():
    logits = random(5, 300)
    logits[0] = -INF
    logits[1, 7] = torch.nan
    logits[2, 7] = INF
    for settings in (Settings(), Settings(top_k=3, top_p=0.5), Settings(temperature=0)):
        got = kernels.sample(logits, settings, uniforms=rand(5), top_logprobs=2)
        assert got.token[:3].tolist() == [-1] * 3 and (got.token[3:] >= 0).all()
        assert got.logprob.isnan().tolist() == [True] * 3 + [False] * 2
        assert got.top_logprobs[:3].isnan().all() and not got.top_logprobs[3:].isnan().any()


def test_strided_rows_and_nothing_else_are_read():
    wide = torch.full((3, 900), torch.nan, device=DEVICE)
    wide[:, 200:500] = random(3, 300)
    check(kernels, wide[:, 200:500], top=2, top_k=9)
    check(kernels, random(300, 3).T, top_p=0.5)
    assert kernels.sample(random(0, 9), Settings(), uniforms=rand(0), top_logprobs=2).top_tokens.shape == (0, 2)


def test_a_row_does_not_see_its_neighbours():
    logits, u = random(4, 300), rand(4)
    settings = Settings(temperature=0.9, top_p=0.9)
    together = kernels.sample(logits, settings, uniforms=u, top_logprobs=2)
    alone = kernels.sample(logits[2:3], settings, uniforms=u[2:3], top_logprobs=2)
    for one, all_ in zip(alone, together, strict=True):
        assert one[0].equal(all_[2])


def test_many_rows_draw_the_references_tokens():
    check(kernels, random(60, 40, scale=2))
    check(kernels, random(12, 40, scale=2), top_k=12, temperature=1.5)


def check_uniforms(module, count=3, R=5):
    seeds = torch.tensor([0, 1, -1, 2**62 + 12345, -(2**63)], device=DEVICE).repeat(R)[:R]
    positions = torch.tensor([0, 7, -1, 2**40 + 5, 2**33], device=DEVICE).repeat_interleave(R)[:R]
    assert_equal(module.uniforms(seeds, positions, count), reference.uniforms(seeds, positions, count), "uniforms")


@pytest.mark.parametrize(("R", "count"), [(1, 1), (5, 3), (64, 4), (257, 1)])
def test_uniforms_are_the_references_bit_for_bit(R, count):
    check_uniforms(kernels, count, R)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype):
    # the kernel widens every logit to fp32 before anything else, as the reference does: the same tolerance holds
    logits = random(40, 50_000, scale=3, dtype=dtype)
    for settings in CASES:
        check(kernels, logits, top=20, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}], ids=str)
def test_draws_follow_the_distribution(settings):
    N = 100_000
    logits = torch.tensor([0.3, -INF, 1.0, -1.0, 0.0, 2.0, -3.0], device=DEVICE)
    u = kernels.uniforms(torch.arange(N, device=DEVICE), torch.zeros(N, dtype=torch.int64, device=DEVICE))[:, 0]
    got = kernels.sample(logits.expand(N, 7).contiguous(), Settings(**settings), uniforms=u, top_logprobs=7)
    p = torch.zeros(7).scatter(0, got.top_tokens[0].cpu(), got.top_logprobs[0].cpu().exp())
    observed = torch.bincount(got.token.cpu(), minlength=7)
    assert not observed[p == 0].any()
    assert stats.chisquare(observed[p > 0], p[p > 0].double() / p.double().sum() * N).pvalue > 1e-3


def two_parts():
    return random(2, 4300, scale=3)


def rising():
    return torch.arange(300, device=DEVICE).float().expand(2, 300).contiguous() / 30


MUTATIONS = [
    ("_part", "first token of a part missed", "v = i_p * b_V + tl.arange(0, b_V)",
     "v = i_p * b_V + tl.arange(0, b_V) + 1", lambda m: check(m, -rising(), temperature=0)),
    ("_part", "wrong normaliser", "tl.sum(e, 0))", "tl.sum(e, 0) + 1)", check),
    ("_part", "wrong row stride", "p_x + i_r * stride_x, None", "p_x + i_r * (stride_x - 1), None",
     lambda m: check(m, temperature=0)),
    ("_part", "last index wins ties", "tl.min(tl.where(x == m, v, V), 0)", "tl.max(tl.where(x == m, v, 0), 0)",
     lambda m: check(m, random(2, 50) * 0, temperature=0)),
    ("_gather", "places off by one", "o_p < i_p, per_part", "o_p <= i_p, per_part", lambda m: check(m, top_k=9)),
    ("_gather", "wrong row stride", "i_r * b_L + before", "before", lambda m: check(m, top_k=9)),
    ("_gather", "cut one cell early", "tl.where(found & (cut < 0), cells, cut)",
     "tl.where(found & (cut < 0), cells - 1, cut)", lambda m: check(m, rising(), u=[0.99, 0.01], top_k=200)),
    ("_gather", "wrong total", "tl.sum(_weight(x, m, scale), 0))", "tl.sum(_weight(x, m, scale), 0) // 2)",
     lambda m: check(m, top_p=0.9, top=9)),
    ("_choose", "bound not strict", "> target", ">= target",
     lambda m: check(m, torch.tensor([[0.0, 0.0, -1.0]], device=DEVICE), u=[0.5], top_k=2)),
    ("_choose", "parts before not taken off", "tl.where(o_p < part, z_part, 0.0)",
     "tl.where(o_p < 0, z_part, 0.0)", lambda m: check(m, two_parts(), u=[0.97, 0.99])),
    ("_choose", "wrong normaliser", "9.094947017729282e-13", "9.2e-13", lambda m: check(m, top_k=9)),
    ("_choose", "wrong row stride", "p_row = p_x + i_r * stride_x", "p_row = p_x + i_r * (stride_x - 1)", check),
    ("_choose", "one token too many", "k.to(tl.int64),", "k.to(tl.int64) + 1,", lambda m: check(m, top_k=9)),
    ("_choose", "always the first part", "some & (sums > goal)", "some",
     lambda m: check(m, two_parts(), u=[0.999, 0.5])),
    ("_choose", "min-p forgotten", "least_share = min_p", "least_share = 0.0", lambda m: check(m, min_p=0.2, top=9)),
    ("_raw", "mask off by one", "inside = o_p < n_parts", "inside = o_p < n_parts - 1",
     lambda m: check(m, two_parts(), of="raw")),
    ("_raw", "wrong normaliser", "tl.log(tl.sum(z_part, 0))", "tl.log(tl.sum(z_part, 0) + 1)",
     lambda m: check(m, of="raw")),
    ("_raw", "wrong row stride", "p_x + i_r * stride_x", "p_x + i_r * (stride_x - 1)", lambda m: check(m, of="raw")),
    ("_top_part", "mask off by one", "v < V, _key(x)", "v < V - 1, _key(x)", lambda m: check(m, rising(), top=3)),
    ("_top_part", "wrong row stride", "p_x + i_r * stride_x, None", "p_x + i_r * (stride_x - 1), None",
     lambda m: check(m, top=3)),
    ("_top_part", "last index wins ties", "tl.min(tl.where(key == largest, v, 2147483647), 0)",
     "tl.max(tl.where(key == largest, v, 0), 0)", lambda m: check(m, random(2, 50) * 0, top=3)),
    ("_top_join", "a part left out", "inside = o_n < n_parts * n", "inside = o_n < (n_parts - 1) * n",
     lambda m: check(m, two_parts(), top=20)),
    ("_top_join", "wrong normaliser", "(x - m) * scale - log_z", "(x - m) * scale", lambda m: check(m, top=3)),
    ("_top_join", "wrong row stride", "p_summary + i_r * 5", "p_summary + i_r * 4", lambda m: check(m, top=3)),
    ("_uniforms", "a round too few", "tl.static_range(10)", "tl.static_range(9)", check_uniforms),
    ("_uniforms", "column off by one", "o_n % n_columns", "o_n % n_columns + 1", check_uniforms),
    ("_uniforms", "wrong row", "o_n // n_columns", "o_n // (n_columns + 1)", check_uniforms),
    ("_uniforms", "upper half of a seed lost", "(seed >> 32) & 0xFFFFFFFF", "(seed >> 32) & 0", check_uniforms),
]  # fmt: skip
