"""The conv_features kernels against their reference: interpreted without a GPU, compiled with one."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, assert_close, assert_equal, random

from accel.kernels.conv_features import ConvState, reference
from accel.kernels.conv_features import triton as kernels

pytestmark = pytest.mark.kernel


def weights(H, D, f, conv=True, dtype=torch.float32):
    # scores of about ±2: neither flat nor saturated
    maps = {name: random(H, D, f, seed=n, scale=D**-0.5, dtype=dtype) for n, name in enumerate(("q_map", "k_map"), 10)}
    taps = {name: random(H, D, 4, seed=n) for n, name in enumerate(("q_taps", "k_taps"), 12)} if conv else {}
    return maps | taps


def states(N, H, Hkv, D, dtype=torch.float32):
    return ConvState(random(N, 3, H, D, seed=20, dtype=dtype), random(N, 3, Hkv, D, seed=21, dtype=dtype))


def compare(got, expected, tolerance=1e-5):
    assert_close(got.q, expected.q, tolerance, "q")
    assert_close(got.k, expected.k, tolerance, "k")
    if expected.log_decay is None:
        assert got.log_decay is None
    else:
        assert_close(got.log_decay, expected.log_decay, tolerance, "log_decay")
    if expected.state is None:
        assert got.state is None
    else:
        assert_equal(got.state.q, expected.state.q, "state.q")
        assert_equal(got.state.k, expected.state.k, "state.k")


def check(module, B=2, T=37, H=4, Hkv=2, D=24, f=12, conv=True, N=None, gate=True, scale=1.0, **options):
    """Odd sizes by default, so that every padded edge is there; ``N``: rows of a state to resume from."""
    q, k = random(B, T, H, D, scale=scale), random(B, T, Hkv, D, seed=1, scale=scale)
    logits = random(B, T, Hkv, 2 * f, seed=2, scale=8) if gate else None
    options |= weights(H, D, f, conv)
    if N is not None:
        options["state"] = states(N, H, Hkv, D)
    compare(module.conv_features(q, k, logits, **options), reference.conv_features(q, k, logits, **options))


def padding(B, T, seed=3):
    return (torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.7).to(DEVICE)


def check_everything(module):
    check(module, N=2, mask=padding(2, 37), activation="silu", min_log_decay=-0.2)


# empty first, in the middle and last; shorter than the memory; across tiles; a real count for the halving
BOUNDS = [0, 0, 1, 3, 3, 3, 36, 40, 41, 75, 75]


def check_packed(module, bounds=BOUNDS, resumed=True, **options):
    starts = torch.tensor(bounds, device=DEVICE, dtype=options.pop("dtype", torch.int32))
    N = len(bounds) - 1 if resumed else None
    check(module, B=1, T=bounds[-1], N=N, cu_seqlens=starts, **options)


def check_step(module, B=3, H=4, Hkv=2, D=24, f=12, gate=True, **options):
    q, k = random(B, H, D), random(B, Hkv, D, seed=1)
    logits = random(B, Hkv, 2 * f, seed=2, scale=8) if gate else None
    options |= weights(H, D, f)
    old = states(B, H, Hkv, D)
    mine, theirs = (ConvState(old.q.clone(), old.k.clone()) for _ in range(2))
    got = module.conv_features_step(q, k, logits, **options, state=mine)
    expected = reference.conv_features_step(q, k, logits, **options, state=theirs)
    compare(reference.Features(*got, mine), reference.Features(*expected, theirs))


@pytest.mark.parametrize("T", [1, 2, 3, 4, 63, 64, 65, 130])
def test_token_counts_around_the_memory_and_the_tile(T):
    check(kernels, T=T)
    check(kernels, B=1, T=T, H=2, N=1, Hkv=1)


@pytest.mark.parametrize(("D", "f"), [(64, 32), (80, 40), (96, 48), (128, 64), (256, 128), (128, 16), (1, 1)])
def test_head_sizes(D, f):
    check(kernels, B=1, T=33, H=2, Hkv=1, D=D, f=f, N=1)
    check_step(kernels, B=2, H=2, Hkv=1, D=D, f=f)


@pytest.mark.parametrize(("H", "Hkv"), [(1, 1), (3, 3), (8, 2), (5, 1)])
def test_head_groups(H, Hkv):
    check(kernels, T=5, H=H, Hkv=Hkv, N=2)
    check_step(kernels, H=H, Hkv=Hkv)


def test_all_options_at_once():
    check_everything(kernels)


def test_no_conv_and_no_gate():
    check(kernels, conv=False, gate=False)
    check(kernels, conv=False, mask=padding(2, 37))
    check(kernels, gate=False, N=2)
    check_step(kernels, gate=False)


@pytest.mark.parametrize("resumed", [False, True])
def test_packed_sequences(resumed):
    check_packed(kernels, resumed=resumed)
    check_packed(kernels, resumed=resumed, mask=padding(1, 75), dtype=torch.int64)


@pytest.mark.parametrize("bounds", [[0, 5], [0, 0], [0, 0, 7], [0, 7, 7], list(range(34))])
def test_packings_of_one_none_and_many(bounds):
    check_packed(kernels, bounds)


@pytest.mark.parametrize("B", [1, 15, 16, 17])
def test_steps_of_batches_around_the_tile(B):
    check_step(kernels, B=B, H=2, Hkv=1, activation="silu", min_log_decay=-0.3)


def test_nothing_to_do():
    check(kernels, T=0, N=2)
    check(kernels, B=0, T=3)
    check_step(kernels, B=0)


def test_saturated_scores_and_gates():
    # features at the floor and at one; logsigmoid(±1e4), and e^-30, which log(1 + x) in fp32 would drop
    check(kernels, scale=40)
    q, k = random(1, 3, 2, 8), random(1, 3, 1, 8)
    for value in (1e4, 30.0, -30.0, -1e4):
        gate = torch.full((1, 3, 1, 8), value, device=DEVICE)
        got = kernels.conv_features(q, k, gate, **weights(2, 8, 4))
        compare(got, reference.conv_features(q, k, gate, **weights(2, 8, 4)))


def test_projections_are_read_where_they_lie_and_nothing_else():
    # q, k and gate as slices of one projection, with NaN between them and after the last token
    wide = torch.full((2, 40, 12, 24), torch.nan, device=DEVICE)
    wide[:, :37, :4], wide[:, :37, 5:7], wide[:, :37, 8:10] = random(2, 37, 4, 24), random(2, 37, 2, 24), 1.0
    x = wide[:, :37, :4], wide[:, :37, 5:7], wide[:, :37, 8:10]
    options = weights(4, 24, 12) | {"state": states(2, 4, 2, 24)}
    compare(kernels.conv_features(*x, **options), reference.conv_features(*(y.clone() for y in x), **options))
    x = tuple(y.transpose(-1, -2).contiguous().transpose(-1, -2) for y in x)
    compare(kernels.conv_features(*x, **options), reference.conv_features(*x, **options))


def test_padding_may_hold_anything():
    q, k, gate = random(2, 9, 4, 24), random(2, 9, 2, 24), random(2, 9, 2, 24)
    mask = torch.arange(9, device=DEVICE) >= torch.tensor([[2], [5]], device=DEVICE)
    expected = kernels.conv_features(q, k, gate, **weights(4, 24, 12), mask=mask)
    for x in (q, k, gate):
        x[~mask] = torch.nan
    compare(kernels.conv_features(q, k, gate, **weights(4, 24, 12), mask=mask), expected, 0)


def test_a_rows_result_does_not_depend_on_its_neighbours():
    q, k, gate = random(20, 4, 24), random(20, 2, 24), random(20, 2, 24)
    options, state = weights(4, 24, 12), states(20, 4, 2, 24)
    alone = ConvState(state.q[17:18].clone(), state.k[17:18].clone())
    q1, k1, decay1 = kernels.conv_features_step(q[17:18], k[17:18], gate[17:18], **options, state=alone)
    q20, k20, decay20 = kernels.conv_features_step(q, k, gate, **options, state=state)
    assert_equal(q20[17:18], q1)
    assert_equal(k20[17:18], k1)
    assert_equal(decay20[17:18], decay1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("D", "f"), [(64, 32), (80, 40), (128, 64), (256, 128)])
def test_half_precision(dtype, D, f):
    # the conv's output is rounded to 8 bits before the product: 2^-9 of scores of about 2, and 2^-9 of the result
    H, Hkv, options = 8, 2, weights(8, D, f, dtype=dtype)
    q, k = random(2, 1000, H, D, dtype=dtype), random(2, 1000, Hkv, D, seed=1, dtype=dtype)
    gate, state = random(2, 1000, Hkv, 2 * f, seed=2, dtype=dtype), states(2, H, Hkv, D, dtype=dtype)
    got = kernels.conv_features(q, k, gate, **options, state=state)
    compare(got, reference.conv_features(q, k, gate, **options, state=state), 1e-2)
    theirs = ConvState(state.q.clone(), state.k.clone())
    one = kernels.conv_features_step(q[:, 0], k[:, 0], gate[:, 0], **options, state=state)
    expected = reference.conv_features_step(q[:, 0], k[:, 0], gate[:, 0], **options, state=theirs)
    compare(reference.Features(*one, state), reference.Features(*expected, theirs), 1e-2)


MUTATIONS = [
    ("_features", "taps in reverse", "tap = tl.load(p_taps + (W - 1 - lag), mask=m_d, other=0.0)\n                z",
     "tap = tl.load(p_taps + lag, mask=m_d, other=0.0)\n                z", lambda m: check(m, T=5)),
    ("_features", "the wrong key head", "tl.where(is_k, i_h // G, i_h)", "tl.where(is_k, i_h % (H // G), i_h)",
     lambda m: check(m, T=5)),
    ("_features", "wrong row stride", "(o_r * H)[:, None]", "(o_r * (H - 1))[:, None]",
     lambda m: check(m, T=5)),
    ("_features", "the state one token late", "lag - start + W - 1)", "lag - start + W - 2 + (lag == W - 1))",
     lambda m: check(m, T=5, N=2)),
    ("_features", "conv over a sequence's start", "o_r - lag >= start)", "o_r - lag >= 0)",
     lambda m: check_packed(m, resumed=False)),
    ("_features", "mask off by one", "o_r - lag >= start)", "o_r - lag > start)", lambda m: check(m, T=5)),
    ("_features", "padding enters the state", "(tl.load(p_pad + o_t, mask=m_t, other=0) != 0) | (i_x < H)", "m_t",
     check_everything),
    ("_features", "halves of opposite sign swapped", "inside, -scores", "inside, scores", lambda m: check(m, T=5)),
    ("_features", "wrong normaliser", "(1.0 / tl.sum(e_down, 1))", "(1.0 / tl.sum(e_up, 1))", lambda m: check(m, T=5)),
    ("_features", "the least decay ignored", "log1p) / normalizer, least)", "log1p) / normalizer, -1e30)",
     check_everything),
    ("_next_state", "one token early", "(end - (W - 1) + slot)", "tl.maximum(end - W + slot, 0)",
     lambda m: check(m, T=5)),
    ("_next_state", "old memory not shifted", "left = token - start + W - 1", "left = slot",
     lambda m: check(m, T=1, N=2)),
    ("_next_state", "padding remembered", "(tl.load(p_pad, mask=read, other=0) != 0)", "m_d",
     lambda m: check(m, T=5, mask=torch.zeros(2, 5, dtype=torch.bool, device=DEVICE))),
    ("_next_state", "wrong row stride", "(i_n * (W - 1) + slot)", "(i_n * (W - 2) + slot)", lambda m: check(m, T=5)),
    ("_step", "state not shifted", "at + n_source * D", "at", check_step),
    ("_step", "the wrong tap", "p_taps + slot", "p_taps + (W - 1 - slot)", check_step),
    ("_step", "wrong row stride", "(o_b * H + i_h)", "(o_b * (H - 1) + i_h)", check_step),
    ("_step", "mask off by one", "m_b = o_b < B", "m_b = o_b < B - 1", check_step),
    ("_step", "only the group's first head", "tl.where(is_k, G, 1)", "1", check_step),
]  # fmt: skip
