"""The sampling reference against transformers' processors, brute force, published vectors and chi-square tests."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from transformers.generation import logits_process as hf

from accel.kernels.sampling import Settings, count_tokens, reference, sample, uniforms
from accel.kernels.verify import draw

INF = torch.inf


def random(*shape, seed=0, scale=3.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def rand(R, seed=1):
    return torch.rand(R, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def processed(logits, ids=None, **settings):
    """transformers' own processors, in the order of its generate()."""
    table = {
        "repetition_penalty": hf.RepetitionPenaltyLogitsProcessor,
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
    }
    for name, processor in table.items():
        if name in settings:
            logits = processor(settings[name])(ids, logits)
    return logits


CASES = [
    {"temperature": 0.7},
    {"temperature": 1e-6},
    {"temperature": 1e4},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 0.0},
    {"top_p": 1.0},
    {"min_p": 0.05},
    {"min_p": 0.0},
    {"min_p": 1.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 400, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 0.6, "top_k": 300, "top_p": 0.97, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("V", [2, 1000, 49152])
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_tokens_and_log_probabilities_are_those_of_transformers_processors(settings, V):
    logits, u = random(4, V), rand(4)
    logits[1, ::2] = -INF
    ids = torch.randint(V, (4, 30), generator=torch.Generator().manual_seed(2))
    theirs = processed(logits, ids, **settings)
    ours = Settings(**settings)
    counts = count_tokens(ids, torch.full((4,), 30), V)
    n = min(5, V)
    got = sample(logits, ours, counts=counts, uniforms=u, top_logprobs=n)
    assert got.token.tolist() == [draw(row.double().softmax(-1), float(x)) for row, x in zip(theirs, u, strict=True)]
    log_p = theirs.double().log_softmax(-1)
    torch.testing.assert_close(got.logprob.double(), log_p.gather(1, got.token[:, None])[:, 0], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(got.top_logprobs.double(), log_p.topk(n).values, rtol=1e-5, atol=2e-6)
    # what is kept, exactly
    table = ours.table(4, logits.device)
    x = reference.penalised(logits, table, counts)
    share = ((x - x.amax(-1, keepdim=True)) * table[:, :1]).exp()
    kept = reference._kept(x, share, table) & (share > 0)
    assert kept.equal((theirs > -INF) & (share > 0))


def test_a_real_vocabulary():
    logits, u = random(2, 151_936, scale=4), rand(2)
    settings = {"temperature": 0.9, "top_p": 0.95}
    theirs = processed(logits, **settings).double().softmax(-1)
    assert sample(logits, Settings(**settings), uniforms=u).token.tolist() == [
        draw(row, float(x)) for row, x in zip(theirs, u, strict=True)
    ]


def kept_tokens(logits, **settings):
    got = sample(torch.tensor([logits]), Settings(**settings), uniforms=rand(1), top_logprobs=len(logits))
    return sorted(got.top_tokens[got.top_logprobs > -INF].tolist())


def test_ties_at_the_edge_are_all_kept():
    assert kept_tokens([1.0, 2.0, 1.0, 1.0, 0.0], top_k=2) == [0, 1, 2, 3]
    quarter = [0.0] * 4
    assert kept_tokens(quarter, top_p=0.1) == kept_tokens(quarter, top_p=0.0) == [0, 1, 2, 3]
    assert kept_tokens(quarter, min_p=1.0) == kept_tokens(quarter, top_k=1) == [0, 1, 2, 3]
    # half, quarter, quarter: above each quarter stands exactly a half
    halves = [math.log(0.25), math.log(0.5), math.log(0.25)]
    assert kept_tokens(halves, top_p=0.49) == [1]
    assert kept_tokens(halves, top_p=0.51) == [0, 1, 2]
    assert kept_tokens([0.0, -0.0, -1.0], top_k=1) == [0, 1]


def test_top_p_is_brute_force_over_a_small_vocabulary():
    generator = torch.Generator().manual_seed(5)
    for _ in range(50):
        weights = torch.randint(0, 6, (9,), generator=generator).double()
        weights[0] += 1
        top_p = float(torch.rand((), generator=generator))
        total = weights.sum()
        expected = [i for i in range(9) if weights[i] > 0 and weights[weights > weights[i]].sum() < top_p * total]
        assert kept_tokens(weights.log().float().tolist(), top_p=top_p) == expected


def test_penalties_are_openais_and_ctrls():
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5]])
    counts = torch.tensor([[3, 1, 0, 2]], dtype=torch.int32)
    settings = Settings(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    got = reference.penalised(logits, settings.table(1, logits.device), counts)
    expected = [2 / 2 - 3 * 0.25 - 0.5, -2 * 2 - 0.25 - 0.5, 1.0, 0.25 - 0.5 - 0.5]
    torch.testing.assert_close(got, torch.tensor([expected]))


def test_rows_have_their_own_settings_and_do_not_see_each_other():
    logits, u = random(5, 3000), rand(5)
    each = [
        {"temperature": 0.0, "top_k": 3},
        {"temperature": 0.5, "top_p": 0.4},
        {"top_k": 3},
        {"min_p": 0.3},
        {"temperature": 2.0},
    ]
    names = ("temperature", "top_k", "top_p", "min_p")
    columns = {n: torch.tensor([float(s.get(n, getattr(Settings, n))) for s in each]) for n in names}
    together = sample(logits, Settings(**columns), uniforms=u, top_logprobs=4)
    for r, settings in enumerate(each):
        alone = sample(logits[r : r + 1], Settings(**settings), uniforms=u[r : r + 1], top_logprobs=4)
        for one, all_ in zip(alone, together, strict=True):
            assert one[0].equal(all_[r])


def test_greedy_ignores_truncation_and_takes_the_first_of_equals():
    got = sample(torch.tensor([[1.0, 3.0, 3.0, 0.0]]), Settings(temperature=0, top_k=1), top_logprobs=4)
    assert got.token.tolist() == [1]
    assert got.top_tokens.tolist() == [[1, 2, 0, 3]]
    torch.testing.assert_close(got.top_logprobs, torch.tensor([[3.0, 3, 1, 0]]).log_softmax(-1))


def test_raw_log_probabilities_are_the_models_own():
    logits = random(3, 500)
    counts = torch.ones(3, 500, dtype=torch.int32)
    settings = Settings(temperature=0.3, top_k=2, frequency_penalty=1.0)
    got = sample(logits, settings, counts=counts, uniforms=rand(3), top_logprobs=5, logprobs_of="raw")
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(got.logprob, log_p.gather(1, got.token[:, None])[:, 0])
    torch.testing.assert_close(got.top_logprobs, log_p.topk(5).values)
    assert got.token.equal(sample(logits, settings, counts=counts, uniforms=rand(3)).token)


def test_a_token_of_weight_0_is_never_drawn():
    logits = torch.tensor([[-INF, 0.0, -INF, 0.0, -INF]]).expand(4, 5)
    u = torch.tensor([0.0, 0.5 - 2**-54, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert sample(logits, uniforms=u).token.tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.7}, {"top_k": 4}, {"min_p": 0.2}], ids=str)
