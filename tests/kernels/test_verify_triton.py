"""The verify kernels against their reference, integer by integer: interpreted without a GPU, compiled with one."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, assert_equal
from scipy.stats import chi2

from accel.kernels.verify import reference
from accel.kernels.verify import triton as kernels

pytestmark = pytest.mark.kernel

BELOW_ONE = 1 - 2**-53  # the largest float64 uniform

# what a rule is asked with: how the draft is given, and the rule's own options
RULES = {
    "greedy": (None, {"greedy": True}),
    "greedy, lin": (None, {"greedy": True, "lenience": ("lin", 0.5)}),
    "greedy, exp": (None, {"greedy": True, "lenience": ("exp", 0.3)}),
    "no q": (None, {}),
    "q": ("q", {}),
    "draft scores": ("draft_scores", {}),
    "no q, lin": (None, {"lenience": ("lin", 0.5)}),
    "q, sq": ("q", {"lenience": ("sq", 0.7)}),
    "draft scores, exp": ("draft_scores", {"lenience": ("exp", 0.3)}),
    "block, no q": (None, {"acceptance": "block"}),
    "block, q": ("q", {"acceptance": "block"}),
    "block, draft scores": ("draft_scores", {"acceptance": "block"}),
}
LAWS = ["greedy", "no q", "q", "draft scores", "block, q"]


def inputs(R=5, K=3, V=300, *, seed=0, rule="q", ragged=True, mask=0.2, scale=2.0, noise=0.7, dtype=torch.float32):
    """Arguments of verify, on the CPU: a draft near the target, its tokens drawn from it (greedy: mostly argmaxes)."""
    draft, options = RULES[rule]
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(R, K + 1, V, generator=generator) * scale
    draft_scores = raw[:, :K] + noise * torch.randn(R, K, V, generator=generator)
    scores = raw.masked_fill(torch.rand(raw.shape, generator=generator) < mask, -torch.inf)
    scores[..., -1] = 1.0  # at least one token stays possible
    scores, draft_scores = scores.to(dtype), draft_scores.to(dtype)
    q = draft_scores.float().softmax(-1)
    tokens = torch.multinomial(q.view(-1, V), 1, generator=generator).view(R, K) if K else torch.zeros(R, 0).long()
    if options.get("greedy"):
        right = torch.rand(R, K, generator=generator) < 0.7
        tokens = scores[:, :K].float().argmax(-1).where(right, tokens)
    lengths = torch.randint(0, K + 1, (R,), generator=generator) if ragged else torch.full((R,), K)
    uniforms = torch.rand(R, K + 1, dtype=torch.float64, generator=generator)
    given = {"scores": scores, "tokens": tokens, "lengths": lengths, "uniforms": uniforms, **options}
    return given | ({} if draft is None else {draft: q.to(dtype) if draft == "q" else draft_scores})


def run(module, given):
    device = "cpu" if module is reference else DEVICE
    return module.verify(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()})


def check(module, given=None, **wanted):
    given = inputs(**wanted) if given is None else given
    got, expected = run(module, given), run(reference, given)
    assert_equal(got.n_accepted, expected.n_accepted, "n_accepted")
    assert_equal(got.next_token, expected.next_token, "next_token")
    return got


# no draft; one token; one position more than is decided at a time; a tile and a part of the vocabulary, and one more
SHAPES = [(3, 0, 5), (2, 1, 1), (4, 4, 7), (1, 17, 33), (2, 2, 2048), (2, 2, 8193)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule, shape):
    R, K, V = shape
    check(kernels, R=R, K=K, V=V, rule=rule, mask=0.0 if V < 3 else 0.2)


@pytest.mark.parametrize(("V", "scale"), [(49152, 3.0), (151936, 4.0)])
@pytest.mark.parametrize("rule", LAWS)
def test_real_vocabularies(rule, V, scale):
    check(kernels, R=1, K=2, V=V, rule=rule, scale=scale, noise=0.3, ragged=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", LAWS)
def test_half_precision(rule, dtype):
    check(kernels, R=3, V=500, rule=rule, dtype=dtype)


@pytest.mark.parametrize(("target", "draft"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float16)])
@pytest.mark.parametrize("rule", ["q", "draft scores"])
def test_target_and_draft_of_two_types(rule, target, draft):
    given = inputs(R=3, rule=rule)
    name = RULES[rule][0]
    check(kernels, given | {"scores": given["scores"].to(target), name: given[name].to(draft)})


@pytest.mark.parametrize("rule", ["greedy, lin", "no q", "draft scores", "block, draft scores"])
def test_temperatures(rule):
    given = inputs(R=4, rule=rule)
    check(kernels, given | {"temperature": 0.6})
    check(kernels, given | {"temperature": torch.tensor([0.3, 1.0, 1.7, 4.0])})


@pytest.mark.parametrize(("rule", "R"), [("q", 150), ("block, q", 80)])
def test_many_verdicts_on_a_small_vocabulary(rule, R):
    """All ways a round can end, many times over; the reference's own law is tested in test_verify_law.py."""
    got = check(kernels, R=R, K=2, V=4, rule=rule, mask=0.1)
    assert (torch.bincount(got.n_accepted.cpu(), minlength=3) > R / 20).all()


