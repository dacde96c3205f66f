"""The statistical heart: what verify emits must follow the target, and the tests here must be able to say it does not.

``emitted`` plays whole rounds on a vocabulary of four with a Markov chain as target and another as draft; the joint
distribution of the first K+1 tokens is held against the target's own product, by chi-square over 10^5 rounds, or
exactly, by integrating over a lattice of uniforms.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from accel.kernels.verify import Verdict, verify

V, ROUNDS, P_VALUE = 4, 100_000, 1e-4
BELOW_ONE = 1 - 2**-53  # the largest float64 uniform
LENIENCES = [None, ("lin", 0.5), ("sq", 0.7), ("exp", 0.3)]

# chain[a, b]: probability of b after a; row V starts the sequence. Zeros stand for truncated tokens.
TARGET = torch.tensor(
    [[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.0, 0.5, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0], [0.4, 0.3, 0.2, 0.1]]
)
# its first row overshoots a little and the next ones a lot: prefixes with 0 < P < 1 and S > 0, where blocks differ
OTHER = torch.tensor(
    [
        [0.5, 0.1, 0.1, 0.3],
        [0.5, 0.02, 0.4, 0.08],
        [0.6, 0.0, 0.4, 0.0],
        [0.25, 0.25, 0.25, 0.25],
        [0.5, 0.4, 0.05, 0.05],
    ]
)
DRAFTS = {"right": TARGET, "wrong": OTHER, "partly": 0.5 * TARGET + 0.5 * OTHER}
START = V


def uniforms_for(rows, columns, seed):
    return torch.rand(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pick(weights, seed):
    """One token a row of weights [R, V]; torch's own sampler, independent of draw."""
    return torch.multinomial(weights, 1, generator=torch.Generator().manual_seed(seed))[:, 0]


def emitted(verifier, draft, K, *, sampled=True, lengths=None, seed=0):
    """The first K+1 tokens of ROUNDS rounds, [ROUNDS, K+1]: draft from a chain, verify, go on from the target."""
    tokens = torch.full((ROUNDS, K + 1), START)
    for i in range(K):  # column -1 is START until it is written
        before = draft[tokens[:, i - 1]]
        tokens[:, i] = pick(before, 100 * seed + i) if sampled else before.argmax(-1)
    previous = torch.cat([torch.full((ROUNDS, 1), START), tokens[:, :K]], 1)
    scores, q = TARGET[previous].log(), draft[previous[:, :K]] if sampled else None
    lengths = torch.full((ROUNDS,), K) if lengths is None else lengths
    verdict = verifier(scores, tokens[:, :K], lengths, q=q, uniforms=uniforms_for(ROUNDS, K + 1, 7 + seed))
    for i in range(K + 1):
        at_stop = verdict.n_accepted == i
        tokens[at_stop, i] = verdict.next_token[at_stop]
        beyond = verdict.n_accepted < i
        if beyond.any():
            tokens[beyond, i] = pick(TARGET[tokens[beyond, i - 1]], 1000 + 100 * seed + i)
    return tokens


def follows_target(tokens):
    """p-value of the chi-square of the joint distribution of tokens [N, n] against the target's own."""
    N, n = tokens.shape
    expected = np.zeros(V**n)
    for cell, sequence in enumerate(product(range(V), repeat=n)):
        expected[cell] = N * np.prod([float(TARGET[a, b]) for a, b in zip((START, *sequence), sequence, strict=False)])
    cells = (tokens * torch.tensor([V ** (n - 1 - i) for i in range(n)])).sum(1)
    observed = np.bincount(cells.numpy(), minlength=V**n)
    assert observed[expected == 0].sum() == 0, "a token that the target cannot emit"
    rare = expected < 10  # pooled, as chi-square wants
    expected = np.append(expected[~rare], expected[rare].sum())
    observed = np.append(observed[~rare], observed[rare].sum())
    expected, observed = expected[expected > 0], observed[expected > 0]
    return float(chi2.sf(((observed - expected) ** 2 / expected).sum(), len(expected) - 1))


def token_rule(*args, **kwargs):
    return verify(*args, acceptance="token", **kwargs)


def block_rule(*args, **kwargs):
    return verify(*args, acceptance="block", **kwargs)


@pytest.mark.parametrize("rule", [token_rule, block_rule])
@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("draft", DRAFTS)
def test_sampled_drafts_emit_the_targets_joint_distribution(rule, K, draft):
    assert follows_target(emitted(rule, DRAFTS[draft], K)) > P_VALUE


