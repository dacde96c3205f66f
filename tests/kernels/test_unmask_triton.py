"""The unmask kernels against their reference: interpreted without a GPU, compiled with one."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, assert_close, assert_equal, random

from accel.kernels.unmask import COUNTING_RULES, Certainty, reference
from accel.kernels.unmask import triton as kernels

pytestmark = pytest.mark.kernel


def check_certainty(module, logits=None, forbidden=None):
    logits = random(3, 5000, scale=4) if logits is None else logits
    got = module.certainty(logits, forbidden=forbidden)
    expected = reference.certainty(logits, forbidden=forbidden)
    assert_equal(got.token, expected.token, "token")
    assert_close(got.probability, expected.probability, what="probability")
    assert_close(got.entropy, expected.entropy, what="entropy")


def check_commit(module, rule="entropy", strict=False, B=3, L=70, **kwargs):
    # few distinct values: many ties, and several values exactly at the threshold
    generator = torch.Generator().manual_seed(1)
    figures = torch.randint(1, 9, (2, B, L), generator=generator).to(DEVICE) / 8
    masked = (torch.rand(B, L, generator=generator) < 0.7).to(DEVICE)
    masked[-1] = False
    certainty = Certainty(torch.zeros(B, L, dtype=torch.int64, device=DEVICE), *figures)
    if rule in COUNTING_RULES:
        kwargs["count"] = torch.arange(B, device=DEVICE) * 2 + 1
    else:
        kwargs.setdefault("threshold", 0.5)
    got = module.commit(certainty, masked, rule=rule, strict=strict, **kwargs)
    assert_equal(got, reference.commit(certainty, masked, rule=rule, strict=strict, **kwargs), "commit")


# one row and many, one tile and less, real vocabularies (dense models' 49,152 and 151,936, LLaDA's 126,464)
SHAPES = [(1, 1), (2, 7), (3, 2047), (1, 2048), (2, 2049), (33, 300), (1, 49152), (2, 126464), (1, 151936)]


@pytest.mark.parametrize("shape", SHAPES)
def test_certainty(shape):
    check_certainty(kernels, random(*shape, scale=4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_certainty_of_half_precision_logits(dtype):
    check_certainty(kernels, random(4, 3000, scale=4, dtype=dtype))


def test_certainty_of_saturated_tied_and_forbidden_logits():
    logits = random(6, 4500)
    logits[0] = 0  # uniform: every token ties
    logits[1, 17] = 1e4  # certain
    logits[2] = -torch.inf
    logits[2, 4321] = -3.0  # one token left
    logits[3, ::2] = -torch.inf
    logits[4, [40, 4400]] = 50.0  # a tie between parts
    logits[5] = -1e30
    check_certainty(kernels, logits)
    check_certainty(kernels, logits[[0, 1, 3, 4]], forbidden=17)


def test_a_position_without_any_token_is_nan():
    logits = torch.full((2, 3000), -torch.inf, device=DEVICE)
    for got in (kernels.certainty(logits), reference.certainty(logits)):
        assert got.probability.isnan().all() and got.entropy.isnan().all()


def test_certainty_reads_strided_rows_and_nothing_else():
    wide = torch.full((4, 6000), torch.nan, device=DEVICE)
    wide[:, 1000:4000] = random(4, 3000)
    check_certainty(kernels, wide[:, 1000:4000])
    check_certainty(kernels, random(3000, 4).T)


def test_certainty_of_a_block_keeps_its_shape():
    got = kernels.certainty(random(2, 5, 100))
    assert got.token.shape == got.probability.shape == got.entropy.shape == (2, 5)
    assert kernels.certainty(random(0, 100)).token.shape == (0,)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("rule", ["entropy", "confidence"])
@pytest.mark.parametrize("L", [1, 32, 64, 65, 130])
def test_commit_by_threshold(rule, strict, L):
    check_commit(kernels, rule, strict, L=L)


@pytest.mark.parametrize("rule", ["top_k", "top_k_entropy"])
@pytest.mark.parametrize("L", [1, 33, 130])
def test_commit_by_count(rule, L):
    check_commit(kernels, rule, L=L)


def check_commit_variants(module):
    for rule in ("entropy", "confidence", "top_k", "top_k_entropy"):
        check_commit(module, rule)


MUTATIONS = [
    ("_certainty_part", "mask off by one", "(v < end)", "(v < end - 1)", lambda m: check_certainty(m, random(2, 7))),
    ("_certainty_part", "sum not rescaled", "total = rest * total + e", "total = total + e",
     # only a vocabulary this large gives a lane more than one tile
     lambda m: check_certainty(m, random(1, 140_000))),
    ("_certainty_part", "wrong row stride", "p_x + i_n * stride_n", "p_x + i_n * (stride_n - 1)", check_certainty),
    ("_certainty_part", "last index wins ties",
     "tl.min(tl.where(m == m_all", "tl.max(tl.where((m == m_all) & (token < V)",
     lambda m: check_certainty(m, torch.zeros(2, 5000, device=DEVICE))),
    ("_certainty_join", "mask off by one", "inside = o_p < n_parts", "inside = o_p < n_parts - 1", check_certainty),
    ("_certainty_join", "wrong normaliser", "tl.log(z) - s / z", "tl.log(z) - s", check_certainty),
    ("_certainty_join", "wrong row stride", "p_part + (i_n * n_parts + o_p) * 3", "p_part + (i_n + o_p) * 3",
     check_certainty),
    ("_commit", "candidates' mask ignored", "(before & rival[None, :])", "before", check_commit_variants),
    ("_commit", "ties to the higher position", "o_r[None, :] < o_l[:, None]", "o_r[None, :] > o_l[:, None]",
     check_commit_variants),
    ("_commit", "wrong row stride", "p_doubt + i_b * L + o_r", "p_doubt + i_b * (L - 1) + o_r", check_commit_variants),
    ("_commit", "most certain one not kept", "(rank == 0) | (doubt <= limit)", "doubt <= limit",
     lambda m: check_commit(m, threshold=-1.0)),
]  # fmt: skip