@pytest.mark.parametrize("rule", ["greedy", "greedy, lin", "q", "draft scores", "block, draft scores"])
def test_a_row_alone_is_the_row_in_a_batch_and_nothing_after_its_length_is_read(rule, monkeypatch):
    given = inputs(R=4, K=4, V=300, rule=rule, seed=3)
    given["lengths"] = torch.tensor([2, 0, 4, 3])
    expected = check(kernels, given)
    alone = {name: x[:1] if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    row = run(kernels, alone)
    assert (row.n_accepted[0], row.next_token[0]) == (expected.n_accepted[0], expected.next_token[0])
    beyond = torch.arange(4) >= given["lengths"][:, None]
    given["scores"][:, 1:][beyond] = torch.nan
    given["tokens"][beyond] = 10**12
    given["uniforms"][:, :-1][beyond] = torch.nan
    if RULES[rule][0]:
        given[RULES[rule][0]][beyond] = torch.nan
    # nor is memory that was never written
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(77))
    poisoned = run(kernels, given)
    assert_equal(poisoned.n_accepted, expected.n_accepted)
    assert_equal(poisoned.next_token, expected.next_token)


@pytest.mark.parametrize("rule", ["q", "draft scores", "block, q"])
def test_strided_and_expanded_inputs(rule):
    given = inputs(R=4, K=2, V=100, rule=rule)
    name = RULES[rule][0]
    wide = torch.full((4, 3, 250), torch.nan)
    wide[..., 50:150] = given["scores"]
    check(kernels, given | {"scores": wide[..., 50:150]})
    check(kernels, given | {"scores": given["scores"].mT.contiguous().mT, name: given[name].mT.contiguous().mT})
    check(kernels, given | {"scores": given["scores"][:1].expand(4, 3, 100), name: given[name][:1].expand(4, 2, 100)})
    columns = torch.stack([given["tokens"]] * 2, -1)[..., 0], torch.stack([given["uniforms"]] * 2, -1)[..., 0]
    check(kernels, given | {"tokens": columns[0], "uniforms": columns[1]})


@pytest.mark.parametrize("rule", ["draft scores", "block, draft scores"])
def test_a_right_draft_is_kept_whole_at_the_largest_uniform(rule):
    given = inputs(R=3, K=4, V=3000, rule=rule, ragged=False, mask=0.0)
    given |= {"draft_scores": given["scores"][:, :-1], "temperature": 0.7}
    given["uniforms"][:] = BELOW_ONE
    assert (check(kernels, given).n_accepted == 4).all()


@pytest.mark.parametrize("rule", ["greedy", "no q", "q", "block, q"])
@pytest.mark.parametrize("edge", [0.0, BELOW_ONE])
def test_an_impossible_token_is_neither_kept_nor_drawn(rule, edge):
    given = inputs(R=3, K=2, V=3000, rule=rule, ragged=False, mask=0.6)
    given["scores"][:, 0, :2000] = -torch.inf
    given["scores"][..., 2990:] = -torch.inf
    given["tokens"][:, 0] = 7
    given["uniforms"][:, -1] = edge
    got = check(kernels, given)
    assert (got.n_accepted == 0).all()
    assert (given["scores"][torch.arange(3), 0, got.next_token.cpu()] > -torch.inf).all()


def check_ties(module):
    """The first index wins, within a part of the vocabulary and between parts."""
    scores = torch.zeros(2, 2, 9000)
    scores[1, :, [5, 4500, 8999]] = 3.0
    given = {"scores": scores, "tokens": torch.tensor([[0], [4500]]), "lengths": torch.tensor([1, 1]), "greedy": True}
    got = check(module, given)
    assert got.n_accepted.tolist() == [1, 0] and got.next_token.tolist() == [0, 5]


def test_ties():
    check_ties(kernels)
    # every token is as likely as the best one, and so is kept by a lenient rule
    given = {"scores": torch.zeros(1, 2, 50), "tokens": torch.tensor([[9]]), "lengths": torch.tensor([1])}
    assert check(kernels, given | {"greedy": True, "lenience": ("sq", 0.9)}).n_accepted.item() == 1


