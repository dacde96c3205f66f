"""The prefix_attention kernels against their reference: interpreted without a GPU, compiled with one."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from itertools import product

import pytest
import torch
from kernel_checks import DEVICE, assert_close, random

import accel.kernels.prefix_attention as family
from accel.kernels.prefix_attention import SharedKV, plan, reference
from accel.kernels.prefix_attention import triton as kernels

pytestmark = pytest.mark.kernel


def a_copy():
    """The kernels' module once more, for tiles that fp32 is not launched with (and that are not compiled for it).

    Half precision cannot be interpreted, so its tiles are tried in fp32; smaller ones put more edges into a test.
    """
    spec = spec_from_file_location("retiled_prefix_attention", kernels.__file__)
    module = module_from_spec(spec)
    # dataclasses look a class's module up
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


retiled = a_copy()


@contextmanager
def tiled(module, b_M, b_N, two_loops=True):
    chosen = module.tiles

    def tiles(dtype, D, queries, biased=False):
        return module.Tiles(b_M, b_N, chosen(dtype, D, queries).b_D, two_loops, 8, 2)

    module.tiles = tiles
    try:
        yield
    finally:
        module.tiles = chosen


def step(starts, n, H, Hkv, D, Dv=None, segments=(), biased=(), window=None, dtype=torch.float32):
    """Query, keys, values, plan, segments of a step; ``segments``: (length, rows that read it).

    ``biased``: which segments have a bias. It hides half a segment from the first head and every fifth slot from the
    last one: whole tiles, slots between others, and all of a segment of one slot.
    """
    R, L, Dv = len(starts), max(starts) + n, Dv or D
    query, keys = random(R, H, n, D, dtype=dtype), random(R, Hkv, L, D, seed=1, dtype=dtype)
    values = random(R, Hkv, L, Dv, seed=2, dtype=dtype)
    offsets, shared = [0] * R, []
    for seed, (P, rows) in enumerate(segments, 10):
        first = max(offsets[r] for r in rows)
        k, v = random(Hkv, P, D, seed=seed, dtype=dtype), random(Hkv, P, Dv, seed=seed + 50, dtype=dtype)
        bias = None
        if seed - 10 in biased:
            bias = random(P, Hkv, seed=seed + 100, scale=2.0).T
            bias[0, : P // 2], bias[-1, ::5] = -torch.inf, -torch.inf
        shared.append(SharedKV(k, v, rows, first, bias))
        for r in rows:
            offsets[r] = first + P
    made = plan(starts, n, offsets, window=window, device=torch.device(DEVICE), dtype=dtype)
    return query, keys, values, made, shared


def spoilt(keys, made):
    """The tails with NaN behind every row's own length, in a buffer with room around them."""
    R, Hkv, L, D = keys.shape
    wide = torch.full((R + 1, L + 3, Hkv, D), torch.nan, device=keys.device, dtype=keys.dtype)
    tails = wide[1:, 1 : L + 1].transpose(1, 2)
    for r, start in enumerate(made.starts):
        tails[r, :, : start + made.n] = keys[r, :, : start + made.n]
    return tails


def check(module, *shape, softcap=None, keys_per_split=None, tolerance=1e-5, **of_step):
    query, keys, values, made, segments = step(*shape, **of_step)
    scale = query.shape[3] ** -0.5
    got = module.prefix_attention(
        query, spoilt(keys, made), spoilt(values, made), made, segments,
        scale=scale, softcap=softcap, keys_per_split=keys_per_split,
    )  # fmt: skip
    full = (t.float() for t in (query, keys, values))
    precise = [replace(s, keys=s.keys.float(), values=s.values.float()) for s in segments]
    made = plan(
        made.starts, made.n, [p - s for p, s in zip(made.first_query_positions, made.starts, strict=True)],
        window=made.window, device=made.device, dtype=torch.float32,
    )  # fmt: skip
    expected = reference.prefix_attention(*full, made, precise, scale=scale, softcap=softcap)
    assert got.dtype == query.dtype
    assert_close(got.float(), expected, tolerance)


