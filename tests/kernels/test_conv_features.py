"""The conv_features reference against torch's own conv, einsum and softmax in the authors' order, and itself."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from kernel_checks import assert_close
from torch.nn import functional as F

from accel.kernels.conv_features import FLOOR, ConvState, conv_features, conv_features_step


def inputs(B=2, T=11, H=4, Hkv=2, D=6, f=3, W=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = (normal(B, T, H, D), normal(B, T, Hkv, D), normal(B, T, Hkv, 2 * f) * 8)
    weights = {name: normal(H, D, f) for name in ("q_map", "k_map")}
    return x, weights | {name: normal(H, D, W) for name in ("q_taps", "k_taps")}


def as_the_authors_write_it(q, k, gate, q_map, k_map, q_taps, k_taps, silu=False, normalizer=16.0, least=None):
    """Repeat k and gate, channels-first grouped conv, einsum, softmax of both signs, logsigmoid, in that order."""
    G = q.shape[2] // k.shape[2]
    k, gate = k.repeat_interleave(G, 2), gate.repeat_interleave(G, 2)

    def phi(x, taps, weights):
        B, T, H, D = x.shape
        W = taps.shape[-1]
        y = x.reshape(B, T, H * D).transpose(1, 2)
        y = F.conv1d(F.pad(y, (W - 1, 0)), taps.reshape(H * D, 1, W), groups=H * D)
        y = F.silu(y) if silu else y
        scores = torch.einsum("hdf,bhtd->bhtf", weights, y.view(B, H, D, T).transpose(2, 3))
        return torch.cat([scores.softmax(-1), (-scores).softmax(-1)], -1).clamp(FLOOR).transpose(1, 2)

    decay = F.logsigmoid(gate) / normalizer
    decay = decay if least is None else decay.clamp(min=least)
    return phi(q, q_taps, q_map), phi(k, k_taps, k_map), decay[:, :, ::G]


def assert_features(got, expected, tolerance=1e-12):
    for name, a, e in zip(("q", "k", "log_decay"), got, expected, strict=False):
        assert_close(a, e, tolerance, name)


def assert_states(a, b):
    assert torch.equal(a.q, b.q) and torch.equal(a.k, b.k)


@pytest.mark.parametrize(("H", "Hkv", "D", "f"), [(4, 2, 6, 3), (3, 3, 5, 7), (4, 1, 64, 32), (1, 1, 1, 1)])
def test_it_is_the_authors_chain_of_operations(H, Hkv, D, f):
    x, weights = inputs(H=H, Hkv=Hkv, D=D, f=f)
    assert_features(conv_features(*x, **weights), as_the_authors_write_it(*x, **weights))
    got = conv_features(*x, **weights, activation="silu", gate_normalizer=3.0, min_log_decay=-1.0)
    assert_features(got, as_the_authors_write_it(*x, **weights, silu=True, normalizer=3.0, least=-1.0))
    assert got.log_decay.min() == -1.0


def test_features_are_two_distributions_and_never_zero():
    (q, k, gate), weights = inputs()
    got = conv_features(q * 300, k, gate, **weights)
    torch.testing.assert_close(got.q.unflatten(-1, (2, -1)).sum(-1), torch.ones(2, 11, 4, 2, dtype=torch.float64))
    assert got.q.min() == FLOOR and got.k.min() >= FLOOR and (got.log_decay <= 0).all()


def test_without_conv_and_gate_only_the_map_is_left():
    (q, k, _), weights = inputs()
    maps = {name: weights[name] for name in ("q_map", "k_map")}
    got = conv_features(q, k, **maps)
    scores = torch.einsum("bthd,hdf->bthf", q, maps["q_map"])
    assert_close(got.q, torch.cat([scores.softmax(-1), (-scores).softmax(-1)], -1), 1e-12)
    assert got.log_decay is None and got.state is None
    # the same as a conv that passes the current token on
    same = torch.zeros(4, 6, 4, dtype=torch.float64)
    same[..., -1] = 1
    assert_close(got.k, conv_features(q, k, **maps, q_taps=same, k_taps=same).k, 1e-12)


@pytest.mark.parametrize("cut", range(12))
def test_two_pieces_give_what_the_whole_gives(cut):
    x, weights = inputs()
    whole = conv_features(*x, **weights)
    first = conv_features(*(y[:, :cut] for y in x), **weights)
    kept = ConvState(first.state.q.clone(), first.state.k.clone())
    second = conv_features(*(y[:, cut:] for y in x), **weights, state=first.state)
    assert_features([torch.cat(pair, 1) for pair in zip(first[:3], second[:3], strict=True)], whole)
    assert_states(second.state, whole.state)
    assert_states(first.state, kept)


def test_pieces_of_one_token_and_of_none():
    x, weights = inputs(T=6)
    whole, state, pieces = conv_features(*x, **weights), None, []
    for start, end in [(0, 1), (1, 1), (1, 2), (2, 4), (4, 4), (4, 5), (5, 6)]:
        got = conv_features(*(y[:, start:end] for y in x), **weights, state=state)
        state = got.state
        pieces.append(got[:3])
    assert_features([torch.cat(p, 1) for p in zip(*pieces, strict=True)], whole)
    assert_states(state, whole.state)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_steps_give_what_the_whole_gives_and_keep_the_states_memory(activation):
    x, weights = inputs()
    whole = conv_features(*x, **weights, activation=activation)
    state = ConvState.zeros(2, x[0], x[1])
    addresses = state.q.data_ptr(), state.k.data_ptr()
    for t in range(11):
        got = conv_features_step(*(y[:, t] for y in x), **weights, activation=activation, state=state)
        assert_features(got, [y[:, t] for y in whole[:3]])
    assert_states(state, whole.state)
    assert addresses == (state.q.data_ptr(), state.k.data_ptr())


# empty first, in the middle and last; shorter than the memory of three
BOUNDS = [0, 0, 1, 3, 3, 3, 8, 11, 11]


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences_are_separate_ones(resumed, dtype):
    x, weights = inputs(B=1)
    generator = torch.Generator().manual_seed(1)
    state = None
    if resumed:
        state = ConvState(*(torch.randn(8, 3, h, 6, generator=generator, dtype=torch.float64) for h in (4, 2)))
    got = conv_features(*x, **weights, cu_seqlens=torch.tensor(BOUNDS, dtype=dtype), state=state)
    for n, (start, end) in enumerate(pairwise(BOUNDS)):
        own = None if state is None else ConvState(state.q[n : n + 1], state.k[n : n + 1])
        alone = conv_features(*(y[:, start:end] for y in x), **weights, state=own)
        assert_features([y[:, start:end] for y in got[:3]], alone[:3])
        assert_states(ConvState(got.state.q[n : n + 1], got.state.k[n : n + 1]), alone.state)


def test_left_padding_changes_nothing_and_adds_nothing():
    x, weights = inputs(T=9)
    pads = [0, 1, 2, 5]
    # garbage where there is padding, large enough to be seen
    padded = [
        torch.cat([torch.full_like(y[:1], 1e3).repeat(4, 1, 1, 1)[:, :5], y[:1].repeat(4, 1, 1, 1)], 1) for y in x
    ]
    padded = [torch.stack([y[row, 5 - n : 14 - n] for row, n in enumerate(pads)]) for y in padded]
    mask = torch.stack([torch.arange(9) >= n for n in pads])
    got = conv_features(*padded, **weights, mask=mask)
    for row, n in enumerate(pads):
        alone = conv_features(*(y[:1, : 9 - n] for y in x), **weights)
        assert_features([y[row : row + 1, n:] for y in got[:3]], alone[:3])
        assert_states(ConvState(got.state.q[row : row + 1], got.state.k[row : row + 1]), alone.state)
        assert not got.k[row, :n].any() and not got.log_decay[row, :n].any()


def test_bf16_is_computed_in_fp32_and_rounded_once():
    x, weights = inputs(dtype=torch.bfloat16)
    got = conv_features(*x, **weights)
    exact = as_the_authors_write_it(*(y.double() for y in x), **{n: w.double() for n, w in weights.items()})
    assert got.q.dtype == got.k.dtype == got.log_decay.dtype == got.state.q.dtype == torch.bfloat16
    # rounding to 8 bits is off by up to 2^-9, 2^-9 / √3 in the mean
    assert_features(got, exact, 2**-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 5, 3, 6)}, "H=4, Hkv=3, D=6: H must be a multiple of Hkv"),
        ({"k": torch.zeros(2, 4, 2, 6)}, r"q is \[2, 5, 4, 6\] and k \[2, 4, 2, 6\]"),
        ({"q": torch.zeros(2, 5, 4, 6).bfloat16()}, "cast them to one floating point dtype"),
        ({"gate": torch.zeros(2, 5, 2, 6, dtype=torch.float64)}, "torch.float64: cast them"),
        ({"gate": torch.zeros(2, 5, 2, 8)}, r"must be \[2, 5, 2, 6\] \(K = 2f\)"),
        ({"q_map": torch.zeros(4, 6, 4)}, r"must be \[H, D, f\] = \[4, 6, f\]"),
        ({"k_taps": None}, "give both or neither"),
        ({"k_taps": torch.zeros(4, 6, 5), "q_taps": torch.zeros(4, 6, 5)}, "a narrower conv has zeros in front"),
        ({"activation": "gelu"}, "activation='gelu': choose one of None, 'silu'"),
        ({"gate_normalizer": 0}, "gate_normalizer=0: must be positive"),
        ({"mask": torch.ones(2, 5)}, r"mask is torch.float32 \[2, 5\]: must be bool"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "B=2 with cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0.0, 5])}, "cu_seqlens is torch.float32"),
        ({"state": ConvState(torch.zeros(1, 3, 4, 6), torch.zeros(2, 3, 2, 6))}, r"state.q is .*\[2, 3, 4, 6\]"),
        ({"q_taps": None, "k_taps": None, "state": ConvState(torch.zeros(1), torch.zeros(1))}, "or state=None"),
        ({"q_taps": None, "k_taps": None, "activation": "silu"}, "comes after the conv"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(change, message):
    (q, k, gate), weights = inputs(T=5, dtype=torch.float32)
    given = {"q": q, "k": k, "gate": gate, **weights, **change}
    with pytest.raises(ValueError, match=message) as caught:
        conv_features(**given)
    assert "\n" not in str(caught.value)


def test_a_step_needs_taps_and_a_state_of_its_own():
    (q, k, _), weights = inputs(T=1, dtype=torch.float32)
    state = ConvState.zeros(2, q, k)
    with pytest.raises(ValueError, match="a step needs taps and a state"):
        conv_features_step(q[:, 0], k[:, 0], **(weights | {"q_taps": None, "k_taps": None}), state=state)
    strided = ConvState(state.q.transpose(0, 1).contiguous().transpose(0, 1), state.k)
    with pytest.raises(ValueError, match="must be contiguous"):
        conv_features_step(q[:, 0], k[:, 0], **weights, state=strided)