def check_empty_residual(module):
    """q above p at every token: the first is refused, no weight is left, and p is drawn from instead."""
    given = {
        "scores": torch.tensor([0.25, 0.75]).log().expand(2, 2, 2),
        "tokens": torch.zeros(2, 1, dtype=torch.int64),
        "lengths": torch.ones(2, dtype=torch.int64),
        "q": torch.tensor([0.3, 0.8]).expand(2, 1, 2),
        "uniforms": torch.tensor([[0.99, 0.2], [0.99, 0.3]], dtype=torch.float64),
    }
    for acceptance in ("token", "block"):
        got = check(module, given | {"acceptance": acceptance})
        assert got.n_accepted.tolist() == [0, 0] and got.next_token.tolist() == [0, 1]


def test_an_empty_residual_falls_back_to_the_target():
    check_empty_residual(kernels)


def check_normaliser(module):
    """Scores that rise from one tile to the next: p = 1/4096 for each of the upper half, just above u."""
    scores = torch.full((1, 2, 8192), -10.0)
    scores[..., 4096:] = 0.0
    given = {"scores": scores, "tokens": torch.tensor([[5000]]), "lengths": torch.tensor([1])}
    check(module, given | {"uniforms": torch.tensor([[0.9 / 4096, 0.5]], dtype=torch.float64)})


def test_saturated_scores():
    check_normaliser(kernels)
    scores = torch.full((1, 3, 5), -1e4)
    scores[0, [0, 1, 2], [1, 2, 3]] = 1e4
    for tokens in ([1, 2], [1, 0]):
        for acceptance in ("token", "block"):
            check(
                kernels,
                {
                    "scores": scores,
                    "tokens": torch.tensor([tokens]),
                    "lengths": torch.tensor([2]),
                    "uniforms": torch.full((1, 3), 0.5, dtype=torch.float64),
                    "acceptance": acceptance,
                },
            )


