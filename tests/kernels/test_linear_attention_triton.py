"""The linear attention kernels against their reference: interpreted without a GPU, compiled with one."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, assert_close, random

from accel.kernels.linear_attention import Replay, State, keep, new_replay, reference
from accel.kernels.linear_attention import triton as kernels

pytestmark = pytest.mark.kernel

# a bound that the random decays keep: the kernel for bounded decays then computes the same function
BOUND = -2.0


def inputs(B=1, T=33, H=2, Hk=2, Hv=1, Hg=1, K=64, V=32, steepest=1.0, seed=0, dtype=torch.float32):
    """Positive features, as a feature map makes them; decays between 0 and -steepest."""
    q, k = (random(B, T, heads, K, seed=seed + i).abs().to(dtype) for i, heads in enumerate((H, Hk)))
    v = random(B, T, Hv, V, seed=seed + 2, dtype=dtype)
    return q, k, v, -steepest * random(B, T, Hg, K, seed=seed + 3).sigmoid()


def some_state(N=1, H=2, K=64, V=32):
    return State(random(N, H, K, V, seed=20), random(N, H, K, seed=21).abs())


def assert_states(got, expected):
    assert_close(got.s, expected.s, what="state")
    assert_close(got.z, expected.z, what="denominator's state")


def check(module, given=None, state=None, **options):
    given = inputs() if given is None else given
    segments = options.pop("segments", 1)
    got, after = module.linear_attention(*given, initial_state=state, segments=segments, **options)
    expected, expected_after = reference.linear_attention(*given, initial_state=state, **options)
    assert_close(got, expected, what="output")
    assert_states(after, expected_after)


def check_terms(module, given=None, **options):
    given = inputs() if given is None else given
    segments = options.pop("segments", 1)
    *got, after = module.linear_attention_terms(*given, segments=segments, **options)
    *expected, expected_after = reference.linear_attention_terms(*given, **options)
    assert_close(got[0], expected[0], what="numerator")
    assert_close(got[1], expected[1], what="denominator")
    assert_states(after, expected_after)


def check_step(module, B=2, K=64, V=64, H=2, Hv=1, **options):
    given = [x[:, 0] for x in inputs(B, 1, H=H, Hk=H, Hv=Hv, K=K, V=V)]
    states = [some_state(B, H, K, V) for _ in range(2)]
    got = module.linear_attention_step(*given, states[0], **options)
    assert_close(got, reference.linear_attention_step(*given, states[1], **options), what="output")
    assert_states(*states)


def check_replay(module, capacity=8, counts=((4, 0), (1, 3)), n=4, K=64, V=32, **options):
    """Rounds of n tokens of which a ragged number stays, as a speculative decoder makes them; folded where full."""
    rounds = [inputs(2, n, K=K, V=V, seed=10 * i) for i in range(len(counts) + 1)]
    states = [some_state(2, 2, K, V) for _ in range(2)]
    replays = [new_replay(*rounds[0][1:], capacity) for _ in range(2)]
    for replay in replays:
        for buffer in (replay.k, replay.v, replay.log_decay):
            buffer.fill_(torch.nan)
    for i, given in enumerate(rounds):
        copies = [Replay(r.k.clone(), r.v.clone(), r.log_decay.clone(), r.length.clone()) for r in replays]
        clones = [State(state.s.clone(), state.z.clone()) for state in states]
        terms = {name: value for name, value in options.items() if name != "eps"}
        numerator, denominator = module.replay_terms(*given, clones[0], copies[0], **terms)
        wanted, below = reference.replay_terms(*given, clones[1], copies[1], **terms)
        assert_close(numerator, wanted, what="numerator")
        assert_close(denominator, below, what="denominator")
        got = module.replay_step(*given, states[0], replays[0], **options)
        expected = reference.replay_step(*given, states[1], replays[1], **options)
        assert_close(got, expected, what="output")
        assert replays[0].length.tolist() == replays[1].length.tolist(), "lengths"
        for replay in replays:
            keep(replay, torch.tensor(counts[i] if i < len(counts) else (n, 1), device=DEVICE))
    for room in (capacity // 2, None):
        module.fold(states[0], replays[0], room=room)
        reference.fold(states[1], replays[1], room=room)
        assert replays[0].length.tolist() == replays[1].length.tolist(), "lengths"
        assert_states(*states)


@pytest.mark.parametrize("bound", [None, BOUND])
@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65, 130])
def test_lengths(T, bound):
    check(kernels, inputs(T=T, H=1, Hk=1), some_state(H=1), min_log_decay=bound)


# the slow kernel for any decay has as many programs of values as the other: one of them is enough
WIDTHS = [(80, 80), (96, 96), (128, 128), (256, 256), (16, 40)]


@pytest.mark.parametrize(("K", "V", "bound"), [(*w, BOUND) for w in WIDTHS] + [(K, 16, None) for K, _ in WIDTHS])
def test_head_widths(K, V, bound):
    check(kernels, inputs(T=9, K=K, V=V, H=1, Hk=1), some_state(1, 1, K, V), min_log_decay=bound)


@pytest.mark.parametrize("bound", [None, BOUND])
def test_batches_and_groups(bound):
    check(kernels, inputs(3, 3, H=4, Hk=4, Hv=1, Hg=2), min_log_decay=bound)
    check(
        kernels,
        inputs(2, 3, H=4, Hk=1, Hv=4, Hg=1),
        some_state(2, 4),
        scale=0.3,
        eps=0.5,
        min_log_decay=bound,
    )


def test_a_long_sequence():
    check(kernels, inputs(T=1000, H=1, Hk=1, steepest=0.05), min_log_decay=BOUND)


def test_no_tokens_keep_the_state():
    out, after = kernels.linear_attention(*inputs(T=0), initial_state=some_state())
    assert out.shape == (1, 0, 2, 32)
    assert_states(after, some_state())
    assert kernels.linear_attention(*inputs(B=0))[0].shape == (0, 33, 2, 32)


@pytest.mark.parametrize(("T", "segments"), [(64, 3), (65, 2), (200, 3), (200, 9)])
def test_segments_are_the_whole(T, segments):
    check(kernels, inputs(T=T, H=1, Hk=1, steepest=0.1), some_state(1, 1), min_log_decay=BOUND, segments=segments)


@pytest.mark.parametrize("bound", [None, BOUND])
@pytest.mark.parametrize("segments", [1, 3])
def test_packed_sequences(segments, bound):
    bounds = torch.tensor([0, 0, 66, 67, 67, 70], dtype=torch.int64, device=DEVICE)
    given = inputs(T=70, H=1, Hk=1)
    check(kernels, given, some_state(5, 1), cu_seqlens=bounds, min_log_decay=bound, segments=segments)
    check_terms(kernels, given, cu_seqlens=bounds.int(), min_log_decay=bound, segments=segments)


@pytest.mark.parametrize("steps", [[-0.0], [-30.0], [-1e4], [-torch.inf], [-0.0, -1e-3, -30.0, -1e4, -torch.inf]])
def test_any_decay(steps):
    q, k, v, g = inputs(T=66, H=1, Hk=1)
    which = torch.randint(0, len(steps), g.shape, generator=torch.Generator().manual_seed(3))
    g = torch.tensor(steps)[which].to(DEVICE)
    check(kernels, (q, k, v, g), some_state(H=1), segments=2)


def test_the_steepest_bounded_decay():
    q, k, v, g = inputs(T=40, H=1, Hk=1)
    g = torch.where(g < -0.3, torch.full_like(g, -100.0), torch.full_like(g, kernels.STEEPEST))
    check(kernels, (q, k, v, g), some_state(H=1), min_log_decay=kernels.STEEPEST)
    check(kernels, (q, k, v, g), some_state(H=1), min_log_decay=kernels.STEEPEST * 2)


def test_features_at_the_smallest():
    """What LAWCAT clamps features to: 1e-12 each, so that the denominator is of the size of eps."""
    q, k, v, g = inputs(T=20)
    for bound in (None, BOUND):
        check(kernels, (q * 1e-12, k, v, g), min_log_decay=bound)


@pytest.mark.parametrize("cut", [1, 16, 32, 47])
def test_resuming_from_a_state_is_not_having_stopped(cut):
    given = inputs(T=48)
    whole, end = kernels.linear_attention(*given, min_log_decay=BOUND)
    first, state = kernels.linear_attention(*(x[:, :cut] for x in given), min_log_decay=BOUND)
    second, state = kernels.linear_attention(*(x[:, cut:] for x in given), initial_state=state, min_log_decay=BOUND)
    assert_close(torch.cat([first, second], 1), whole)
    assert_states(state, end)


def test_strided_inputs_are_read_where_they_are():
    given = inputs(2, 20)
    wide = [torch.full((2, 2, 25, 3, x.shape[3]), torch.nan, device=DEVICE) for x in given]
    views = [w[:, 1, 3:23, : x.shape[2]] for w, x in zip(wide, given, strict=True)]
    for view, x in zip(views, given, strict=True):
        view.copy_(x)
    check(kernels, views, min_log_decay=BOUND)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    check(kernels, heads_first, min_log_decay=BOUND)


def test_what_lies_beyond_a_sequence_is_not_read():
    given = [torch.full((1, 90, *x.shape[2:]), torch.nan, device=DEVICE) for x in inputs()]
    for poisoned, x in zip(given, inputs(T=37), strict=True):
        poisoned[:, 10:47] = x
    bounds = torch.tensor([10, 47], device=DEVICE)
    for bound in (None, BOUND):
        out, after = kernels.linear_attention(*given, cu_seqlens=bounds, min_log_decay=bound, segments=2)
        expected, expected_after = reference.linear_attention(*inputs(T=37), min_log_decay=bound)
        assert_close(out[:, 10:47], expected)
        assert_states(after, expected_after)


@pytest.mark.parametrize("bound", [None, BOUND])
def test_terms(bound):
    check_terms(kernels, min_log_decay=bound)


@pytest.mark.parametrize(("K", "V"), [(64, 64), (80, 96), (128, 128), (256, 256), (20, 30)])
def test_step(K, V):
    check_step(kernels, K=K, V=V)


def test_a_step_is_a_sequence_of_one():
    given = inputs(2, 1, H=4, Hk=2, Hv=1)
    state = some_state(2, 4)
    expected, end = kernels.linear_attention(*given, initial_state=state, min_log_decay=BOUND)
    assert_close(kernels.linear_attention_step(*(x[:, 0] for x in given), state), expected[:, 0])
    assert_states(state, end)


@pytest.mark.parametrize(("kept", "bound"), [((0, 5), BOUND), ((1, 4), BOUND), ((2, 3), BOUND), ((2, 3), None)])
def test_replay(kept, bound):
    check_replay(kernels, 12, (kept, kept[::-1]), 5, min_log_decay=bound)


def test_replay_of_one_token_and_of_a_whole_buffer():
    check_replay(kernels, 2, ((1, 0), (1, 1), (0, 1)), 1, min_log_decay=BOUND)
    check_replay(kernels, 4, ((4, 2),), 4, K=80, V=96, min_log_decay=BOUND)


@pytest.mark.gpu
@pytest.mark.parametrize("bound", [None, BOUND])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, bound):
    """Gated operands are rounded to bf16, 2^-9 each; a few of them meet in a sum of positive pairs: 1 %."""
    for K in (64, 128, 256):
        given = inputs(2, 300, H=4, Hk=4, K=K, V=K, steepest=0.2, dtype=dtype)
        exact = [x.float() for x in given]
        got, after = kernels.linear_attention(*given, min_log_decay=bound, segments=2)
        expected, expected_after = reference.linear_attention(*exact, min_log_decay=bound)
        assert_close(got.float(), expected, 1e-2)
        assert_close(after.s, expected_after.s, 1e-2)
        assert_close(after.z, expected_after.z, 1e-2)


def check_all(module):
    for bound in (None, BOUND):
        check(module, inputs(T=35), some_state(), min_log_decay=bound)


def check_segments(module):
    bounds = torch.tensor([0, 130, 140], device=DEVICE)
    check(
        module,
        inputs(T=140, K=72, steepest=0.05),
        some_state(2, K=72),
        cu_seqlens=bounds,
        min_log_decay=BOUND,
        segments=3,
    )


def check_bounded_replay(module):
    check_replay(module, min_log_decay=BOUND)


MUTATIONS = [
    ("_outputs", "a token does not see itself", "o_c[:, None] >= o_c[None, :]", "o_c[:, None] > o_c[None, :]",
     check_all),
    ("_outputs", "not divided", "tl.where(normalize != 0, den + eps, 1.0)",
     "tl.where(normalize != 0, den * 0.0 + 1.0, 1.0)", check_all),
    ("_outputs", "mask off by one", "asked = (o_c < n) &", "asked = (o_c < n - 1) &", check_all),
    ("_outputs", "wrong row stride", "p_v += C * v_t", "p_v += (C - 1) * v_t", check_all),
    ("_outputs", "new token decayed", "(o_c[:, None] < i, k * a_i", "(o_c[:, None] <= i, k * a_i", check_all),
    ("_outputs", "state's share of the denominator lost", "den += tl.sum(q * z[None, :], 1)", "den += 0.0", check_all),
    ("_states", "a token decays itself", "p_g + (o_c + 1)[:, None] * g_t", "p_g + o_c[:, None] * g_t", check_segments),
    ("_states", "wrong row stride", "p_k += C * k_t", "p_k += (C - 1) * k_t", check_segments),
    ("_states", "first decay lost", "whole = g_first + tl.sum(g, 0)", "whole = tl.sum(g, 0)", check_segments),
    ("_states", "mask off by one", "inside = t + o_c < end", "inside = t + o_c < end - 1", check_segments),
    ("_prefixes", "not decayed", "s = decay[:, None] * s +", "s = s +", check_segments),
    ("_prefixes", "denominator not decayed", "z = decay * z +", "z = z +", check_segments),
    ("_prefixes", "mask off by one", "m_k = o_k < K", "m_k = o_k < K - 1", check_segments),
    ("_prefixes", "wrong row stride", "o_s = o_k[:, None] * V", "o_s = o_k[:, None] * (V - 1)", check_segments),
    ("_step", "new token decayed", "z = a * z + k", "z = a * (z + k)", check_step),
    ("_step", "wrong normaliser", "den = tl.sum(q * z, 0) + eps", "den = tl.sum(z, 0) + eps", check_step),
    ("_step", "wrong row stride", "(i_h // v_group) * v_h", "i_h // (2 * v_group) * v_h",
     lambda m: check_step(m, Hv=2)),
    ("_step", "mask off by one", "tl.arange(0, b_K) < K", "tl.arange(0, b_K) < K - 1", check_step),
    ("_append", "overwrites the last kept one", "length + i_t", "tl.maximum(length - 1, 0) + i_t",
     check_bounded_replay),
    ("_append", "full rows not emptied", "tl.where(length > capacity - n_rows, 0, length)",
     "tl.where(length > capacity - n_rows, 1, length)", check_bounded_replay),
    ("_append", "mask off by one", "x, mask=o < Hk * K)", "x, mask=o < Hk * K - 1)", check_bounded_replay),
    ("_append", "wrong row stride", "i_b * v_b + i_t * v_t", "i_b * v_b + i_t // 2 * v_t", check_bounded_replay),
]  # fmt: skip
