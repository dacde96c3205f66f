"""The linear attention reference against a double sum in fp64, the authors' form, and itself cut at every place."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_close

from accel.kernels.linear_attention import (
    State,
    fold,
    keep,
    linear_attention,
    linear_attention_step,
    linear_attention_terms,
    new_replay,
    reference,
    replay_step,
    replay_terms,
)


def inputs(B=2, T=33, H=4, Hk=4, Hv=2, Hg=1, K=8, V=6, steepest=0.3, seed=0):
    """Features are positive, as a feature map makes them; decays are uniform in log between 0 and -steepest."""
    draw = torch.Generator().manual_seed(seed)
    q, k = (torch.rand(B, T, heads, K, generator=draw) for heads in (H, Hk))
    v = torch.randn(B, T, Hv, V, generator=draw)
    return q, k, v, -steepest * torch.rand(B, T, Hg, K, generator=draw)


def some_state(B=2, H=4, K=8, V=6):
    draw = torch.Generator().manual_seed(9)
    return State(torch.randn(B, H, K, V, generator=draw), torch.rand(B, H, K, generator=draw))


def double_sum(q, k, v, log_decay):
    """Σ_{j ≤ t} Σ_c q_tc k_jc exp(Σ_{j < u ≤ t} g_uc) v_j in fp64, every pair of positions at once."""
    q, k, v, g = (x.double().repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (q, k, v, log_decay))
    T = q.shape[1]
    sums = torch.cat([torch.zeros_like(g[:, :1]), g.cumsum(1)], 1)[:, 1:]
    exponents = sums[:, :, None] - sums[:, None]
    causal = torch.ones(T, T, dtype=torch.bool).tril()[None, :, :, None]
    pairs = torch.einsum("bthk,bjhk,btjhk->btjh", q, k, exponents.clamp(max=0).exp()) * causal * q.shape[3] ** -0.5
    return torch.einsum("btjh,bjhv->bthv", pairs, v), pairs.sum(2)


def test_the_output_is_the_double_sum():
    given = inputs()
    num, den = double_sum(*given)
    got_num, got_den, _ = linear_attention_terms(*given)
    assert_close(got_num, num)
    assert_close(got_den, den)
    assert_close(linear_attention(*given)[0], num / (den[..., None] + 1e-10))


def test_the_output_is_the_authors_with_a_column_of_ones():
    """LAWCAT appends a one to v: the last column of the state is the denominator, gated and scaled like the rest."""
    q, k, v, g = inputs(T=20)
    H, K = q.shape[2:]
    k, v, g = (x.repeat_interleave(H // x.shape[2], 2).double() for x in (k, v, g))
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    s, outs = torch.zeros(2, H, K, v.shape[-1], dtype=torch.float64), []
    for t in range(20):
        s = g[:, t].exp()[..., None] * s + k[:, t, :, :, None] * v[:, t, :, None]
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t].double() * K**-0.5, s))
    o = torch.stack(outs, 1)
    got, state = linear_attention(*inputs(T=20))
    assert_close(got, o[..., :-1] / (o[..., -1:] + 1e-10))
    assert_close(state.s, s[..., :-1])
    assert_close(state.z, s[..., -1])


@pytest.mark.parametrize("T", [0, 1, 15, 16, 17, 64, 100])
@pytest.mark.parametrize("decay", ["mild", "mixed", "saturated"])
def test_chunks_are_the_recurrence(T, decay):
    q, k, v, g = inputs(T=T, Hv=4, Hg=4)
    if decay == "mixed":
        # stretches of every kind: 64 tokens that are mild, 16 that are, and some that are not
        g = g.clone()
        g[:, 20:40] *= 4
        g[:, 70:75] *= 60
    if decay == "saturated":
        # kept, forgotten at once, and small steps right after large ones
        steps = torch.tensor([-0.0, -1e-3, -30.0, -1e4, -torch.inf])
        g = steps[torch.randint(0, 5, g.shape, generator=torch.Generator().manual_seed(3))]
    expected = reference.recurrent(q, k, v, g, some_state(), 0.7)
    got = reference.chunked(q, k, v, g, some_state(), 0.7)
    for a, b in zip((*got[:2], *got[2]), (*expected[:2], *expected[2]), strict=True):
        assert_close(a, b)


def test_zeros_and_noise_are_far_from_the_output():
    out, _ = linear_attention(*inputs())
    for wrong in (torch.zeros_like(out), torch.randn_like(out)):
        with pytest.raises(AssertionError):
            assert_close(wrong, out, 0.1)


def test_the_denominator_makes_an_average():
    """With values all one the output is one wherever it starts, which no ungated denominator would give."""
    q, k, v, g = inputs()
    out, _ = linear_attention(q, k, torch.ones_like(v), g)
    torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize("cut", [0, 1, 15, 16, 17, 33])
def test_resuming_from_a_state_is_not_having_stopped(cut):
    given = inputs()
    whole, end = linear_attention(*given, initial_state=some_state())
    first, state = linear_attention(*(x[:, :cut] for x in given), initial_state=some_state())
    second, state = linear_attention(*(x[:, cut:] for x in given), initial_state=state)
    assert_close(torch.cat([first, second], 1), whole)
    assert_close(state.s, end.s)
    assert_close(state.z, end.z)


def test_packed_sequences_are_each_alone_and_empty_ones_keep_their_state():
    given = inputs(B=1, T=40)
    bounds = [0, 0, 17, 18, 18, 40]
    state = some_state(B=5)
    out, after = linear_attention(*given, initial_state=state, cu_seqlens=torch.tensor(bounds))
    for n in range(5):
        rows = slice(bounds[n], bounds[n + 1])
        alone, end = linear_attention(
            *(x[:, rows] for x in given), initial_state=State(state.s[n : n + 1], state.z[n : n + 1])
        )
        assert_close(out[:, rows], alone)
        assert_close(after.s[n : n + 1], end.s)
    assert torch.equal(after.s[0], state.s[0]) and torch.equal(after.z[3], state.z[3])


def test_padding_with_empty_keys_and_no_decay_changes_nothing():
    given = inputs()
    padded = [torch.cat([torch.zeros_like(x[:, :5]), x], 1) for x in given]
    padded[2][:, :5] = 7.0
    out, state = linear_attention(*given)
    out_padded, state_padded = linear_attention(*padded)
    assert_close(out_padded[:, 5:], out)
    assert_close(state_padded.z, state.z)


def test_steps_are_the_sequence_and_write_the_state_in_place():
    given = inputs(T=5)
    whole, end = linear_attention(*given, initial_state=some_state())
    state = some_state()
    outs = [linear_attention_step(*(x[:, t] for x in given), state) for t in range(5)]
    assert_close(torch.stack(outs, 1), whole)
    assert_close(state.s, end.s)
    assert_close(state.z, end.z)


@pytest.mark.parametrize("kept", [(0, 4), (1, 3), (2, 2), (3, 1), (4, 0)])
def test_a_replay_after_rejected_tokens_is_the_kept_ones_from_the_start(kept):
    """Forward 4, keep some, forward 3 others: buffers of 5 are folded on the way, buffers of 16 are not."""
    drafts, more = inputs(T=4), inputs(T=3, seed=1)
    counts = torch.tensor(kept)
    for capacity in (5, 16):
        state, replay = some_state(), new_replay(*drafts[1:], capacity)
        first = replay_step(*drafts, state, replay)
        assert_close(first, linear_attention(*drafts, initial_state=some_state())[0])
        keep(replay, counts)
        second = replay_step(*more, state, replay)
        keep(replay, torch.tensor([3, 3]))
        fold(state, replay)
        assert replay.length.tolist() == [0, 0]
        for b, n in enumerate(kept):
            text = [torch.cat([x[b : b + 1, :n], y[b : b + 1]], 1) for x, y in zip(drafts, more, strict=True)]
            start = State(*(x[b : b + 1] for x in some_state()))
            expected, end = linear_attention(*text, initial_state=start)
            assert_close(second[b : b + 1], expected[:, n:])
            assert_close(state.s[b : b + 1], end.s)
            assert_close(state.z[b : b + 1], end.z)


def test_replay_terms_are_the_two_sides_of_a_replay_step():
    drafts, more = inputs(T=4), inputs(T=3, seed=1)
    state, replay = some_state(), new_replay(*drafts[1:], 16)
    replay_terms(*drafts, state, replay)
    keep(replay, torch.tensor([4, 4]))
    text = [torch.cat(pair, 1) for pair in zip(drafts, more, strict=True)]
    wanted, below, _ = linear_attention_terms(*text, initial_state=some_state())
    numerator, denominator = replay_terms(*more, state, replay)
    assert_close(numerator, wanted[:, 4:])
    assert_close(denominator, below[:, 4:])
    assert_close(replay_step(*more, state, replay, eps=0.5), numerator / (denominator + 0.5)[..., None])


def test_a_replay_step_reads_the_state_and_leaves_it():
    given = inputs(T=3)
    state, replay = some_state(), new_replay(*given[1:], 8)
    replay_step(*given, state, replay)
    assert torch.equal(state.s, some_state().s) and replay.length.tolist() == [0, 0]


def test_a_floor_raises_the_steps_below_it():
    q, k, v, g = inputs(steepest=3.0)
    expected, _ = linear_attention(q, k, v, g.clamp(min=-1.0))
    assert_close(linear_attention(q, k, v, g, min_log_decay=-1.0)[0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.rand(2, 33, 3, 8)}, "the heads of k, v and log_decay must divide q's 4"),
        ({"k": torch.rand(2, 33, 4, 7)}, "must have one width K"),
        ({"v": torch.rand(2, 32, 2, 6)}, "agree before the heads"),
        ({"v": torch.rand(2, 33, 2, 6).bfloat16()}, "must have one type of float32"),
        ({"initial_state": some_state(B=3)}, r"initial_state is .* \[N, H, K, V\] = \[2, 4, 8, 6\]"),
        ({"cu_seqlens": torch.tensor([0, 33])}, r"for B = 2: it must be int32 or int64 \[N\+1\]"),
        ({"min_log_decay": 0.5}, r"min_log_decay=0\.5: log decays are at most 0"),
    ],
)
def test_bad_input_is_refused_in_one_line(change, message):
    names = dict(zip(("q", "k", "v", "log_decay"), inputs(), strict=True))
    with pytest.raises(ValueError, match=message):
        linear_attention(**{**names, **change})


def test_a_replay_buffer_that_does_not_fit_is_refused():
    given = inputs(T=4)
    with pytest.raises(ValueError, match="4 tokens for a replay buffer of 3"):
        replay_step(*given, some_state(), new_replay(*given[1:], 3))
    with pytest.raises(ValueError, match="make the buffer with new_replay"):
        replay_step(*given, some_state(), new_replay(given[0], given[0], given[0], 8))
    with pytest.raises(ValueError, match="capacity=0"):
        new_replay(*given[1:], 0)
    with pytest.raises(ValueError, match=r"room=9: must be 0\.\.8"):
        fold(some_state(), new_replay(*given[1:], 8), room=9)
    with pytest.raises(ValueError, match="it must be integers"):
        keep(new_replay(*given[1:], 8), torch.ones(2))