@pytest.mark.parametrize("rule", ["greedy", "greedy, lin", "no q", "q", "draft scores", "block, q"])
def test_where_no_token_can_follow_the_next_one_is_minus_one(rule):
    given = inputs(R=3, K=2, V=100, rule=rule, ragged=False)
    given["scores"][1] = -torch.inf
    got = run(kernels, given)
    others = {name: x[::2] if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    expected = run(reference, others)
    assert got.next_token[1] == -1
    assert_equal(got.n_accepted[::2], expected.n_accepted)
    assert_equal(got.next_token[::2], expected.next_token)
    if rule != "greedy":
        given["scores"][1] = torch.nan
        assert run(kernels, given).next_token[1] == -1


@pytest.mark.parametrize("rule", ["greedy, lin", "no q", "q", "draft scores"])
def test_wrong_lengths_and_ids_read_nothing_outside(rule):
    given = inputs(R=3, K=2, V=100, rule=rule)
    given["lengths"] = torch.tensor([0, 2, 2])
    expected = run(kernels, given)
    got = run(kernels, given | {"lengths": torch.tensor([-5, 2**40, 3])})
    assert_equal(got.n_accepted, expected.n_accepted)
    assert_equal(got.next_token, expected.next_token)
    given["tokens"][:] = torch.tensor([-1, 10**12])
    assert (run(kernels, given).n_accepted == 0).all()


def test_no_rows():
    got = kernels.verify(torch.zeros(0, 3, 5), torch.zeros(0, 2).long(), torch.zeros(0).long(), greedy=True)
    assert got.n_accepted.shape == got.next_token.shape == (0,)


@pytest.mark.parametrize("module", [reference, pytest.param(kernels, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("acceptance", ["token", "block"])
def test_the_law_of_a_hundred_thousand_rounds(module, acceptance):
    """Chi-square of (n_accepted, next_token) by the token rule, and of the first token emitted by either."""
    R, K, V = 100_000, 2, 6
    generator = torch.Generator().manual_seed(5)
    p = torch.randn(K + 1, V, generator=generator).softmax(-1)
    q = torch.randn(K, V, generator=generator).softmax(-1)
    tokens = torch.stack([torch.multinomial(q[i], R, True, generator=generator) for i in range(K)], 1)
    given = {"scores": p.log().expand(R, K + 1, V), "tokens": tokens, "lengths": torch.full((R,), K)}
    given |= {"draft_scores": q.log().expand(R, K, V), "acceptance": acceptance}
    given["uniforms"] = torch.rand(R, K + 1, dtype=torch.float64, generator=generator)
    kept, following = (x.cpu() for x in run(module, given))
    first = tokens[:, 0].where(kept > 0, following)
    laws = [(torch.bincount(first, minlength=V), p[0])]
    if acceptance == "token":
        stay, joint = 1.0, []
        for i in range(K):
            joint.append(stay * (p[i] - q[i]).clamp(min=0))
            stay = stay * torch.minimum(p[i], q[i]).sum()
        joint = torch.cat([*joint, stay * p[K]])
        laws.append((torch.bincount(kept * V + following, minlength=(K + 1) * V), joint))
    for observed, law in laws:
        possible = law > 0
        assert observed[~possible].sum() == 0
        expected = R * law[possible].double()
        statistic = ((observed[possible] - expected) ** 2 / expected).sum()
        assert chi2.sf(float(statistic), int(possible.sum()) - 1) > 1e-4


def check_greedy(module):
    check(module, R=6, K=3, V=3, rule="greedy", ragged=False, mask=0.0)


def check_lenient_greedy(module):
    check(module, R=8, K=3, V=4, rule="greedy, lin", mask=0.0, noise=2.0, ragged=False)


def check_q(module):
    check(module, R=12, K=2, V=5, rule="q", noise=2.0, ragged=False)


def check_wide(module):
    check(module, R=4, K=2, V=5000, rule="q", noise=2.0, mask=0.0)


def check_block(module):
    check(module, R=16, K=3, V=5, rule="block, q", ragged=False, mask=0.0)


def check_block_without_q(module):
    check(module, R=16, K=3, V=3, rule="block, no q", mask=0.0, scale=1.0)


MUTATIONS = [
    ("_statistics", "mask off by one", "mask=v < end,", "mask=v < end - 1,", check_greedy),
    ("_statistics", "sum not rescaled", "total * tl.exp2((m - base) * scale) + tl.sum(", "total + tl.sum(",
     check_normaliser),
    ("_statistics", "wrong row stride", "p_x + i_r * stride_r + i_k * stride_k\n",
     "p_x + i_r * stride_r + i_k * (stride_k - 1)\n", check_greedy),
    ("_statistics", "last index wins ties", "tl.min(tl.where(x == top[None, :], v, NO_TOKEN), 0)",
     "tl.max(tl.where(x == top[None, :], v, -1), 0)", check_ties),
    ("_decide_greedy", "better tokens kept", "kept = token == best", "kept = token >= best", check_greedy),
    ("_decide_greedy", "wrong row stride", "(i_r * (K + 1) + accepted)", "(i_r * K + accepted)", check_greedy),
    ("_decide_greedy", "last part wins ties", "tl.min(tl.where(m == tl.max(m, 0), best, NO_TOKEN), 0)",
     "tl.max(tl.where(m == tl.max(m, 0), best, -1), 0)", check_ties),
    ("_decide_greedy", "wrong normaliser", ">= 1.0 / total", ">= 0.1 + 0 * total", check_lenient_greedy),
    ("_decide", "q forgotten", "refused = drafted & ((u * q <", "refused = drafted & ((u <", check_q),
    ("_decide", "mask off by one", "drafted, live = o_k < length,", "drafted, live = o_k < length - 1,", check_q),
    ("_decide", "wrong row stride", "p_uniforms + at, mask", "p_uniforms + i_r * K + o_k, mask", check_q),
    ("_decide", "P above one", "tl.minimum(grown, 1.0)", "grown", check_block),
    ("_decide_block", "wrong normaliser", "left + 1 - weight, 1.0", "left + 1, 1.0", check_block),
    ("_decide_block", "another token's uniform", "p_uniforms + at - 1,", "p_uniforms + at,", check_block),
    ("_decide_block", "wrong row stride", "(i_r * K + o_k)[:, None]", "(i_r * (K - 1) + o_k)[:, None]", check_block),
    ("_decide_block", "mask off by one", "tested & (o_k < length)", "tested & (o_k < length - 1)",
     check_block_without_q),
    ("_weigh", "first token missed", "tile + tl.arange(0, b_V)", "tile + 1 + tl.arange(0, b_V)", check_q),
    ("_weigh", "wrong row stride", "(i_n * n_parts + i_p) * 2", "(i_n + i_p) * 2", check_wide),
    ("_weigh", "p summed for the residual", "tl.sum(weights.to", "tl.sum(p.to", check_wide),
    ("_weigh", "another position's mass", "i_n % n)\n", "0)\n", check_block),
    ("_weigh", "draft token left in", "tl.where(v == token, 0.0, weights)", "weights",
     lambda m: check(m, R=12, K=1, V=3, rule="no q", mask=0.0, ragged=False)),
    ("_pick", "another column's uniform", "i_r * (K + 1) + K) * total", "i_r * (K + 1)) * total", check_q),
    ("_pick", "wrong row stride", "(i_r * n_parts + o_p) * 2", "(i_r + o_p) * 2", check_wide),
    ("_pick", "part counted twice", "o_p < part, sums", "o_p <= part, sums", check_wide),
    ("_pick", "no fallback", "tl.sum(sums, 0) == 0", "tl.sum(sums, 0) == -1", check_empty_residual),
]  # fmt: skip