@pytest.mark.parametrize("rule", [token_rule, block_rule])
@pytest.mark.parametrize("draft", DRAFTS)
def test_certain_drafts_emit_the_targets_joint_distribution(rule, draft):
    assert follows_target(emitted(rule, DRAFTS[draft], 3, sampled=False)) > P_VALUE


@pytest.mark.parametrize("rule", [token_rule, block_rule])
def test_ragged_drafts_emit_the_targets_joint_distribution(rule):
    assert follows_target(emitted(rule, DRAFTS["partly"], 3, lengths=torch.arange(ROUNDS) % 4)) > P_VALUE


def redrawn(verdict, weights, lengths):
    """The verdict with refused tokens replaced by draws from other weights [R, V]."""
    return Verdict(verdict.n_accepted, pick(weights, 5).where(verdict.n_accepted < lengths, verdict.next_token))


def target_as_residual(scores, tokens, lengths, **kwargs):
    verdict = verify(scores, tokens, lengths, **kwargs)
    return redrawn(verdict, scores[torch.arange(len(scores)), verdict.n_accepted].softmax(-1), lengths)


def block_with_token_residual(scores, tokens, lengths, *, q, uniforms):
    verdict = verify(scores, tokens, lengths, q=q, uniforms=uniforms, acceptance="block")
    rows = torch.arange(len(scores))
    p, q_stop = scores.softmax(-1)[rows, verdict.n_accepted], q[rows, verdict.n_accepted.clamp(max=q.shape[1] - 1)]
    return redrawn(verdict, (p - q_stop).clamp(min=0) + 1e-9, lengths)


def kept_where_likeliest(scores, tokens, lengths, *, q, uniforms):
    """The greedy rule's acceptance with a sampled next token."""
    kept, _ = verify(scores, tokens, lengths, greedy=True)
    return Verdict(kept, pick(scores[torch.arange(len(scores)), kept].softmax(-1), 5))


def certain_as_sampled(scores, tokens, lengths, *, q, uniforms):
    """Drafts that are the likeliest token, passed off as samples of the distribution they head."""
    previous = torch.cat([torch.full((len(tokens), 1), START), tokens[:, :-1]], 1)
    return verify(scores, tokens, lengths, q=DRAFTS["partly"][previous], uniforms=uniforms)


def lenient(*args, **kwargs):
    return verify(*args, lenience=("lin", 0.8), **kwargs)


SAMPLED_AND_WRONG = [target_as_residual, block_with_token_residual, kept_where_likeliest, lenient]


@pytest.mark.parametrize(
    ("rule", "sampled"), [*((rule, True) for rule in SAMPLED_AND_WRONG), (certain_as_sampled, False)]
)
def test_the_chi_square_refuses_wrong_rules(rule, sampled):
    assert follows_target(emitted(rule, DRAFTS["partly"], 2, sampled=sampled)) < 1e-12


def test_forgetting_q_is_lossless_but_keeps_less():
    """Accepting sampled tokens as if they were certain: right in law, which is why only speed would tell."""
    kept = []

    def counting(scores, tokens, lengths, *, q, uniforms):
        for given_q in (q, None):
            verdict = verify(scores, tokens, lengths, q=given_q, uniforms=uniforms)
            kept.append(verdict.n_accepted.double().mean().item())
        return verdict

    assert follows_target(emitted(counting, DRAFTS["partly"], 2)) > P_VALUE
    assert kept[1] < 0.6 * kept[0]


# -- exactly, where every threshold of the rules is a multiple of 1/12: midpoints of a lattice integrate without error

EXACT = {
    "paper": ((1, 2), (2, 1), 3),
    "covering": ((2, 1, 2, 1), (0, 1, 4, 1), 6),
    "holes": ((0, 1, 3, 2), (1, 2, 3, 0), 6),
}


def exactly(pair, acceptance):
    """All drafts of two tokens and all uniforms on the lattice → joint law of the first two tokens, mean accepted."""
    p, q, whole = EXACT[pair]
    p, q = (torch.tensor(x, dtype=torch.float64) / whole for x in (p, q))
    n = len(p)
    grid = (torch.arange(12, dtype=torch.float64) + 0.5) / 12
    uniforms = torch.cartesian_prod(grid, grid, grid)
    joint, mean = torch.zeros(n, n, dtype=torch.float64), 0.0
    for x in product(range(n), repeat=2):
        R = len(uniforms)
        kept, following = verify(
            p.log().expand(R, 3, n),
            torch.tensor(x).expand(R, 2),
            torch.full((R,), 2),
            q=q.expand(R, 2, n),
            uniforms=uniforms,
            acceptance=acceptance,
        )
        chance = q[x[0]] * q[x[1]] / R
        mean += float(chance * kept.sum())
        for a in range(n):
            joint[a] += chance * ((kept == 0) & (following == a)).sum() * p
        joint[x] += chance * (kept == 2).sum()
        joint[x[0]] += chance * torch.bincount(following[kept == 1], minlength=n)
    return joint, mean, torch.outer(p, p)


