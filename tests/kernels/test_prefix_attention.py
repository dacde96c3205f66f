"""Prefix attention against a softmax over each row's keys, laid out one after the other, in fp64.

Tolerance: RMS(error)/RMS(reference) ≤ 1e-5. fp32 keeps 6e-8 per operation; a few hundred terms and the two exp of a
merge leave it near 3e-7, so 1e-5 has room for another BLAS and none for a wrong mask.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from accel.kernels.prefix_attention import Plan, SharedKV, plan, prefix_attention, reference
from accel.kernels.prefix_attention.reference import groups

TOLERANCE = 1e-5
DIM, VALUE_DIM = 8, 6


class Case:
    """Random tails and segments, the inputs of the kernel, and the answer by brute force.

    ``biased``: which of the segments have a bias.
    """

    def __init__(
        self,
        starts: list[int],
        n: int,
        *,
        heads: int = 4,
        kv_heads: int = 2,
        segments: tuple[tuple[int, tuple[int, ...]], ...] = (),
        biased: tuple[int, ...] = (),
        window: int | None = None,
        softcap: float | None = None,
        seed: int = 0,
    ) -> None:
        gen = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=gen)

        rows, length = len(starts), max(starts) + n
        self.starts, self.n, self.window, self.softcap = starts, n, window, softcap
        self.query = 2 * normal(rows, heads, n, DIM)
        self.keys, self.values = normal(rows, kv_heads, length, DIM), normal(rows, kv_heads, length, VALUE_DIM)
        self.segments: list[SharedKV] = []
        # a row's segments stand one behind the other, then its tail
        self.offsets = [0] * rows
        for index, (size, members) in enumerate(segments):
            (first,) = {self.offsets[r] for r in members}
            keys, values = normal(kv_heads, size, DIM), normal(kv_heads, size, VALUE_DIM)
            bias = 2 * normal(kv_heads, size) if index in biased else None
            self.segments.append(SharedKV(keys, values, members, first, bias))
            for row in members:
                self.offsets[row] += size

    @property
    def plan(self) -> Plan:
        device, dtype = torch.device("cpu"), torch.float32
        return plan(self.starts, self.n, self.offsets, window=self.window, device=device, dtype=dtype)

    def run(self) -> Tensor:
        return prefix_attention(
            self.query, self.keys, self.values, self.plan, self.segments, scale=DIM**-0.5, softcap=self.softcap
        )

    def expected(self) -> Tensor:
        rows, heads, n, _ = self.query.shape
        out = torch.zeros(rows, heads, n, VALUE_DIM, dtype=torch.float64)
        for r in range(rows):
            end = self.starts[r] + n
            mine = [s for s in self.segments if r in s.rows]
            keys = torch.cat([*(s.keys for s in mine), self.keys[r, :, :end]], dim=1).double()
            values = torch.cat([*(s.values for s in mine), self.values[r, :, :end]], dim=1).double()
            given = [torch.zeros(s.keys.shape[:2]) if s.bias is None else s.bias for s in mine]
            bias = torch.cat([*given, torch.zeros(keys.shape[0], end)], dim=1).double()
            for h in range(heads):
                kv = h // (heads // keys.shape[0])
                for i in range(n):
                    last = self.offsets[r] + self.starts[r] + i  # position of the query
                    first = 0 if self.window is None else max(0, last - self.window + 1)
                    scores = keys[kv, first : last + 1] @ self.query[r, h, i].double() * DIM**-0.5
                    if self.softcap is not None:
                        scores = self.softcap * torch.tanh(scores / self.softcap)
                    scores = scores + bias[kv, first : last + 1]
                    out[r, h, i] = scores.softmax(-1) @ values[kv, first : last + 1]
        return out


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def check(case: Case) -> None:
    got = case.run()
    assert got.shape == (*case.query.shape[:3], VALUE_DIM) and got.dtype == torch.float32
    assert error(got, case.expected()) <= TOLERANCE


TAILS = {"prefill": [0, 0, 0], "even": [7, 7, 7], "ragged": [0, 5, 19], "one row": [11]}
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1), "one head": (1, 1)}


@pytest.mark.parametrize("starts", TAILS.values(), ids=TAILS)
@pytest.mark.parametrize("n", [1, 2, 17])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_tails_alone(starts: list[int], n: int, heads: tuple[int, int], window: int | None) -> None:
    check(Case(starts, n, heads=heads[0], kv_heads=heads[1], window=window))


# (size, rows that read it); rows without a segment have their tail alone
SEGMENTS = {
    "shared by all": ((9, (0, 1, 2)),),
    "by some": ((9, (0, 2)),),
    "one each": ((3, (0,)), (1, (1,)), (33, (2,))),
    "chain": ((5, (0, 1, 2)), (16, (0, 1, 2)), (1, (0, 1, 2))),
    "fork": ((6, (0, 1, 2)), (4, (0, 1)), (7, (2,))),
    "out of order": ((6, (2, 0)), (3, (1,)), (2, (0,))),
}


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("starts", [[0, 0, 0], [3, 3, 3], [0, 5, 19]], ids=["empty tails", "even", "ragged"])
@pytest.mark.parametrize("n", [1, 2, 17])
@pytest.mark.parametrize("window", [None, 2, 12])
def test_segments_and_tails(segments: tuple, starts: list[int], n: int, window: int | None) -> None:
    check(Case(starts, n, segments=segments, window=window))


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_heads_over_segments(heads: tuple[int, int]) -> None:
    check(Case([0, 5, 19], 3, heads=heads[0], kv_heads=heads[1], segments=SEGMENTS["fork"], window=11))


@pytest.mark.parametrize("segments", [(), SEGMENTS["fork"]], ids=["tails alone", "segments"])
@pytest.mark.parametrize("starts", [[0, 0, 0], [0, 5, 19]], ids=["prefill", "ragged"])
@pytest.mark.parametrize("window", [None, 4])
def test_softcap(segments: tuple, starts: list[int], window: int | None) -> None:
    check(Case(starts, 3, segments=segments, window=window, softcap=1.5))


BIASED = {"all": ("fork", (0, 1, 2)), "one of two": ("fork", (1,)), "not every row": ("by some", (0,))}


@pytest.mark.parametrize(("segments", "biased"), BIASED.values(), ids=BIASED)
@pytest.mark.parametrize("heads", [(4, 2), (4, 1)], ids=["gqa", "mqa"])
@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_bias(
    segments: str, biased: tuple[int, ...], heads: tuple[int, int], window: int | None, softcap: float | None
) -> None:
    shared, (H, Hkv) = SEGMENTS[segments], heads
    check(Case([0, 5, 19], 3, heads=H, kv_heads=Hkv, segments=shared, biased=biased, window=window, softcap=softcap))


def biases(case: Case) -> list[Tensor]:
    return [s.bias for s in case.segments if s.bias is not None]


def hide(case: Case) -> None:
    """Some slots for one head; a whole segment for one head; a whole segment for all."""
    first, second, third = biases(case)
    first[1, ::2] = -math.inf
    second[0] = -math.inf
    third[:] = -math.inf


@pytest.mark.parametrize("window", [None, 11])
def test_slots_with_a_bias_of_minus_infinity_are_hidden(window: int | None) -> None:
    case = Case([0, 5, 19], 3, segments=SEGMENTS["fork"], biased=(0, 1, 2), window=window)
    hide(case)
    check(case)
    before = case.run()
    for segment in case.segments:
        assert segment.bias is not None
        hidden = segment.bias == -math.inf
        segment.keys[hidden], segment.values[hidden] = 1e4, -1e4
    assert torch.equal(case.run(), before)


def test_a_segment_without_a_visible_slot_adds_nothing() -> None:
    case = Case([0, 5, 19], 3, segments=SEGMENTS["fork"], biased=(0, 1, 2))
    for bias in biases(case):
        bias[:] = -math.inf
    got = case.run()
    case.segments.clear()
    assert error(got, case.run()) <= TOLERANCE


@pytest.mark.parametrize(
    ("biased", "window", "softcap"), [((0, 1, 2), None, None), ((0, 1, 2), 11, 1.5), ((), 6, None)]
)
def test_the_gradient_reaches_keys_values_and_bias(
    biased: tuple[int, ...], window: int | None, softcap: float | None
) -> None:
    # windows leave segments behind
    case = Case([0, 5, 19], 3, segments=SEGMENTS["fork"], biased=biased, window=window, softcap=softcap)
    if biased:
        hide(case)
    asked = [case.query, *(t for s in case.segments[:2] for t in (s.keys, s.values)), *biases(case)[:2]]
    for tensor in asked:
        tensor.requires_grad_()
    got = torch.autograd.grad(case.run().square().sum(), asked)
    expected = torch.autograd.grad(case.expected().square().sum(), asked)
    for g, e in zip(got, expected, strict=True):
        assert error(g, e) <= TOLERANCE


@pytest.mark.parametrize("segments", [(), SEGMENTS["fork"]], ids=["tails alone", "segments"])
def test_what_stands_behind_a_rows_length_does_not_matter(segments: tuple) -> None:
    case = Case([0, 5, 19], 2, segments=segments)
    before = case.run()
    for row, start in enumerate(case.starts):
        case.keys[row, :, start + case.n :] = 1e4
        case.values[row, :, start + case.n :] = -1e4
    assert torch.equal(case.run(), before)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    case = Case([4, 5, 19], 2, segments=SEGMENTS["fork"])
    before = case.run()
    case.query[2], case.keys[2], case.values[2] = 9.0, 9.0, 9.0
    assert torch.equal(case.run()[:2], before[:2])


@pytest.mark.parametrize("segments", [(), SEGMENTS["fork"]], ids=["tails alone", "segments"])
def test_saturated_scores(segments: tuple) -> None:
    case = Case([0, 5, 19], 3, segments=segments)
    case.query *= 300.0  # softmax is nearly one-hot, exp() of a raw score would overflow
    got = case.run()
    assert bool(got.isfinite().all())
    # scores near 1e3 carry 6e-5 of rounding in fp32, and exp() turns that into a relative error
    assert error(got, case.expected()) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_as_it_went_in(dtype: torch.dtype) -> None:
    case = Case([0, 5, 19], 3, segments=SEGMENTS["fork"], biased=(1,))
    expected = case.expected()
    halves = [replace(s, keys=s.keys.to(dtype), values=s.values.to(dtype)) for s in case.segments]
    made = plan(case.starts, 3, case.offsets, window=None, device=torch.device("cpu"), dtype=dtype)
    tensors = (t.to(dtype) for t in (case.query, case.keys, case.values))
    got = prefix_attention(*tensors, made, halves, scale=DIM**-0.5)
    assert got.dtype == dtype
    # inputs rounded to 8 (bf16) or 11 (fp16) bits
    assert error(got.float(), expected) <= (2e-2 if dtype == torch.bfloat16 else 3e-3)


def test_masks_are_built_only_where_they_are_needed() -> None:
    def made(starts: list[int], n: int, window: int | None = None) -> Plan:
        return plan(starts, n, [0] * len(starts), window=window, device=torch.device("cpu"), dtype=torch.float32)

    fresh, step, ragged, tight = made([0, 0], 5), made([7, 7], 1), made([7, 3], 1), made([7, 7], 1, 4)
    assert fresh.causal and fresh.mask is None
    assert not step.causal and step.mask is None
    assert ragged.mask is not None and ragged.mask.shape == (2, 1, 1, 8)
    assert ragged.mask[1, 0, 0].tolist() == [0.0] * 4 + [-math.inf] * 4
    assert tight.mask is not None and tight.mask[0, 0, 0].tolist() == [-math.inf] * 4 + [0.0] * 4


def test_no_mask_is_built_before_it_is_read() -> None:
    made = plan([9, 0], 4096, [0, 0], window=None, device=torch.device("cpu"), dtype=torch.float32)
    assert "mask" not in vars(made)
    assert made.starts == (9, 0) and made.first_query_positions == (9, 0) and made.tail_length == 4105


def test_what_does_not_fit_is_refused() -> None:
    case = Case([0, 5, 19], 2)
    query, keys, values, made = case.query, case.keys, case.values, case.plan
    with pytest.raises(ValueError, match="H a multiple of Hkv"):
        prefix_attention(query[:, :3], keys, values, made, scale=1.0)
    with pytest.raises(ValueError, match=r"must be \[R, H, n, D\]"):
        prefix_attention(query, keys, values[:, :, 1:], made, scale=1.0)
    with pytest.raises(ValueError, match="make a plan for this step"):
        prefix_attention(query[:, :, :1], keys, values, made, scale=1.0)
    with pytest.raises(ValueError, match="softcap=0"):
        prefix_attention(query, keys, values, made, scale=1.0, softcap=0.0)
    one, fits = SharedKV(torch.zeros(2, 9, DIM), torch.zeros(2, 9, VALUE_DIM), (0,), 0), torch.zeros(2, 9)
    for bias in (fits[:, 1:], fits[:1], fits[0], fits.T, fits.bfloat16(), fits.double()):
        told = re.escape(f"bias {list(bias.shape)} in {bias.dtype}: must be [Hkv, P] = [2, 9] in torch.float32")
        with pytest.raises(ValueError, match=told):
            prefix_attention(query, keys, values, made, [one, replace(one, bias=bias)], scale=1.0)


def test_the_comparison_can_fail() -> None:
    expected = Case([0, 5, 19], 3, segments=SEGMENTS["fork"]).expected()
    assert error(torch.zeros_like(expected), expected) > 0.9
    assert error(torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)), expected) > 0.9
    # no bias
    case = Case([0, 5, 19], 3, segments=SEGMENTS["fork"], biased=(0,))
    expected = case.expected()
    biases(case)[0].zero_()
    assert error(case.expected(), expected) > 1e-2
    # a window off by one
    windows = [Case([0, 5, 19], 3, segments=SEGMENTS["fork"], window=w).expected() for w in (4, 5)]
    assert error(*windows) > 1e-2


def test_rows_are_parted_where_reading_all_as_far_as_the_longest_costs_more_than_a_call() -> None:
    token = 1000  # bytes, so that a call is worth 300 tokens
    assert groups([10, 20, 30], token) == [(0, 3)]
    assert groups([10, 10, 10, 900], token) == [(0, 3), (3, 4)]
    assert groups([900, 10, 10, 10, 900, 900], token) == [(0, 1), (1, 4), (4, 6)]
    assert groups([5], token) == [(0, 1)]


@pytest.mark.parametrize("window", [None, 7])
def test_parted_rows_give_what_rows_read_together_do(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    torch.manual_seed(0)
    starts, n = [3, 40, 5, 5, 90, 0], 2
    length = max(starts) + n
    query, keys, values = torch.randn(6, 4, n, 8), torch.randn(6, 2, length, 8), torch.randn(6, 2, length, 8)

    def attend() -> torch.Tensor:
        made = plan(starts, n, [0] * 6, window=window, device=query.device, dtype=query.dtype)
        return prefix_attention(query, keys, values, made, scale=0.3)

    together = attend()
    monkeypatch.setattr(reference, "BYTES_OF_A_CALL", 1)
    torch.testing.assert_close(attend(), together)
