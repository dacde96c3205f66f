"""Verdicts one by one: against the papers' formulas in numpy, at the edges, and for bad input.

That the verdicts add up to the target's distribution is tested in test_verify_law.py.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.kernels.verify import accept, draw, f, longest_path, longest_prefix, residual, verify

BELOW_ONE = 1 - 2**-53  # the largest float64 uniform
LENIENCES = [None, ("lin", 0.5), ("sq", 0.7), ("exp", 0.3)]


def uniforms_for(rows, columns, seed):
    return torch.rand(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- against the papers' formulas written out in numpy, one row at a time


def oracle(scores, tokens, length, q, u, acceptance):
    """(n_accepted, next token, whether a comparison was too close to call in fp32)."""
    shifted = scores - scores.max(-1, keepdims=True)
    p = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    q = (tokens[:length, None] == np.arange(scores.shape[-1])).astype(float) if q is None else q
    kept, scale, P, close = 0, 1.0, 1.0, False
    for i in range(1, length + 1):
        x = tokens[i - 1]
        ratio = p[i - 1, x] / q[i - 1, x]
        P = min(1.0, P * ratio)
        if acceptance == "token":
            h = min(1.0, ratio)
        elif i == length:
            h = P
        else:
            S = np.maximum(P * p[i] - q[i], 0).sum()
            h = S / (S + 1 - P) if S + 1 - P > 0 else 1.0
        close |= abs(h - u[i - 1]) < 1e-5
        if u[i - 1] < h:
            kept, scale = i, P if acceptance == "block" else 1.0
        elif acceptance == "token":
            break
    weights = p[kept] if kept == length else np.maximum(scale * p[kept] - q[kept], 0)
    edges = np.cumsum(weights / weights.sum())
    return kept, int(np.searchsorted(edges, u[-1], side="right")), close or np.abs(edges - u[-1]).min() < 1e-6


def case(R, K, vocab, seed, *, sharpness=2.0, noise=1.0, mask=0.0, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    raw = torch.randn(R, K + 1, vocab, generator=gen) * sharpness
    q = (raw[:, :K] + noise * torch.randn(R, K, vocab, generator=gen)).softmax(-1)
    scores = raw.masked_fill(torch.rand(raw.shape, generator=gen) < mask, -torch.inf).to(dtype)
    scores[..., 0] = 0.0  # at least one token stays possible
    flat = q.reshape(-1, vocab)
    tokens = torch.multinomial(flat, 1, generator=gen).reshape(R, K) if K else torch.zeros(R, 0).long()
    lengths = torch.randint(0, K + 1, (R,), generator=gen)
    return scores, tokens, lengths, q, uniforms_for(R, K + 1, seed)


@pytest.mark.parametrize("acceptance", ["token", "block"])
@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize(
    ("R", "K", "vocab", "mask", "dtype"),
    [
        (200, 5, 7, 0.0, torch.float32),
        (200, 3, 33, 0.4, torch.float16),
        (200, 4, 16, 0.2, torch.bfloat16),
        (3, 0, 5, 0.0, torch.float32),
        (1, 4, 49152, 0.5, torch.float32),
        (2, 2, 151936, 0.0, torch.float64),
    ],
)
def test_agrees_with_the_formulas_in_numpy(R, K, vocab, mask, dtype, certain, acceptance):
    scores, tokens, lengths, q, uniforms = case(R, K, vocab, K, mask=mask, dtype=dtype)
    if R < 10:
        lengths = torch.full((R,), K)
    given_q = None if certain else q
    verdict = verify(scores, tokens, lengths, q=given_q, uniforms=uniforms, acceptance=acceptance)
    compared = 0
    for r in range(R):
        kept, following, close = oracle(
            scores[r].double().numpy(),
            tokens[r].numpy(),
            int(lengths[r]),
            None if certain else q[r].double().numpy(),
            uniforms[r].numpy(),
            acceptance,
        )
        if not close or vocab > 1000:
            assert int(verdict.n_accepted[r]) == kept
            # fp32 probabilities move an edge among 10^5 tokens by about one token
            assert abs(int(verdict.next_token[r]) - following) <= (3 if vocab > 1000 else 0)
            compared += 1
    assert compared >= 0.98 * R


@pytest.mark.parametrize("acceptance", ["token", "block"])
def test_no_q_is_a_one_hot_q(acceptance):
    scores, tokens, lengths, _, uniforms = case(500, 4, 6, 3)
    one_hot = torch.nn.functional.one_hot(tokens, 6).float()
    without = verify(scores, tokens, lengths, uniforms=uniforms, acceptance=acceptance)
    with_q = verify(scores, tokens, lengths, q=one_hot, uniforms=uniforms, acceptance=acceptance)
    assert without.n_accepted.sum() > 100
    assert torch.equal(without.n_accepted, with_q.n_accepted) and torch.equal(without.next_token, with_q.next_token)


@pytest.mark.parametrize("lenience", LENIENCES)
@pytest.mark.parametrize("certain", [False, True])
def test_token_mode_is_its_single_position_pieces(lenience, certain):
    scores, tokens, lengths, q, uniforms = case(300, 4, 11, 9, mask=0.3)
    verdict = verify(scores, tokens, lengths, q=None if certain else q, uniforms=uniforms, lenience=lenience)
    for r in range(len(scores)):
        kept, weights = 0, None
        while weights is None:
            p = scores[r, kept].softmax(-1)
            if kept == lengths[r]:
                weights = p
                break
            x, q_here = int(tokens[r, kept]), None if certain else q[r, kept]
            if accept(p, q_here, x, float(uniforms[r, kept]), lenience):
                kept += 1
            else:
                weights = residual(p, q_here, x, lenience)
        assert (kept, draw(weights, float(uniforms[r, -1]))) == (verdict.n_accepted[r], verdict.next_token[r])


@pytest.mark.parametrize("acceptance", ["token", "block"])
@pytest.mark.parametrize("per_row", [False, True])
def test_temperature_divides_the_scores_of_target_and_draft(acceptance, per_row):
    scores, tokens, lengths, q, uniforms = case(300, 4, 9, 17, mask=0.2)
    draft_scores = q.log() * 3
    degrees = torch.linspace(0.2, 4, 300) if per_row else torch.full((300,), 0.6)
    divided = [(x.double() / degrees[:, None, None]).float() for x in (scores, draft_scores)]
    expected = verify(divided[0], tokens, lengths, q=divided[1].softmax(-1), uniforms=uniforms, acceptance=acceptance)
    given = {"temperature": degrees if per_row else 0.6, "uniforms": uniforms, "acceptance": acceptance}
    verdict = verify(scores, tokens, lengths, draft_scores=draft_scores, **given)
    # a division in fp32 may tip a comparison that is a tie but for rounding
    assert (verdict.n_accepted == expected.n_accepted).double().mean() > 0.99
    assert (verdict.next_token == expected.next_token).double().mean() > 0.99
    assert not torch.equal(verdict.n_accepted, verify(scores, tokens, lengths, q=q, uniforms=uniforms).n_accepted)


def test_draft_scores_are_the_logarithm_of_q():
    scores, tokens, lengths, q, uniforms = case(300, 4, 9, 18)
    for draft_scores in (q.log(), q.log() + 5.0):
        by_scores = verify(scores, tokens, lengths, draft_scores=draft_scores, uniforms=uniforms)
        by_q = verify(scores, tokens, lengths, q=draft_scores.softmax(-1), uniforms=uniforms)
        assert torch.equal(by_scores.n_accepted, by_q.n_accepted)
        assert torch.equal(by_scores.next_token, by_q.next_token)


def test_an_argmax_does_not_feel_the_temperature_but_lenience_does():
    p = torch.tensor([0.5, 0.35, 0.15])
    arguments = (torch.stack([p, p.flip(0)]).log()[None], torch.tensor([[1]]), torch.tensor([1]))
    for degrees, kept in ((0.5, 0), (1.0, 0), (4.0, 1)):
        # p_1 / p_0 is 0.7 to the power 1/t: 0.49, 0.7 and 0.915 against ε = 0.8
        verdict = verify(*arguments, greedy=True, lenience=("lin", 0.8), temperature=degrees)
        assert (int(verdict.n_accepted), int(verdict.next_token)) == (kept, 2 if kept else 0)
        assert int(verify(*arguments, greedy=True, temperature=degrees).n_accepted) == 0
    scores = torch.tensor([[[1.0, 1.0 + 2**-23]]])  # two scores that division makes one
    nothing = torch.zeros(1, 0).long(), torch.tensor([0])
    assert int(verify(scores, *nothing, greedy=True, temperature=3.0).next_token) == 1


# -- rows, padding, ends


@pytest.mark.parametrize("options", [{}, {"acceptance": "block"}, {"lenience": ("exp", 0.4)}, {"greedy": True}])
@pytest.mark.parametrize("certain", [False, True])
def test_a_row_alone_is_the_row_in_a_batch(options, certain):
    scores, tokens, lengths, q, uniforms = case(40, 5, 257, 21, mask=0.2)
    tokens[::2] = scores[::2, :-1].argmax(-1)  # so that greedy rows also go far
    batch = verify(scores, tokens, lengths, q=None if certain else q, uniforms=uniforms, **options)
    for r, L in enumerate(lengths.tolist()):
        alone = verify(
            scores[r : r + 1, : L + 1],
            tokens[r : r + 1, :L],
            lengths[r : r + 1],
            q=None if certain else q[r : r + 1, :L],
            uniforms=torch.cat([uniforms[r : r + 1, :L], uniforms[r : r + 1, -1:]], 1),
            **options,
        )
        assert (alone.n_accepted[0], alone.next_token[0]) == (batch.n_accepted[r], batch.next_token[r])


@pytest.mark.parametrize("junk", [-1, 10**12])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"acceptance": "block"},
        {"lenience": ("lin", 0.4)},
        {"greedy": True},
        {"greedy": True, "lenience": ("lin", 0.4)},
    ],
)
@pytest.mark.parametrize("certain", [False, True])
def test_nothing_after_the_length_is_read(options, certain, junk):
    scores, tokens, lengths, q, uniforms = case(100, 4, 9, 5)
    clean = verify(scores, tokens, lengths, q=None if certain else q, uniforms=uniforms, **options)
    beyond = torch.arange(4) >= lengths[:, None]
    scores[:, 1:][beyond], tokens[beyond], q[beyond], uniforms[:, :-1][beyond] = torch.nan, junk, torch.nan, torch.nan
    poisoned = verify(scores, tokens, lengths, q=None if certain else q, uniforms=uniforms, **options)
    assert torch.equal(clean.n_accepted, poisoned.n_accepted) and torch.equal(clean.next_token, poisoned.next_token)


@pytest.mark.parametrize("acceptance", ["token", "block"])
def test_a_right_draft_is_kept_whole_at_the_largest_uniform(acceptance):
    scores, tokens, _, _, uniforms = case(200, 5, 50, 2, mask=0.3)
    q = scores[:, :-1].softmax(-1)
    tokens = torch.multinomial(q.reshape(-1, 50), 1).reshape(200, 5)
    uniforms[:] = BELOW_ONE
    verdict = verify(scores, tokens, torch.full((200,), 5), q=q, uniforms=uniforms, acceptance=acceptance)
    assert (verdict.n_accepted == 5).all()


@pytest.mark.parametrize("acceptance", ["token", "block"])
def test_a_truncated_token_is_never_kept_nor_drawn(acceptance):
    scores, tokens, lengths, q, uniforms = case(2000, 3, 6, 8, mask=0.6)
    rows = torch.arange(2000)
    for edge in (0.0, BELOW_ONE, None):
        if edge is not None:
            uniforms[:, -1] = edge
        kept, following = verify(scores, tokens, lengths, q=q, uniforms=uniforms, acceptance=acceptance)
        assert (scores[rows, kept, following] > -torch.inf).all()
        kept_tokens = torch.arange(3) < kept[:, None]
        assert (scores[:, :3].gather(2, tokens[..., None])[..., 0][kept_tokens] > -torch.inf).all()


@pytest.mark.parametrize("acceptance", ["token", "block"])
def test_saturated_logits(acceptance):
    scores = torch.full((1, 3, 5), -1e4)
    scores[0, [0, 1, 2], [1, 2, 3]] = 1e4
    q = torch.tensor([[[0, 1.0, 0, 0, 0], [0.5, 0, 0.5, 0, 0]]])
    for x, wanted in (([1, 2], (2, 3)), ([1, 0], (1, 2))):
        for u in (0.0, 0.5, BELOW_ONE):
            uniforms = torch.full((1, 3), u, dtype=torch.float64)
            for given_q in (q, None):
                verdict = verify(
                    scores, torch.tensor([x]), torch.tensor([2]), q=given_q, uniforms=uniforms, acceptance=acceptance
                )
                assert (int(verdict.n_accepted), int(verdict.next_token)) == wanted


def test_a_refusal_by_rounding_alone_falls_back_to_the_target():
    p = torch.tensor([0.25, 0.75])
    q = torch.nextafter(p, torch.ones(2))
    assert not accept(p, q, 0, BELOW_ONE)
    assert torch.equal(residual(p, q, 0), p)


def test_a_block_refused_by_rounding_alone_keeps_what_came_before():
    scores = torch.tensor([0.25, 0.75]).log().expand(1, 3, 2)
    p = scores[0, 0].softmax(-1)
    q = torch.stack([p, torch.nextafter(p, torch.ones(2))])[None]
    uniforms = torch.tensor([[0.5, BELOW_ONE, 0.5]], dtype=torch.float64)
    tokens, lengths = torch.tensor([[0, 0]]), torch.tensor([2])
    verdict = verify(scores, tokens, lengths, q=q, uniforms=uniforms, acceptance="block")
    assert (int(verdict.n_accepted), int(verdict.next_token)) == (1, 1)


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 1e-7, 0.1, 1 / 3, 1.0, 7.0]), min_size=1, max_size=40).filter(any),
    u=st.one_of(st.sampled_from([0.0, 5e-324, 0.5, BELOW_ONE]), st.floats(0, 1, exclude_max=True)),
)
@settings(max_examples=300, deadline=None)
def test_draw_never_returns_a_token_of_no_weight(weights, u):
    token = draw(torch.tensor(weights, dtype=torch.float64), u)
    total = sum(weights)
    assert weights[token] > 0
    assert sum(weights[:token]) <= u * total * (1 + 1e-12) and u * total <= sum(weights[: token + 1]) * (1 + 1e-12)


# -- greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_greedy_is_the_longest_prefix_of_argmaxes(dtype):
    gen = torch.Generator().manual_seed(0)
    scores = torch.randint(-3, 4, (300, 4, 6), generator=gen).to(dtype)  # full of ties
    best = torch.tensor([[max(range(6), key=row.__getitem__) for row in r] for r in scores.tolist()])
    tokens = torch.where(
        torch.rand(300, 3, generator=gen) < 0.7, best[:, :3], torch.randint(0, 6, (300, 3), generator=gen)
    )
    lengths = torch.randint(0, 4, (300,), generator=gen)
    for options in ({}, {"lenience": ("sq", 1.0)}, {"acceptance": "block"}):
        kept, following = verify(scores, tokens, lengths, greedy=True, **options)
        for r in range(300):
            n = 0
            while n < lengths[r] and tokens[r, n] == best[r, n]:
                n += 1
            assert (kept[r], following[r]) == (n, best[r, n])


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_one_greedy_row_on_the_host_is_the_same_verdict(data):
    V, K, more = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 4)), data.draw(st.integers(0, 2))
    # few values, so that there are ties and longer prefixes
    values = st.lists(st.sampled_from([0.0, 1.0, -torch.inf]), min_size=V, max_size=V)
    scores = torch.tensor([data.draw(values) for _ in range(K + 1 + more)])
    tokens = [data.draw(st.integers(0, V - 1)) for _ in range(K)]
    try:
        expected = verify(scores[None, : K + 1], torch.tensor([tokens]).long(), torch.tensor([K]), greedy=True)
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)[:20]):
            longest_prefix(scores, tokens)
        return
    assert longest_prefix(scores, tokens) == (int(expected.n_accepted), int(expected.next_token))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_path_is_what_the_argmaxes_spell(data):
    """Each drafted token in turn, or one beside it and nothing more: what walks there is an independent search."""
    V, K = data.draw(st.integers(2, 5)), data.draw(st.integers(0, 4))
    tokens = [data.draw(st.integers(0, V - 1)) for _ in range(K)]
    others = st.tuples(st.integers(0, max(0, K - 1)), st.integers(0, V - 1))
    beside = sorted({each for each in data.draw(st.lists(others, max_size=5)) if K and tokens[each[0]] != each[1]})
    values = st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=V, max_size=V)
    scores = torch.tensor([data.draw(values) for _ in range(1 + K + len(beside))])
    said = scores.argmax(-1).tolist()
    # every path that there is, and the longest of those whose tokens are what the target says before each
    paths = [list(range(k + 1)) for k in range(K + 1)]
    paths += [[*range(depth + 1), 1 + K + i] for i, (depth, _) in enumerate(beside)]
    read = [None, *tokens, *(token for _, token in beside)]
    true = [path for path in paths if all(said[a] == read[b] for a, b in itertools.pairwise(path))]
    path, following = longest_path(scores, tokens, beside)
    assert path == max(true, key=len) and following == said[path[-1]]
    if not beside:
        assert (len(path) - 1, following) == longest_prefix(scores, tokens)


def test_a_path_to_nothing_is_refused():
    scores = torch.tensor([[0.0, 1.0], [0.0, 0.0], [-torch.inf, -torch.inf]])
    with pytest.raises(ValueError, match="no token can follow"):
        longest_path(scores, [0], [(0, 1)])


@pytest.mark.parametrize(
    ("lenience", "kept"), [(("lin", 0.5), 1), (("lin", 0.9), 0), (("sq", 0.8), 1), (("exp", 0.5), 1)]
)
def test_greedy_lenience(lenience, kept):
    p = torch.tensor([0.5, 0.35, 0.15])  # f(0.35): 0.7, 0.389, 0.547, 0.59 against 0.5
    scores = torch.stack([p, p.flip(0)]).log()[None]
    verdict = verify(scores, torch.tensor([[1]]), torch.tensor([1]), greedy=True, lenience=lenience)
    assert (int(verdict.n_accepted), int(verdict.next_token)) == (kept, 2 if kept else 0)


def test_greedy_at_real_vocabularies():
    for vocab in (49152, 151936):
        scores, _, _, _, _ = case(1, 3, vocab, 1)
        tokens = scores[:, :3].argmax(-1)
        tokens[0, 2] += 1
        verdict = verify(scores, tokens, torch.tensor([3]), greedy=True)
        assert (int(verdict.n_accepted), int(verdict.next_token)) == (2, int(scores[0, 2].argmax()))


@pytest.mark.parametrize("rule", ["lin", "sq", "exp"])
def test_epsilon_one_is_lossless(rule):
    scores, tokens, lengths, q, uniforms = case(2000, 4, 7, 13, mask=0.2)
    for given_q in (q, None):
        strict = verify(scores, tokens, lengths, q=given_q, uniforms=uniforms)
        same = verify(scores, tokens, lengths, q=given_q, uniforms=uniforms, lenience=(rule, 1.0))
        assert torch.equal(strict.n_accepted, same.n_accepted) and torch.equal(strict.next_token, same.next_token)
    p = torch.rand(5)
    assert torch.equal(f(p, (rule, 1)), p) and f(p, None) is p


# -- mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(2, 4)}, r"scores is float32 \[2, 4\].*\[R, K\+1, V\]"),
        ({"scores": torch.zeros(2, 4, 5).long()}, "scores is int64"),
        ({"tokens": torch.zeros(2, 4).long()}, r"tokens is int64 \[2, 4\].*\[2, 3\]"),
        ({"tokens": torch.zeros(2, 3)}, "tokens is float32"),
        ({"tokens": torch.full((2, 3), 5)}, r"ids outside 0\.\.4"),
        ({"lengths": torch.tensor([1, 4])}, r"lengths=\[1, 4\].*K=3"),
        ({"lengths": torch.tensor([1])}, r"lengths is int64 \[1\]"),
        ({"q": torch.zeros(2, 3, 6)}, r"q is float32 \[2, 3, 6\].*\[2, 3, 5\]"),
        ({"draft_scores": torch.zeros(2, 3, 6)}, r"draft_scores is float32 \[2, 3, 6\].*\[2, 3, 5\]"),
        ({"draft_scores": torch.zeros(2, 3, 5), "q": torch.zeros(2, 3, 5)}, "q and draft_scores are both given"),
        ({"temperature": 0.0}, "temperature=0.0: must be above 0.*greedy=True"),
        ({"temperature": float("nan")}, "temperature=nan: must be above 0"),
        ({"temperature": torch.ones(3)}, r"temperature is float32 \[3\].*\[R\] = \[2\]"),
        ({"temperature": torch.tensor([1.0, -1.0])}, r"temperature=\[1.0, -1.0\]: each must be above 0"),
        ({"uniforms": None}, r"uniforms=None.*greedy=True"),
        ({"uniforms": torch.zeros(2, 4)}, "uniforms is float32"),
        ({"uniforms": torch.ones(2, 4).double()}, r"outside \[0, 1\)"),
        ({"acceptance": "tree"}, "acceptance='tree': choose 'token' or 'block'"),
        ({"lenience": ("cube", 0.5)}, "'lin', 'sq' or 'exp'"),
        ({"lenience": ("lin", 0.0)}, "0 < eps <= 1"),
        ({"lenience": ("lin", 0.5), "acceptance": "block"}, "allowed only with acceptance='token'"),
        ({"scores": torch.full((2, 4, 5), -torch.inf)}, "no token can follow"),
        ({"scores": torch.full((2, 4, 5), torch.nan)}, "no token can follow"),
        ({"scores": torch.full((2, 4, 5), torch.nan), "acceptance": "block"}, "no token can follow"),
        ({"scores": torch.full((2, 4, 5), -torch.inf), "greedy": True}, "no token can follow"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {
        "scores": torch.zeros(2, 4, 5),
        "tokens": torch.ones(2, 3).long(),
        "lengths": torch.tensor([3, 2]),
        "uniforms": torch.zeros(2, 4).double(),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        verify(**arguments)