def test_draws_follow_the_distribution(settings):
    N = 100_000
    logits = torch.tensor([0.3, -INF, 1.0, -1.0, 0.0, 2.0, -3.0])
    seeds, positions = torch.full((N,), 11), torch.arange(N)
    token = sample(logits.expand(N, 7), Settings(**settings), seeds=seeds, positions=positions).token
    p = processed(logits[None], **settings)[0].double().softmax(-1)
    assert fits(token, p)
    assert not fits(token, (p + 0.03 * (p > 0)) / (p + 0.03 * (p > 0)).sum())


def test_draws_from_a_nucleus_follow_its_distribution():
    N = 100_000
    logits = torch.tensor([0.3, 1.0, -1.0, 0.0, 2.0, -3.0])
    token = sample(
        logits.expand(N, 6), Settings(top_p=0.8), seeds=torch.arange(N), positions=torch.zeros(N).long()
    ).token
    assert fits(token, processed(logits[None], top_p=0.8)[0].double().softmax(-1))


def fits(token, p):
    observed = torch.bincount(token, minlength=len(p)).double()
    assert not observed[p == 0].any()
    return stats.chisquare(observed[p > 0], p[p > 0] * len(token)).pvalue > 1e-3


# Random123's kat_vectors: counter, key, result
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_words(counter, key, expected):
    words = reference.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [int(w) for w in words] == expected