@pytest.mark.parametrize("n", [1, 2, 5, 17])
@pytest.mark.parametrize("start", [0, 62, 64, 1000])
def test_a_step_at_every_length_of_tail(n, start):
    with tiled(retiled, 32, 128):
        check(retiled, [start], n, 2, 1, 64)


@pytest.mark.parametrize("D", [8, 64, 80, 96, 128, 256])
def test_head_sizes(D):
    check(kernels, [0, 40], 2, 2, 1, D)


def test_values_of_another_size_than_keys():
    check(kernels, [0, 40], 3, 2, 1, 96, Dv=130)
    check(kernels, [0, 40], 3, 2, 2, 130, Dv=20, segments=((5, (0, 1)),))


@pytest.mark.parametrize(("H", "Hkv"), [(3, 3), (4, 1), (8, 2), (16, 2), (9, 3), (1, 1)])
def test_groups(H, Hkv):
    with tiled(retiled, 32, 64):
        check(retiled, [7, 70], 3, H, Hkv, 64)


@pytest.mark.parametrize(("n", "starts", "window"), [(63, [0], None), (64, [0, 130], 30), (65, [0, 130], None)])
def test_prefill(n, starts, window):
    with tiled(retiled, 64, 32):
        check(retiled, starts, n, 3, 1, 64, window=window)


@pytest.mark.parametrize("two_loops", [False, True])
@pytest.mark.parametrize(("window", "softcap"), [(1, None), (2, 1.5), (31, None), (32, 1.5), (33, None), (1000, 1.5)])
def test_windows(window, softcap, two_loops):
    with tiled(retiled, 16, 32, two_loops):
        check(retiled, [0, 31, 150], 5, 2, 1, 64, window=window, softcap=softcap)


def test_windows_in_parts():
    with tiled(retiled, 16, 32):
        check(retiled, [0, 31, 150], 5, 2, 1, 64, window=50, keys_per_split=32)


@pytest.mark.parametrize("keys_per_split", [None, 32, 96])
@pytest.mark.parametrize("n", [1, 17])
def test_splits_are_merged(keys_per_split, n):
    with tiled(retiled, 64, 32):
        check(retiled, [300, 3, 64], n, 2, 1, 64, Dv=70, keys_per_split=keys_per_split)


def check_many_parts(module):
    with tiled(module, 16, 16):
        check(module, [540], 1, 1, 1, 64, keys_per_split=16)  # 34 parts, more than the merge takes at a time


def test_many_parts_are_merged():
    check_many_parts(retiled)


# (size, rows that read it); rows without a segment have their tail alone
SEGMENTS = {
    "one": ((65, (0, 1, 2, 3)),),
    "by some": ((63, (3, 1)),),
    "one each": ((1, (0,)), (65, (1,)), (63, (2,))),
    "overlapping": ((65, (0, 1, 2)), (1, (0, 2)), (130, (1, 2))),
}


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize(("n", "window", "softcap"), [(1, None, None), (5, 50, None), (2, None, 2.0)])
def test_segments(segments, n, window, softcap):
    with tiled(retiled, 32, 128):
        check(retiled, [0, 5, 90, 33], n, 2, 1, 64, segments=segments, window=window, softcap=softcap)


def test_segments_in_parts():
    with tiled(retiled, 16, 32):
        check(retiled, [0, 5, 40], 3, 4, 2, 80, segments=SEGMENTS["overlapping"], keys_per_split=64, window=90)


@pytest.mark.parametrize("two_loops", [False, True])
@pytest.mark.parametrize(
    ("n", "window", "softcap", "keys_per_split"), [(1, None, None, None), (5, 50, 2.0, None), (3, None, None, 64)]
)
def test_bias(n, window, softcap, keys_per_split, two_loops):
    with tiled(retiled, 16, 32, two_loops):
        # the first segment has none
        check(retiled, [0, 5, 90, 33], n, 4, 2, 64, segments=SEGMENTS["overlapping"], biased=(1, 2), window=window,
              softcap=softcap, keys_per_split=keys_per_split)  # fmt: skip