@pytest.mark.parametrize("acceptance", ["token", "block"])
@pytest.mark.parametrize("pair", EXACT)
def test_joint_law_is_exact_on_a_lattice(pair, acceptance):
    joint, _, wanted = exactly(pair, acceptance)
    assert torch.allclose(joint, wanted, rtol=0, atol=1e-12)


def test_mean_accepted_lengths_of_the_papers_example():
    """Sun et al. 2024, section 2: p = (1/3, 2/3), q = (2/3, 1/3) keep 10/9 by tokens and 11/9 by blocks."""
    assert exactly("paper", "token")[1] == pytest.approx(10 / 9, abs=1e-12)
    assert exactly("paper", "block")[1] == pytest.approx(11 / 9, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_acceptance_rate_is_one_minus_total_variation(seed):
    gen = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, 8, generator=gen).mul(2).softmax(-1)
    N = 4000
    uniforms = torch.stack([(torch.arange(N, dtype=torch.float64) + 0.5) / N, torch.full((N,), 0.5).double()], 1)
    rate = 0.0
    for x in range(8):
        kept, _ = verify(
            p.log().expand(N, 2, 8),
            torch.full((N, 1), x),
            torch.ones(N).long(),
            q=q.expand(N, 1, 8),
            uniforms=uniforms,
        )
        rate += float(q[x]) * kept.double().mean().item()
    assert rate == pytest.approx(1 - 0.5 * float((p - q).abs().sum()), abs=1 / N)


@pytest.mark.parametrize("seed", range(5))
def test_blocks_are_never_shorter_than_tokens(seed):
    gen = torch.Generator().manual_seed(seed)
    R, K = 20_000, 6
    scores = torch.randn(K + 1, 8, generator=gen).mul(1.5)
    q = (scores[:K] + torch.randn(K, 8, generator=gen)).softmax(-1)
    tokens = torch.stack([pick(q[i].expand(R, 8), 10 * seed + i) for i in range(K)], 1)
    uniforms, lengths = uniforms_for(R, K + 1, seed), torch.full((R,), K)
    mean = {
        acceptance: verify(
            scores.expand(R, K + 1, 8),
            tokens,
            lengths,
            q=q.expand(R, K, 8),
            uniforms=uniforms,
            acceptance=acceptance,
        )
        .n_accepted.double()
        .mean()
        .item()
        for acceptance in ("token", "block")
    }
    assert mean["block"] > mean["token"] + 0.01


# -- lenience


@pytest.mark.parametrize("lenience", LENIENCES)
@pytest.mark.parametrize("certain", [False, True])
def test_lenient_acceptance_and_residual_follow_the_formula(lenience, certain):
    p, q = torch.tensor([0.05, 0.15, 0.3, 0.5]), torch.tensor([0.6, 0.2, 0.15, 0.05])
    rule, eps = lenience or ("lin", 1.0)
    lifted = {"lin": p / eps, "sq": p / eps**2, "exp": p**eps}[rule]
    N = 10_000
    grid = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    for x in range(4):
        law = torch.eye(4)[x] if certain else q
        options = {"q": None if certain else q.expand(N, 1, 4), "lenience": lenience}
        arguments = (p.log().expand(N, 2, 4), torch.full((N, 1), x), torch.ones(N).long())
        kept, _ = verify(*arguments, uniforms=torch.stack([grid, grid], 1), **options)
        chance = min(1.0, float(lifted[x] / law[x]))
        assert kept.double().mean().item() == pytest.approx(chance, abs=1 / N)
        if chance < 1:
            kept, following = verify(
                *arguments, uniforms=torch.stack([torch.full_like(grid, BELOW_ONE), grid], 1), **options
            )
            weights = (lifted - law).clamp(min=0)
            assert kept.sum() == 0
            share = torch.bincount(following, minlength=4) / N
            assert torch.allclose(share, weights / weights.sum(), rtol=0, atol=2 / N)
