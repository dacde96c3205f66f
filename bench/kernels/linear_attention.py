"""Cases of the linear_attention family: prefill, one-token step and replay, with the heads of a converted model.

Keys differ inside a group of heads (each head has its own convolution), values and decays do not. The peers' prefill is
causal softmax attention over the same heads, and fla's kernel for the same recurrence without its denominator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from accel.bench.kernels import cases as c
from accel.bench.kernels import peers
from accel.bench.kernels.cases import Case, Check, Geometry, Goal, Ready

STEP_GOALS = (Goal(share=0.8),)
PREFILL_GOALS = (Goal(peer="fla chunk_gla", ratio=2.0),)
# two results in bf16, each within the rounding of the exact one
PEERS_MAY_DIFFER = 2e-2
# tokens of a prefill that the reference computes: the first ones, and the last ones from the state before them
FIRST, LAST = 512, 128
# a bound on a step's decay, which the gates here never reach: it lets the kernel take its faster way
MIN_LOG_DECAY = -2.0
# a round of five drafted tokens, and the buffered inputs at which a row's state is brought up to date
ROUND, CAPACITY = 6, 32


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    if quick:
        yield _prefill(device, c.TOY, 512, rank=0)
        yield _step(device, c.TOY, 2, rank=0)
        yield _replay(device, c.TOY, 2, rank=1)
        return
    for later, g in enumerate((c.LLAMA_8B, c.LLAMA_1B)):
        for T, rank in ((1_024, 1), (4_096, 0), (16_384, 1), (32_768, 0), (131_072, 1)):
            yield _prefill(device, g, T, rank + later)
        yield _prefill(device, g, 32_768, 2 + later, bounded=False)
        for R, rank in ((1, 1), (16, 1), (64, 0)):
            yield _step(device, g, R, rank + later)
        for R, rank in ((1, 1), (16, 1)):
            yield _replay(device, g, R, rank + later)


def _inputs(device: torch.device, dtype: torch.dtype, g: Geometry, *shape: int, seed: int = 0) -> list[Tensor]:
    """q, k [.., H, D], v, log_decay [.., Hkv, D]: features are the two halves of a softmax map, decays a gate's."""
    drawn = [
        c.normal(device, *shape, heads, g.D, dtype=dtype, seed=seed + i)
        for i, heads in enumerate((g.H, g.H, g.Hkv, g.Hkv))
    ]
    q, k = (x.unflatten(-1, (2, -1)).softmax(-1).flatten(-2) for x in drawn[:2])
    return [q, k, drawn[2], torch.nn.functional.logsigmoid(drawn[3]) / 16]


def _bytes_a_token(g: Geometry, dtype: torch.dtype) -> int:
    """q, k and the result of every head, v and decay of every group."""
    return (3 * g.H + 2 * g.Hkv) * g.D * dtype.itemsize


def _state_bytes(g: Geometry, R: int) -> int:
    """fp32: the state [R, H, D, D] and the denominator's [R, H, D]."""
    return 4 * R * g.H * g.D * (g.D + 1)


def _shape(g: Geometry, **more: int) -> dict[str, int | str]:
    return {**more, "H": g.H, "Hkv": g.Hkv, "K": g.D, "V": g.D, "models": g.models}


def _prefill(device: torch.device, g: Geometry, T: int, rank: int, bounded: bool = True) -> Case:
    dtype = c.working_dtype(device)
    return Case(
        "linear_attention",
        f"prefill {g.H}/{g.Hkv}/{g.D}, {T:,} tokens{'' if bounded else ', any decay'}",
        _shape(g, B=1, T=T),
        c.dtype_name(dtype),
        bytes=T * _bytes_a_token(g, dtype) + _state_bytes(g, 1),
        # the recurrence: each token enters the state and reads it; chunks add to that, no algorithm does with less
        flops=4 * T * g.H * g.D * g.D,
        prepare=partial(_prepare_prefill, device, dtype, g, T, MIN_LOG_DECAY if bounded else None),
        goals=(PREFILL_GOALS + ((Goal(peer="sdpa"),) if T >= 4_096 else ())) if bounded else (),
        rank=rank,
    )