def test_a_segment_without_a_visible_slot_adds_nothing():
    query, keys, values, made, shared = step([0, 40], 3, 4, 2, 64, segments=((70, (0, 1)),), biased=(0,))
    shared[0].bias[:] = -torch.inf
    expected = reference.prefix_attention(query, keys, values, made, scale=0.125)
    with tiled(retiled, 16, 16):
        got = retiled.prefix_attention(query, keys, values, made, shared, scale=0.125, keys_per_split=32)
    assert_close(got, expected)


def test_prefill_over_a_segment():
    with tiled(retiled, 64, 64):
        check(retiled, [0, 0], 65, 2, 1, 64, segments=((63, (0, 1)), (65, (1,))))


def test_the_tiles_that_fp32_runs_with():
    check(kernels, [0, 50], 9, 4, 2, 64, segments=((33, (1,)),))
    check(kernels, [0, 50], 9, 4, 2, 64, segments=((33, (1,)), (70, (0, 1))), biased=(1,))
    check(kernels, [0, 50], 3, 4, 2, 128, segments=((33, (1,)),), biased=(0,), softcap=2.0)
    check(kernels, [0, 50], 3, 4, 2, 128, window=20)


@pytest.mark.parametrize("queries", [16, 64, 128])
@pytest.mark.parametrize(("D", "biased"), [(64, ()), (96, ()), (64, (0,))])
def test_the_tiles_that_half_precision_runs_with(queries, D, biased):
    t = kernels.tiles(torch.bfloat16, D, queries, bool(biased))
    with tiled(retiled, t.b_M, t.b_N, t.two_loops):
        check(retiled, [0, 200], queries // 4 - 1, 4, 1, D, segments=((70, (0, 1)),), biased=biased, window=150)


def test_a_row_does_not_depend_on_its_neighbours():
    query, keys, values, made, _ = step([70, 130, 3], 2, 2, 1, 64)
    scale, device = 0.125, torch.device(DEVICE)
    together = kernels.prefix_attention(query, keys, values, made, scale=scale, keys_per_split=64)
    for r, start in enumerate(made.starts):
        # its splits are as long as in the batch, if fewer
        one = plan([start], 2, [0], window=None, device=device, dtype=torch.float32)
        end = start + 2
        alone = kernels.prefix_attention(
            query[r : r + 1], keys[r : r + 1, :, :end], values[r : r + 1, :, :end], one, scale=scale, keys_per_split=64
        )
        assert torch.equal(alone[0], together[r])


def test_saturated_scores():
    query, keys, values, made, shared = step([0, 90], 3, 4, 2, 64, segments=((40, (0, 1)),))
    query *= 300.0  # softmax is nearly one-hot, exp() of a raw score would overflow
    got = kernels.prefix_attention(query, keys, values, made, shared, scale=0.125)
    expected = reference.prefix_attention(query, keys, values, made, shared, scale=0.125)
    # scores near 1e3 carry 6e-5 of rounding in fp32, and exp() turns that into a relative error
    assert_close(got, expected, 1e-3)


def test_keys_that_no_query_reaches_are_not_read_and_weigh_nothing():
    # row 0 reaches back into the segment, for the others the window has left it behind
    query, keys, values, made, shared = step([0, 50], 1, 2, 1, 64, segments=((40, (0, 1)),), biased=(0,), window=20)
    expected = reference.prefix_attention(query, keys, values, made, shared, scale=0.125)
    shared[0].keys[:, :16], shared[0].values[:, :16], shared[0].bias[:, :16] = torch.nan, torch.nan, torch.nan
    with tiled(retiled, 16, 16):
        assert_close(retiled.prefix_attention(query, keys, values, made, shared, scale=0.125), expected)


def test_the_step_is_scheduled_once_and_no_mask_is_made():
    query, keys, values, made, shared = step([0, 40], 2, 2, 1, 64, segments=((9, (0, 1)),))
    for _ in range(3):
        kernels.prefix_attention(query, keys, values, made, shared, scale=0.125)
    assert len(made.derived) == 1
    assert "mask" not in vars(made)
    # with a bias, tiles may be other ones
    kernels.prefix_attention(query, keys, values, made, [replace(shared[0], bias=random(1, 9))], scale=0.125)
    assert len(made.derived) == 2


def test_a_segment_with_a_bias_has_the_tiles_that_are_compiled_for_it():
    made, shared = step([0, 40], 10, 4, 1, 64, segments=((9, (0, 1)), (9, (0, 1))), biased=(1,))[3:]
    launches = kernels._schedule(made, torch.bfloat16, 64, 4, 1, shared, None).launches
    expected = [(40, False), (80, False), (80, True)]
    assert [launch.tiles for launch in launches] == [kernels.tiles(torch.bfloat16, 64, *of) for of in expected]
    assert launches[1].tiles != launches[2].tiles


def test_the_public_function_takes_the_kernels_where_they_run_and_can(monkeypatch):
    query, keys, values, made, shared = step([0, 40], 2, 2, 1, 64, segments=((9, (0, 1)),), biased=(0,))
    monkeypatch.setattr(family, "runs_triton", lambda x: True)
    expected = reference.prefix_attention(query, keys, values, made, shared, scale=0.125)
    assert_close(family.prefix_attention(query, keys, values, made, shared, scale=0.125), expected)
    assert made.derived
    made.derived.clear()
    # the kernels have no backward pass
    for asked in (query, shared[0].bias):
        asked.requires_grad_()
        family.prefix_attention(query, keys, values, made, shared, scale=0.125).sum().backward()
        assert asked.grad is not None and asked.grad.isfinite().all() and not made.derived
        asked.requires_grad_(False)


def test_parts_that_see_nothing_merge_to_zero():
    lse = torch.full((2, 3), -torch.inf, device=DEVICE)  # [parts, queries]
    lse[1, 2] = 0.5
    part = random(2, 3, 64)
    count = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    place = torch.tensor([[0, 0], [3, 0]], dtype=torch.int32, device=DEVICE)
    out = torch.full((3, 64), torch.nan, device=DEVICE)
    kernels._merge[(1, 1)](part, lse, count, place, out, 3, 3, 1, 1, 2, 64, 64, b_Q=8, b_P=4, b_D=64)
    assert_close(out, torch.cat([torch.zeros(2, 64, device=DEVICE), part[1, 2:]]))


def test_splits_fill_the_machine_and_no_more():
    assert kernels.splits(programs=1000, n_tiles=8) == 1  # enough without
    assert kernels.splits(programs=8, n_tiles=4) == 1  # too short to be worth a merge
    assert kernels.splits(programs=8, n_tiles=2048) == 33  # one 128K row of 8 key heads
    assert kernels.splits(programs=1, n_tiles=1) == 1
    assert kernels.splits(programs=8192, n_tiles=512) == 1  # a prefill


def test_nothing_but_listed_configurations_is_launched():
    names = ("b_M", "b_N", "b_D", "TWO_LOOPS", "SOFTCAP", "HAS_BIAS")
    builds = [b for b in kernels.builds() if "b_M" in b.constants]
    listed = {(*(b.constants[name] for name in names), b.num_warps, b.num_stages) for b in builds}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for D in (1, 8, 64, 80, 96, 128, 192, 256):
            for queries in (1, 16, 17, 64, 65, 10_000):
                for softcap, biased in product((False, True), repeat=2):
                    t = kernels.tiles(dtype, D, queries, biased)
                    sizes = t.b_M, t.b_N, t.b_D, t.two_loops
                    assert (*sizes, softcap, biased, t.num_warps, t.num_stages) in listed


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)])
@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("n", [1, 5, 17, 300])
def test_half_precision(dtype, tolerance, D, n):
    # weights and the result are rounded to 8 (bf16, 2^-9 each at most) or 11 bits; sums are fp32
    for window, softcap, segments in ((None, None, ()), (100, 30.0, ()), (None, None, ((700, (0, 2)), (63, (1,))))):
        check(kernels, [0, 1000, 65], n, 16, 4, D, dtype=dtype, tolerance=tolerance,
              window=window, softcap=softcap, segments=segments)  # fmt: skip
    segments = ((700, (0, 2)), (63, (1,)), (130, (0, 1)))
    for softcap in (None, 30.0):
        check(kernels, [0, 1000, 65], n, 16, 4, D, dtype=dtype, tolerance=tolerance, segments=segments, biased=(0, 1),
              softcap=softcap)  # fmt: skip
    check(kernels, [0, 0], n, 16, 4, D, dtype=dtype, tolerance=tolerance)  # what torch's own kernel may take