def test_uniforms_are_made_of_those_words():
    zero = torch.zeros(1, dtype=torch.int64)
    assert float(uniforms(zero, zero)) == ((0x6627E8D5 >> 5 << 26) + (0xE169C58D >> 6)) / 2**53
    full = torch.tensor([-1])
    words = reference.philox(tuple(map(torch.tensor, [0xFFFFFFFF, 0xFFFFFFFF, 0, 0])), (torch.tensor(0xFFFFFFFF),) * 2)
    assert float(uniforms(full, full)) == ((int(words[0]) >> 5 << 26) + (int(words[1]) >> 6)) / 2**53


def test_uniforms_are_uniform_and_independent_between_rows_positions_and_columns():
    seeds = torch.arange(100).repeat_interleave(100)
    positions = torch.arange(100).repeat(100)
    u = uniforms(seeds, positions, 10)
    assert u.shape == (10_000, 10) and float(u.min()) >= 0 and float(u.max()) < 1
    assert len(u.unique()) == u.numel()
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    cube = u.view(100, 100, 10)
    for a, b in ((cube[1:], cube[:-1]), (cube[:, 1:], cube[:, :-1]), (cube[..., 1:], cube[..., :-1])):
        cells = (a * 8).long() * 8 + (b * 8).long()
        assert stats.chisquare(torch.bincount(cells.flatten(), minlength=64)).pvalue > 1e-3


def test_a_rows_numbers_do_not_depend_on_the_batch():
    seeds, positions = torch.tensor([5, -3, 2**62]), torch.tensor([0, 2**40, 9])
    together = uniforms(seeds, positions, 4)
    for r in range(3):
        assert uniforms(seeds[r : r + 1], positions[r : r + 1], 2).equal(together[r : r + 1, :2])


def test_counts_are_of_the_history_alone():
    history = torch.tensor([[1, 1, 4, 9], [0, 3, 3, -1]])
    assert count_tokens(history, torch.tensor([3, 4]), 5).tolist() == [[0, 2, 0, 0, 1], [1, 0, 0, 2, 0]]
    assert count_tokens(history[:, :0], torch.tensor([0, 0]), 2).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, r"floating point \[R, V\]"),
        ({"logits": torch.full((2, 3), -INF)}, "no token can follow"),
        ({"logits": torch.tensor([[0.0, torch.nan, 1.0]] * 2)}, "no token can follow"),
        ({"uniforms": None}, "either uniforms, or seeds and positions"),
        ({"seeds": torch.zeros(2).long()}, "either uniforms, or seeds and positions"),
        ({"uniforms": torch.tensor([0.0, 1.0], dtype=torch.float64)}, r"outside \[0, 1\)"),
        ({"uniforms": torch.zeros(2)}, r"float64 \[R\] = \[2\]"),
        ({"settings": Settings(presence_penalty=1.0)}, "penalties need counts"),
        ({"counts": torch.zeros(2, 3)}, r"int32 \[R, V\] = \[2, 3\]"),
        ({"settings": Settings(top_p=torch.ones(3))}, r"top_p has shape \[3\]"),
        ({"top_logprobs": 4}, r"top_logprobs=4: must be in 0\.\.3"),
        ({"logprobs_of": "model"}, "'processed' or 'raw'"),
    ],
)
def test_bad_input_is_refused_in_one_line(change, message):
    given = {"logits": torch.zeros(2, 3), "settings": None, "uniforms": rand(2), **change}
    with pytest.raises(ValueError, match=message):
        sample(given.pop("logits"), given.pop("settings"), **given)


@pytest.mark.parametrize(
    "setting", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 1.5}, {"min_p": torch.tensor([2.0])},
                {"repetition_penalty": 0.0}],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))}=.*must be"):
        Settings(**setting)