def _prepare_prefill(device: torch.device, dtype: torch.dtype, g: Geometry, T: int, least: float | None) -> Ready:
    kernels, reference = c.public("linear_attention"), c.reference("linear_attention")
    inputs = _inputs(device, dtype, g, 1, T)
    scale = g.D**-0.5

    def check() -> list[Check]:
        out, state = kernels.linear_attention(*inputs, min_log_decay=least)
        first = min(T, FIRST)
        expected, _ = reference.linear_attention(*(x[:, :first].float() for x in inputs))
        found = [c.close(f"first {first}", out[:, :first], expected, c.tolerance(dtype))]
        if T > FIRST:
            _, before = kernels.linear_attention(*(x[:, :-LAST] for x in inputs), min_log_decay=least)
            tail = (x[:, -LAST:].float() for x in inputs)
            expected, after = reference.linear_attention(*tail, initial_state=before)
            found += [
                c.close(f"last {LAST}", out[:, -LAST:], expected, c.tolerance(dtype)),
                c.close("final state", state.s, after.s, c.tolerance(dtype)),
                c.close("final denominator", state.z, after.z, c.tolerance(dtype)),
            ]
        return found

    def same_numerator(result: tuple[Tensor, Tensor]) -> Check:
        ours = kernels.linear_attention_terms(*inputs, min_log_decay=least)[0]
        return c.close("numerator", result[0], ours, PEERS_MAY_DIFFER)

    q, k, v, log_decay = inputs
    softmax_keys = k[:, :, :: g.H // g.Hkv]
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, softmax_keys, v)]
    repeated = [x.repeat_interleave(g.H // g.Hkv, 2) for x in (v, log_decay)]
    return Ready(
        lambda: kernels.linear_attention(*inputs, min_log_decay=least),
        check,
        {
            "sdpa": peers.sdpa(*heads_first, causal=True, scale=scale),
            "flash-attn": peers.flash_attn(*heads_first, causal=True, scale=scale),
            "fla chunk_gla": replace(
                peers.imported(
                    "fla.ops.gla", "chunk_gla", lambda f: partial(f, q, k, *repeated, output_final_state=True)
                ),
                agrees=same_numerator,
            ),
        },
    )


def _step(device: torch.device, g: Geometry, R: int, rank: int) -> Case:
    dtype = c.working_dtype(device)
    return Case(
        "linear_attention",
        f"step {g.H}/{g.Hkv}/{g.D}, R {R}",
        _shape(g, B=R),
        c.dtype_name(dtype),
        # the state is read and written
        bytes=R * _bytes_a_token(g, dtype) + 2 * _state_bytes(g, R),
        flops=4 * R * g.H * g.D * g.D,
        prepare=partial(_prepare_step, device, dtype, g, R),
        goals=STEP_GOALS,
        rank=rank,
    )


def _prepare_step(device: torch.device, dtype: torch.dtype, g: Geometry, R: int) -> Ready:
    kernels, reference = c.public("linear_attention"), c.reference("linear_attention")
    inputs = _inputs(device, dtype, g, R)
    state, copy = _filled_state(kernels, device, dtype, g, R), _filled_state(kernels, device, dtype, g, R)

    def check() -> list[Check]:
        ours, theirs = (kernels.State(copy.s.clone(), copy.z.clone()) for _ in range(2))
        got = kernels.linear_attention_step(*inputs, ours)
        expected = reference.linear_attention_step(*(x.float() for x in inputs), theirs)
        return [
            c.close("output", got, expected, c.tolerance(dtype)),
            c.close("state", ours.s, theirs.s, 1e-5),
            c.close("denominator", ours.z, theirs.z, 1e-5),
        ]

    q, k, v, log_decay = (x[:, None] for x in inputs)
    repeated = [x.repeat_interleave(g.H // g.Hkv, 2) for x in (v, log_decay)]
    return Ready(
        lambda: kernels.linear_attention_step(*inputs, state),
        check,
        {
            "torch reference": c.Peer(lambda: reference.linear_attention_step(*inputs, copy)),
            "fla fused_recurrent_gla": peers.imported(
                "fla.ops.gla",
                "fused_recurrent_gla",
                lambda f: partial(f, q, k, *repeated, initial_state=copy.s, output_final_state=True),
            ),
        },
    )


def _filled_state(kernels: object, device: torch.device, dtype: torch.dtype, g: Geometry, R: int):  # type: ignore[no-untyped-def]
    """The state after 64 tokens: a denominator of zero would divide noise."""
    _, state = kernels.linear_attention(*_inputs(device, dtype, g, R, 64, seed=7))  # type: ignore[attr-defined]
    return state


def _replay(device: torch.device, g: Geometry, R: int, rank: int) -> Case:
    dtype = c.working_dtype(device)
    # between two updates a buffer holds half of its capacity on average; the state is read and not written
    # the buffer's decays are fp32
    a_row = ((g.H + g.Hkv) * dtype.itemsize + g.Hkv * 4) * g.D
    buffered, appended = (CAPACITY - ROUND) // 2 * a_row, ROUND * a_row
    return Case(
        "linear_attention",
        f"replay {g.H}/{g.Hkv}/{g.D}, R {R}, n {ROUND}",
        _shape(g, B=R, n=ROUND, C=CAPACITY),
        c.dtype_name(dtype),
        bytes=R * (ROUND * _bytes_a_token(g, dtype) + buffered + appended) + _state_bytes(g, R),
        flops=2 * R * ROUND * g.H * g.D * g.D,
        prepare=partial(_prepare_replay, device, dtype, g, R),
        goals=STEP_GOALS,
        rank=rank,
    )


def _prepare_replay(device: torch.device, dtype: torch.dtype, g: Geometry, R: int) -> Ready:
    kernels, reference = c.public("linear_attention"), c.reference("linear_attention")
    inputs = _inputs(device, dtype, g, R, ROUND)

    def fresh() -> tuple[object, object]:
        return _filled_state(kernels, device, dtype, g, R), kernels.new_replay(*inputs[1:], CAPACITY)

    def check() -> list[Check]:
        ours, theirs = fresh(), fresh()
        found = []
        # so many rounds that rows are folded into the state on the way
        for i in range(CAPACITY // ROUND + 2):
            got = kernels.replay_step(*inputs, *ours)
            expected = reference.replay_step(*(x.float() for x in inputs), *theirs)
            found.append(c.close(f"round {i}", got, expected, c.tolerance(dtype)))
        return found

    state, replay = fresh()
    return Ready(
        lambda: kernels.replay_step(*inputs, state, replay),
        check,
        {"torch reference": c.Peer(partial(reference.replay_step, *inputs, *fresh()))},
    )