def check_prefill(module):
    with tiled(module, 16, 16):
        check(module, [0, 20], 17, 2, 1, 64, window=25)


def check_parts(module):
    with tiled(module, 16, 32):
        check(module, [70, 3], 3, 4, 2, 64, segments=((33, (0, 1)), (5, (1,))), keys_per_split=32)


def check_bias(module):
    with tiled(module, 16, 32):
        check(module, [70, 3], 3, 4, 2, 64, segments=((70, (0, 1)), (33, (1,))), biased=(0,))


MUTATIONS = [
    ("_attend", "mask off by one", "(key <= last[:, None])", "(key < last[:, None])", check_prefill),
    ("_attend", "window off by one", "position - window + 1, 0)", "position - window, 0)", check_prefill),
    ("_attend", "sum not rescaled", "total * rest + tl.sum(p, 1)", "total + tl.sum(p, 1)", check_prefill),
    ("_attend", "wrong row stride", "p_k += i_r * stride_kr", "p_k += i_r // 2 * stride_kr", check_prefill),
    ("_attend", "hidden tiles go unmasked", "tl.min(tl.where(m_m, last, length - 1), 0) + 1)",
     "tl.max(tl.where(m_m, last, 0), 0) + 1)", check_prefill),
    ("_attend", "padding is read", "m_v = m_v & (start + o_n < end)[:, None]",
     "m_v = m_v & (start + o_n < end + 1)[:, None]", check_prefill),
    ("_attend", "wrong head of the group", "head = o_m // (n * groups), o_m // groups % n, i_h * groups + o_m % groups",
     "head = o_m // (n * groups), o_m // groups % n, i_h * groups", check_parts),
    ("_attend", "lse without its sum", "m + tl.log2(tl.where(seen, total, 1.0))", "m", check_parts),
    ("_attend", "cap · tanh off", "cap * (1.0 - 2.0 /", "cap * (1.0 - 1.0 /",
     lambda m: check(m, [20], 1, 1, 1, 64, softcap=2.0)),
    ("_attend", "another head's bias", "p_bias += i_h.to(tl.int64) * length", "p_bias += 0 * length", check_bias),
    ("_attend", "the first tile's bias", "p_bias + start + o_n", "p_bias + o_n", check_bias),
    ("_attend", "bias in powers of e", "bias * LOG2E", "bias", check_bias),
    ("_merge", "last part left out", "(i_p + o_p)[None, :] < count", "(i_p + o_p)[None, :] < -1 + count", check_parts),
    ("_merge", "wrong normaliser", "tl.where(total > 0.0, total, 1.0)", "tl.where(total > 0.0, 1.0, 1.0)", check_parts),
    ("_merge", "wrong row stride", "row[:, None] * n_parts", "row[:, None] * (n_parts - 1)", check_parts),
    ("_merge", "sum not rescaled", "acc = acc * rest[:, None] +", "acc = acc +", check_many_parts),
]  # fmt: skip
